"""The published pre-training sets as they are distributed: which files, whose, and in which split.

One function a set, all alike: from the set's folder to its images in a fixed order, whatever the order of the folder's
listing, and to what can't be used and why. Raises DataError, with the layout that it expects, for another folder.
Where a set publishes a split it is taken; where it doesn't, patients are divided as everywhere (`inventory.py`).
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest import is_image
from invcoss_site.ingest.arrays import shape_of
from invcoss_site.ingest.sample import Finding
from invcoss_site.ingest.slide import SUFFIXES as SLIDES
from invcoss_site.ingest.stack import TABLE, spacings
from invcoss_site.ingest.volume import MIN_SIDE


@dataclass(frozen=True)
class Published:
    """One image of a set: its files, its patient, and the set's split or "". `part` is which image of one file."""

    files: tuple[Path, ...]
    patient: str
    split: str = ""
    part: str = ""


Found = Published | Finding


@dataclass(frozen=True)
class Layout:
    """How a set is laid out, for people; how its images are found; and which kinds of images they are."""

    expected: str
    find: Callable[[Path], Iterator[Found]]
    kinds: frozenset[tuple[int, int]]  # ndim and channels of a modality


# MIMIC-CXR-JPG

_MIMIC = "mimic-cxr-2.0.0-split.csv"
_MIMIC_SPLITS = {"train": "train", "validate": "val", "test": "test"}


def mimic_cxr_jpg(data: Path) -> Iterator[Found]:
    """Every film under files/ that the table of splits names; what of the table wasn't downloaded is one finding."""
    table = next((path for path in (data / f"{_MIMIC}.gz", data / _MIMIC) if path.is_file()), None)
    if table is None or not (data / "files").is_dir():
        raise _unlike(data, "mimic-cxr-jpg")
    listed = {row["dicom_id"]: row for row in _rows(table, ("dicom_id", "study_id", "subject_id", "split"))}
    for path in sorted((data / "files").glob("p*/p*/s*/*.jpg")):
        row = listed.pop(path.stem, None)
        if row is None:
            yield _finding(path, f"{table.name} doesn't name it, so its split is not known; remove it")
        elif (path.parts[-3], path.parts[-2]) != (f"p{row['subject_id']}", f"s{row['study_id']}"):
            yield _finding(path, f"{table.name} has another patient or study for it; download it again")
        elif row["split"] not in _MIMIC_SPLITS:
            yield _finding(path, f"its split is none of {', '.join(_MIMIC_SPLITS)}; download {table.name} again")
        else:
            yield Published((path,), f"p{row['subject_id']}", _MIMIC_SPLITS[row["split"]])
    if listed:
        yield _finding(table, f"{len(listed):,} of its films are not in files/; download them, or go on without them")


# DeepLesion

_LESION_SPLITS = {"1": "train", "2": "val", "3": "test"}  # the column Train_Val_Test


def deeplesion(data: Path) -> Iterator[Found]:
    """Every run of consecutive slices of a series under Images_png/ as a volume, in the series' own split."""
    table, images = data / TABLE, data / "Images_png"
    if not table.is_file() or not images.is_dir():
        raise _unlike(data, "deeplesion")
    splits: dict[str, set[str]] = {}
    for row in _rows(table, ("File_name", "Spacing_mm_px_", "Train_Val_Test")):
        splits.setdefault(row["File_name"].rpartition("_")[0], set()).add(row["Train_Val_Test"])
    known = spacings(table, table.stat().st_mtime_ns)
    for folder in sorted(one for one in images.iterdir() if one.is_dir()):
        found = splits.pop(folder.name, set())
        split = _LESION_SPLITS.get(min(found, default=""), "")
        if not found:
            yield _finding(folder, f"{TABLE} doesn't name it, so its split is not known; remove it")
        elif len(found) > 1 or not split:
            yield _finding(folder, f"{TABLE} has not one split of 1, 2 or 3 for it; correct the table")
        elif folder.name not in known:
            yield _finding(folder, f"{TABLE} has no spacing for it, such as '0.8, 0.8, 5'; correct the table")
        else:
            yield from _runs(folder, table, split)
    if splits:
        yield _finding(table, f"{len(splits):,} of its series are not in Images_png/; download them, or leave it so")


