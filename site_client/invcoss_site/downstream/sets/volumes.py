"""The published sets of volumes: RICORD, LiTS, VS and LA, as distributed or prepared."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from invcoss_common.errors import DataError
from invcoss_site.downstream.sets.cases import Case, Split, existing, first_part, read_list, some
from invcoss_site.downstream.sets.layouts import entries, inside, wrong_folder

PREPARED = "nnUNetData_plans_v2.1_stage1"  # nnU-Net v1's folder of .npz files, image and mask in each

# The published test volumes of LiTS; the rest is for training.
LITS_TEST = frozenset(
    (0, 4, 9, 13, 17, 21, 26, 30, 35, 44, 49, 53, 58, 62, 67, 71, 76, 80, 85, 94, 99, 102, 107, 111, 116, 120, 125)
)
_RICORD = re.compile(r"ID(?P<patient>.+?)_date(?P<date>\d\d-\d\d-\d{4})_(?P<series>.+)\.nii\.gz")
_STUDY = re.compile(r"(?P<date>\d\d-\d\d-\d{4})")


def ricord(data: Path) -> list[Case]:
    """By the published lists; patients are those of the names, 1A is positive (1) and 1B negative (0)."""
    lists: dict[Split, Path] = {split: data / f"RICORD_{split}.txt" for split in ("train", "val", "test")}
    if missing := [path.name for path in lists.values() if not path.is_file()]:
        raise wrong_folder("ricord", data, f"no {some(missing)}")
    resized, converted = data / "RICORD_nii_resize", data / "RICORD_nii"
    series = {} if resized.is_dir() or converted.is_dir() else _series(data)
    if not resized.is_dir() and not converted.is_dir() and not series:
        raise wrong_folder("ricord", data, "no RICORD_nii_resize, RICORD_nii or DICOM files")
    cases = []
    for split, path in lists.items():
        for words in read_list(path):
            name = Path(words[0])
            matched = _RICORD.fullmatch(name.name)
            if len(words) != 2 or words[1] not in ("0", "1") or not matched:
                raise DataError(f"{path}: {' '.join(words)!r} is no volume with label 0 or 1; copy the list again")
            if series:
                files = series.get(_key(matched["patient"], matched["date"], matched["series"]), ())
                if not files:
                    raise DataError(f"{data}: no series for {name.name}, though {path} names it; download it")
            else:
                folder = resized if resized.is_dir() else converted
                files = (existing(folder / name.relative_to(name.parts[0]), path),)
            identity = name.name.removesuffix(".nii.gz")
            cases.append(Case(identity, matched["patient"], split, files, label=int(words[1])))
    return cases


def _series(data: Path) -> dict[tuple[str, ...], tuple[Path, ...]]:
    """The slices of each DICOM series by `_key`; TCIA names folders collection-patient / date-study / series."""
    found = {}
    for collection in ("MIDRC-RICORD-1A", "MIDRC-RICORD-1B"):
        for folder in sorted((data / collection).glob(f"{collection}-*/*/*/")):
            patient = folder.parents[1].name.removeprefix(f"{collection}-")
            date = _STUDY.match(folder.parent.name)
            if date and (slices := tuple(entries(folder))):
                found[_key(patient, date["date"], folder.name)] = slices
    return found


def _key(patient: str, date: str, series: str) -> tuple[str, ...]:
    """What the name of a series has in common in the list and on disk, where some letters between differ."""
    return patient, date, series.partition("-")[0], series[-5:]


def lits(data: Path) -> list[Case]:
    """131 volumes, 27 of them, by the published list, test."""
    prepared = inside(inside(data, "Task100_MOTS"), PREPARED)
    if prepared.name == PREPARED:
        found = {
            _number(path): (path, path) for path in entries(prepared) if re.fullmatch(r"liver_\d+\.npz", path.name)
        }
    else:
        masks = {_number(path): path for path in sorted(data.rglob("segmentation-*.nii*"))}
        images = {_number(path): path for path in sorted(data.rglob("volume-*.nii*"))}
        if odd := sorted(set(images) ^ set(masks)):
            raise wrong_folder("lits", data, f"volume or segmentation is missing of {some(odd)}")
        found = {number: (images[number], masks[number]) for number in images}
    if not found:
        raise wrong_folder("lits", data, "neither volume-<i>.nii nor liver_<i>.npz")
    return [
        Case(f"liver_{number}", f"liver_{number}", "test" if number in LITS_TEST else "train", (image,), mask=mask)
        for number, (image, mask) in sorted(found.items())
    ]


def _number(path: Path) -> int:
    return int(re.split(r"[-_]", path.name.partition(".")[0])[-1])


def vs(data: Path) -> list[Case]:
    """Four fifths train, the rest test: by the published lists if they are there, else shuffled as published."""
    folder = inside(data, "Task061_VSseg")
    prepared = folder / PREPARED
    raw = sorted(folder.glob("*/vs_gk_t1_refT1.nii.gz"))
    if prepared.is_dir():
        pairs = {path.stem: (path, path) for path in entries(prepared) if path.suffix == ".npz"}
    elif (folder / "imagesTr").is_dir():
        images = [path for path in entries(folder / "imagesTr") if path.name.endswith("_0000.nii.gz")]
        names = [path.name.removesuffix("_0000.nii.gz") for path in images]
        pairs = {
            name: (image, folder / "labelsTr" / f"{name}.nii.gz") for name, image in zip(names, images, strict=True)
        }
    else:  # patient 168 is left out as published
        pairs = {
            path.parent.name: (path, path.with_name("vs_gk_seg_refT1.nii.gz"))
            for path in raw
            if not path.parent.name.endswith("168")
        }
    if not pairs:
        raise wrong_folder("vs", data, f"no {PREPARED}, imagesTr or <patient>/vs_gk_t1_refT1.nii.gz")
    cases = []
    for name, split in _vs_splits(folder, sorted(pairs)).items():
        if name not in pairs:
            raise wrong_folder("vs", data, f"there is no volume of {name}, though the list or dataset.json names it")
        image, mask = pairs[name]
        if not mask.is_file():
            raise wrong_folder("vs", data, f"{image} has no mask {mask}")
        cases.append(Case(name, name, split, (image,), mask=mask))
    return sorted(cases, key=lambda case: case.id)


def _vs_splits(folder: Path, names: list[str]) -> dict[str, Split]:
    lists: dict[Split, Path] = {split: folder / f"VSseg_{split}.txt" for split in ("train", "test")}
    if all(path.is_file() for path in lists.values()):
        pairs = [(words[0], split) for split, path in lists.items() for words in read_list(path)]
        if twice := sorted({name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1}):
            raise DataError(f"{lists['test']}: patient {some(twice)} is listed twice; a patient is in one split, once")
        return dict(pairs)
    order = list(names)
    description = folder / "dataset.json"
    if description.is_file():
        try:
            listed = json.loads(description.read_bytes())["training"]
            order = [Path(entry["label"]).name.removesuffix(".nii.gz") for entry in listed]
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{description}: no list `training` of image and label; copy it again") from None
    random.Random(0).shuffle(order)  # noqa: S311 (a published split)
    kept = first_part(order)
    return {name: "train" if name in kept else "test" for name in order}


def la(data: Path) -> list[Case]:
    """80 train and 20 test volumes by UA-MT's lists."""
    folder = inside(data, "2018LA_Seg_Training Set", "Training Set")
    cases = []
    for split, path in _la_lists(data).items():
        for name, *_ in read_list(path):
            prepared, raw = folder / name / "mri_norm2.h5", folder / name / "lgemri.nrrd"
            if prepared.is_file():
                cases.append(Case(name, name, split, (prepared,), mask=prepared))
            elif raw.is_file():
                cases.append(Case(name, name, split, (raw,), mask=existing(raw.with_name("laendo.nrrd"), path)))
            else:
                raise wrong_folder("la", data, f"{path} names {name}, and there is no {prepared} or {raw.name}")
    return cases


def _la_lists(data: Path) -> dict[Split, Path]:
    lists: dict[Split, Path] = {"train": data / "train.list", "test": data / "test.list"}
    if missing := [path.name for path in lists.values() if not path.is_file()]:
        raise wrong_folder("la", data, f"no {some(missing)}")
    return lists
