"""What a survey amounts to: the model of it, and how facts of single images are summed up. Reads no file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from invcoss_common.chain import now
from invcoss_common.modality import SizeName
from invcoss_site.deidentify import Level
from invcoss_site.survey_facts import BINS, Facts, Remark

NEEDED = (2, 1)  # least training and held-out images of a visit
EXAMPLES = 24  # files that are named of each sign


class Counts(BaseModel):
    """What a visit will use."""

    train: int
    heldout: int
    train_cases: int
    heldout_cases: int


class Split(BaseModel):
    """One split of the index, or what a hash of the case decided."""

    name: str
    images: int
    cases: int
    quarantined: int


class Spread(BaseModel):
    """Over all usable images."""

    lowest: float
    median: float
    highest: float


class Signs(BaseModel):
    """Everything of one sort that names a person, or may; no value."""

    level: Level
    where: str
    what: str
    images: int
    files: tuple[str, ...] = Field(description="the first ones")


class Duplicates(BaseModel):
    """Images that are the same by `how`; `both_sides` if one is trained on and one is held out."""

    how: str
    files: tuple[str, ...]
    both_sides: bool


class Masks(BaseModel):
    """Of those that an index names: how many fit their images, how many of these have each class, and which don't."""

    fit: int
    classes: dict[int, int]
    refused: tuple[Remark, ...]


class Axes(BaseModel):
    files: int
    first: str


class Survey(BaseModel):
    """What is in a folder, what of it will be used, and what is wrong with the rest. It stays at the site."""

    model_config = ConfigDict(frozen=True)

    modality: str
    images: Counts
    quarantined: tuple[Remark, ...]
    warnings: tuple[Remark, ...]
    axes: dict[str, Axes]
    folder: str
    made: str
    size: SizeName
    enlarged: int = Field(description="images smaller than the input of a model of this size")
    unlisted: int = Field(description="images in the folder that no index names")
    found: int = Field(description="images that were read")
    files: int = Field(description="that they are made of; slices of a series are many")
    splits: tuple[Split, ...]
    formats: dict[str, int]
    modalities: dict[str, int]
    patients: int = Field(description="different ones, as DICOM files say")
    scanners: dict[str, int]
    shapes: dict[str, int]
    spacings_mm: tuple[Spread, ...]
    values: dict[str, Spread]
    histogram: tuple[int, ...]
    masks: Masks
    duplicates: tuple[Duplicates, ...]
    in_two_splits: tuple[Remark, ...]
    identity: tuple[Signs, ...]
    each: tuple[Facts, ...] = Field(description="every image that was read")

    @property
    def enough(self) -> bool:
        return self.images.train >= NEEDED[0] and self.images.heldout >= NEEDED[1]


def summed(
    data: Path,
    name: str,
    each: list[Facts],
    rejected: tuple[Remark, ...],
    *,
    size: SizeName = "nano",
    enlarged: int = 0,
    unlisted: int = 0,
) -> Survey:
    """The survey of the images `each` and of the entries that were `rejected` before any was read."""
    used = [one for one in each if one.images]
    quarantined = (*rejected, *(one.quarantined for one in each if one.quarantined))
    clashing = tuple(one for one in rejected if one.kind == "index" and "in train and test" in one.text)
    return Survey(
        modality=name,
        images=Counts(
            train=sum(one.images for one in used if not one.held_out),
            heldout=sum(one.images for one in used if one.held_out),
            train_cases=len({one.case for one in used if not one.held_out}),
            heldout_cases=len({one.case for one in used if one.held_out}),
        ),
        quarantined=quarantined,
        warnings=tuple(warning for one in each for warning in one.warnings),
        axes=_axes(data, used),
        folder=str(data),
        made=now(),
        size=size,
        enlarged=enlarged,
        unlisted=unlisted,
        found=len(each),
        files=sum(one.files for one in each),
        splits=_splits(each),
        formats=_counted(one.format for one in each),
        modalities=_counted(one.modality for one in each),
        patients=len({one.patient for one in each if one.patient}),
        scanners=_counted(one.scanner for one in each),
        shapes=_counted(" × ".join(map(str, one.shape)) for one in used if len(one.shape) > 1),
        spacings_mm=tuple(map(_spread, zip(*(one.spacing_mm for one in used if one.spacing_mm), strict=True))),
        values=_values(used),
        histogram=tuple(map(sum, zip(*(one.histogram for one in used if one.histogram), strict=True))) or (0,) * BINS,
        masks=_masks(used),
        duplicates=_duplicates(used),
        in_two_splits=(*clashing, *_in_two_splits(used)),
        identity=_identity(each),
        each=tuple(each),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(name for name in names if name).most_common())