def _runs(folder: Path, table: Path, split: str) -> Iterator[Found]:
    """The slices of a series, cut where some are missing."""
    named = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isascii() and path.stem.isdigit()}
    numbers = sorted(named)
    cuts = [place for place, (one, next_one) in enumerate(pairwise(numbers), start=1) if next_one != one + 1]
    for start, end in pairwise([0, *cuts, len(numbers)]):
        run = [named[number] for number in numbers[start:end]]
        if len(run) < MIN_SIDE:
            first = run[0] if run else folder
            text = f"{len(run)} slices in a row, a volume needs {MIN_SIDE}; download the whole series"
            yield Finding(first, f"{first}: {text}", "too-small")
        else:
            yield Published((*run, table), folder.name.partition("_")[0], split)


# ADNI

_SUBJECT = re.compile(r"\d{3}_S_\d{4,5}")
_IMAGE = re.compile(r"[ID]\d+")


def adni(data: Path) -> Iterator[Found]:
    """Every image under ADNI/<subject>/<sequence>/<date>/I<number>/: each NIfTI file, or the DICOM files together.

    With the collection's CSV beside it, what that doesn't list, or lists for another subject, is not used.
    """
    if not (data / "ADNI").is_dir():
        raise _unlike(data, "adni")
    table = next((path for path in sorted(data.glob("*.csv")) if "Image Data ID" in _columns(path)), None)
    listed = None
    if table is not None:
        listed = {row["Image Data ID"]: row["Subject"] for row in _rows(table, ("Image Data ID", "Subject"))}
    seen = set()
    for folder in sorted(one for one in (data / "ADNI").glob("*/*/*/*") if one.is_dir()):
        subject, image = folder.parts[-4], folder.name
        files = sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
        seen.add(image)
        if not _SUBJECT.fullmatch(subject) or not _IMAGE.fullmatch(image):
            yield _finding(folder, "not named as ADNI/<subject>/<sequence>/<date>/I<number>; remove it")
        elif not files:
            yield _finding(folder, "an empty folder; download it again")
        elif listed is not None and table is not None and listed.get(image) != subject:
            what = "another subject for it" if image in listed else "no such image"
            yield _finding(folder, f"{table.name} has {what}; correct the table, or remove the folder")
        else:
            yield from (Published((path,), subject) for path in files if is_image(path))
    missing = len(set(listed or ()) - seen)
    if table is not None and missing:
        yield _finding(table, f"{missing:,} of its images are not in ADNI/; download them, or go on without them")


# TCGA

_BARCODE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-\d{2}[A-Z]-\d{2}-[A-Z]{2}[A-Z0-9]+\..+")


def tcga(data: Path) -> Iterator[Found]:
    """Every slide <uuid>/TCGA-xx-xxxx-01Z-00-DX1.<uuid>.svs of a GDC download; the barcode says whose.

    Not used are slides that the GDC's annotations withdraw, and, with a manifest, those that aren't wholly there.
    """
    slides = sorted(path for path in data.glob("*/*") if path.name.lower().endswith((*SLIDES, ".tif", ".tiff")))
    if not any(_BARCODE.fullmatch(path.name) for path in slides):
        raise _unlike(data, "tcga")
    manifests = [path for path in sorted(data.glob("*.txt")) if {"id", "filename", "size"} <= _columns(path)]
    listed = {row["id"]: row for path in manifests for row in _rows(path, ("id", "filename", "size"))}
    seen = {path.parent.name for path in slides}
    for path in slides:
        barcode, row = _BARCODE.fullmatch(path.name), listed.get(path.parent.name)
        if barcode is None:
            yield _finding(path, "not named by a TCGA barcode, so its patient is not known; remove it")
        elif listed and row is None:
            yield _finding(path, "no manifest lists it; remove it, or put its manifest beside the folders")
        elif row and row["size"] != str(path.stat().st_size):
            text = f"{path.stat().st_size:,} bytes of {row['size']} in the manifest; download it again"
            yield Finding(path, f"{path}: {text}", "truncated")
        elif reason := _withdrawn(path.parent / "annotations.txt"):
            yield _finding(path, f"annotations.txt says {reason!r}: it must not be used; remove it")
        else:
            yield Published((path,), barcode[1])
    if missing := len(listed.keys() - seen):
        text = f"{missing:,} of its files are not in the folder; download them, or go on without them"
        yield _finding(manifests[0], text)


def _withdrawn(annotations: Path) -> str:
    """Why the GDC has withdrawn a slide, or nothing."""
    if not annotations.is_file():
        return ""
    for row in _rows(annotations, ("category", "classification")):
        if row["classification"] == "Redaction" or row["category"] == "Item flagged DNU":
            return f"{row['classification']}: {row['category']}"[:100]
    return ""


# MedMNIST

_ARRAYS = ("train", "val", "test")
_FLAT_SIDES, _CUBE_SIDES = (28, 64, 128, 224), (28, 64)
_CUBES = "mnist3d"