def _axes(data: Path, used: list[Facts]) -> dict[str, Axes]:
    found: dict[str, list[str]] = defaultdict(list)
    for one in used:
        if one.axes:
            found[one.axes].append(str(data / one.file))
    return {name: Axes(files=len(files), first=files[0]) for name, files in sorted(found.items())}


def _splits(each: list[Facts]) -> tuple[Split, ...]:
    groups: dict[str, list[Facts]] = defaultdict(list)
    for one in each:
        groups[one.split or ("held out by hash" if one.held_out else "training by hash")].append(one)
    return tuple(
        Split(
            name=name,
            images=sum(one.images for one in group),
            cases=len({one.case for one in group if one.images}),
            quarantined=sum(one.quarantined is not None for one in group),
        )
        for name, group in sorted(groups.items(), key=lambda found: -len(found[1]))
    )


def _masks(used: list[Facts]) -> Masks:
    classes = Counter(one for facts in used for one in facts.mask_classes)
    return Masks(
        fit=sum(bool(one.mask_classes) for one in used),
        classes=dict(sorted(classes.items())),
        refused=tuple(one.mask_refused for one in used if one.mask_refused),
    )


def _spread(numbers: Sequence[float]) -> Spread:
    ordered = sorted(numbers)
    return Spread(lowest=ordered[0], median=ordered[len(ordered) // 2], highest=ordered[-1])


def _values(used: list[Facts]) -> dict[str, Spread]:
    names = ("lowest", "1st percentile", "median", "99th percentile", "highest")
    columns = zip(*(one.values for one in used if len(one.values) == len(names)), strict=True)
    return {name: _spread(column) for name, column in zip(names, columns, strict=False)}


def _duplicates(used: list[Facts]) -> tuple[Duplicates, ...]:
    """Groups of the same content, then groups of the same instance UID that are not the same content."""
    found: dict[tuple[str, ...], Duplicates] = {}
    for how, key in (("content", "content"), ("DICOM instance UID", "uid")):
        groups: dict[str, list[Facts]] = defaultdict(list)
        for one in used:
            if value := getattr(one, key):
                groups[value].append(one)
        for group in groups.values():
            files = tuple(one.file for one in group)
            if len(group) > 1 and files not in found:
                found[files] = Duplicates(how=how, files=files, both_sides=len({one.held_out for one in group}) > 1)
    return tuple(sorted(found.values(), key=lambda one: not one.both_sides))


def _in_two_splits(used: list[Facts]) -> list[Remark]:
    """Patients, by the index's case or by DICOM, that are both trained on and held out or in two named splits."""
    found = []
    for what, key in (("case of the index", "case"), ("DICOM patient", "patient")):
        groups: dict[str, list[Facts]] = defaultdict(list)
        for one in used:
            if value := getattr(one, key):
                groups[value].append(one)
        for group in groups.values():
            splits = {one.split or ("held out" if one.held_out else "training") for one in group}
            if len(splits) > 1:
                text = f"its {what} is in {' and '.join(sorted(splits))}; put every patient in one split of the index"
                found.append(Remark(file=group[0].file, kind="two-splits", text=f"{group[0].file}: {text}"))
    return found


def _identity(each: list[Facts]) -> tuple[Signs, ...]:
    groups: dict[tuple[Level, str, str], list[str]] = defaultdict(list)
    for one in each:
        for sign in one.signs:
            groups[sign.level, sign.where, sign.what].append(one.file)
    ordered = sorted(groups.items(), key=lambda found: (found[0][0], -len(found[1]), found[0]))
    return tuple(
        Signs(level=level, where=where, what=what, images=len(files), files=tuple(files[:EXAMPLES]))
        for (level, where, what), files in ordered
    )