def medmnist(data: Path) -> Iterator[Found]:
    """Every image of every npz file: arrays <split>_images of 8-bit pictures, grey or RGB, or of cubes.

    MedMNIST names no patients, and its splits keep them apart, so each image counts as one.
    """
    files = sorted(data.glob("*mnist*.npz"))
    if not files:
        raise _unlike(data, "medmnist")
    for path in files:
        for split in _ARRAYS:
            name = f"{split}_images"
            try:
                shape = shape_of(path, name)
            except UnreadableFile as error:
                yield Finding(path, str(error), error.kind)
                continue
            if not _is_medmnist(shape, cubes=_CUBES in path.name):
                shown = f"has shape {shape}" if shape else "is missing"
                yield _finding(path, f"its {name} {shown}, and MedMNIST has squares or cubes; download it again")
                continue
            for number in range(shape[0]):
                part = f"{name}[{number}]"
                yield Published((path,), f"{path.stem} {part}", split, part)


def _is_medmnist(shape: tuple[int, ...], cubes: bool) -> bool:
    if cubes:
        return len(shape) == 4 and shape[1] == shape[2] == shape[3] and shape[1] in _CUBE_SIDES
    return len(shape) in (3, 4) and shape[1] == shape[2] and shape[1] in _FLAT_SIDES and shape[3:] in ((), (3,))


# all of them

LAYOUTS: dict[str, Layout] = {
    "mimic-cxr-jpg": Layout(
        f"files/p10/p10000032/s50414267/<dicom_id>.jpg, and {_MIMIC}.gz beside files/",
        mimic_cxr_jpg,
        frozenset({(2, 1), (2, 3)}),
    ),
    "deeplesion": Layout(
        f"Images_png/000001_01_01/103.png and so on, and {TABLE} beside Images_png/", deeplesion, frozenset({(3, 1)})
    ),
    "adni": Layout(
        "ADNI/002_S_0295/<sequence>/<date>/I123/*.dcm or *.nii, and perhaps the collection's CSV beside ADNI/",
        adni,
        frozenset({(3, 1)}),
    ),
    "tcga": Layout(
        "<uuid>/TCGA-xx-xxxx-01Z-00-DX1.<uuid>.svs, and perhaps the GDC's manifest beside the folders",
        tcga,
        frozenset({(2, 3)}),
    ),
    "medmnist": Layout(
        "pathmnist.npz, organmnist3d_64.npz and the like, directly in the folder",
        medmnist,
        frozenset({(2, 1), (2, 3), (3, 1)}),
    ),
}


def published(data: Path, layout: str, modality: Modality) -> Iterator[Found]:
    """The images of a set in a fixed order; raises DataError for no such layout, and for another modality's."""
    if layout not in LAYOUTS:
        raise DataError(f"layout: '{layout}' is none of {', '.join(LAYOUTS)}; correct it")
    if (modality.ndim, modality.channels) not in LAYOUTS[layout].kinds:
        kinds = " or ".join(f"{ndim}-D with {channels} channels" for ndim, channels in sorted(LAYOUTS[layout].kinds))
        raise DataError(
            f"layout {layout} holds images {kinds}, and the modality is {modality.ndim}-D with {modality.channels}; "
            "correct the layout or the plan"
        )
    return LAYOUTS[layout].find(data)


def _unlike(data: Path, layout: str) -> DataError:
    return DataError(
        f"{data}: not laid out as {layout} is published, which is {LAYOUTS[layout].expected}; check `data`"
    )


def _finding(path: Path, text: str) -> Finding:
    return Finding(path, f"{path}: {text}", "index")


def _columns(table: Path) -> set[str]:
    """What the first line of a table names; nothing if it can't be read as one."""
    try:
        with table.open(encoding="utf-8-sig") as lines:
            first = lines.readline(10_000)
    except (OSError, UnicodeDecodeError):
        return set()
    return {name.strip().strip('"') for name in re.split("[,\t]", first)}


def _rows(table: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a published table, CSV or TSV, perhaps gzipped; raises DataError unless it has what is `needed`."""
    try:
        opener = gzip.open if table.suffix == ".gz" else open
        with opener(table, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, restval="", delimiter="\t" if table.suffix == ".txt" else ",")
            if missing := set(needed) - set(rows.fieldnames or ()):
                raise DataError(f"{table}: has no column '{min(missing)}'; download it again")
            for row in rows:
                yield {name: (row[name] or "").strip() for name in needed}
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(f"{table}: can't be read ({error}); download it again") from None
