"""What images a site has: which files belong to which case and which cases are held out; reads no pixel.

With an index (CSV files with columns `file`, `case` or `patient`, and perhaps `split`, `label` and `mask`, or a name
that ends in `_mask`) only what it lists is used; a row may name a folder of DICOM slices. Without one every file of the
modality's formats is.
A case that no index names is the file's BIDS subject (`sub-x` in its path), its DICOM patient, or the file itself.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest import FORMATS, OTHERS, format_of, suffixes
from invcoss_site.ingest.dicom import is_dicom
from invcoss_site.ingest.sample import Finding, check_not_empty
from invcoss_site.ingest.series import Header, find_series, header_of
from invcoss_site.layouts import published

HELD_OUT = "test"  # the split that is never trained on
SPLITS = ("train", "val", HELD_OUT)
HELD_OUT_SHARE = 0.2  # of the cases, where no split is given
READERS = 8  # of DICOM headers at a time
_SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")
_CLUTTER = ("DICOMDIR",)

# Of a BIDS data set: what is derived from images or isn't one, folders by name and files by the end of theirs.
_BIDS = "dataset_description.json"
_NOT_RAW = {"derivatives", "sourcedata", "code", "stimuli", "func", "dwi", "fmap", "perf", "eeg", "ieeg", "meg", "beh"}
_LABELS = ("_mask", "_dseg", "_probseg")


@dataclass(frozen=True)
class Item:
    """One image: its file, its case (patient, slide, ...) and whether that case is held out from training.

    Of a series of DICOM slices, `path` is the first of `files`. `mask` and `split` are the index's, if there are any.
    `part` is which image of a file of many it is.
    """

    path: Path
    case: str
    held_out: bool
    files: tuple[Path, ...]
    mask: Path | None = None
    split: str = ""
    part: str = ""


@dataclass(frozen=True)
class Inventory:
    """A site's usable images in a fixed order, and what was rejected before any pixel was read."""

    items: tuple[Item, ...]
    rejected: tuple[Finding, ...]


@dataclass(frozen=True)
class _Entry:
    """A file that may be an image. `case` and `split` are empty if nobody named them; `where` is the index's row.

    `files` are those of an image of several that aren't DICOM slices, `part` is as in `Item`.
    """

    path: Path
    case: str = ""
    split: str = ""
    where: str = ""
    mask: Path | None = None
    files: tuple[Path, ...] = ()
    part: str = ""


def take_inventory(
    data: Path,
    modality: Modality,
    index: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    classes: Collection[str] = (),
    layout: str = "",
) -> Inventory:
    """List the images under `data`; raises DataError when there is no folder, no image, or a useless index.

    The arguments are those of `list_images`.
    """
    found = list_images(data, modality, index, only, classes, layout)
    if not found.items:
        kind = FORMATS[modality.ndim]
        rejected = found.rejected
        why = f"; {len(rejected)} entries were rejected, first: {rejected[0].reason}" if rejected else ""
        raise DataError(f"{data}: no {kind} images to use; check the folder and what the plan calls its modality{why}")
    return found


def list_images(
    data: Path,
    modality: Modality,
    index: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    classes: Collection[str] = (),
    layout: str = "",
) -> Inventory:
    """The images under `data`, perhaps none; raises DataError when there is no folder, or a useless index.

    `only` are patterns such as `*_T1w.nii.gz`; a file's name or path must match one of them. With `classes`, rows of an
    index that have none of these labels are rejected. `layout` is that of a published set (`layouts.py`), "" for none.
    """
    suffixes(modality)
    if layout and index:
        raise DataError("layout: a published set has its own lists, and needs no index; leave one of them out")
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; set `data` in site.toml to the folder that holds the images")
    entries: list[_Entry] = []
    rejected: list[Finding] = []
    if layout:
        candidates = _published(data, layout, modality)
    else:
        candidates = _listed(data, index, modality, classes) if index else _found(data, modality)
    for found in candidates:
        if isinstance(found, Finding):
            rejected.append(found)
        elif _wanted(found.path.relative_to(data), only):
            entries.append(found)
    images, unreadable = _items(data, entries, modality)
    items, clashes = _without_split_cases(images)
    if not index and not any(entry.split for entry in entries):
        items = _some_held_out(items)
    items.sort(key=lambda item: item.path.relative_to(data).as_posix())
    rejected += [*unreadable, *clashes]
    return Inventory(tuple(items), tuple(rejected))


def split_of(case: str) -> bool:
    """Whether `case` is held out when nobody says: by a hash of its name, so that new cases move no old one."""
    return _rank(case) < HELD_OUT_SHARE


def _rank(case: str) -> float:
    return int.from_bytes(hashlib.sha256(case.encode()).digest()[:8], "big") / 2**64


def _some_held_out(items: list[Item]) -> list[Item]:
    """Hold out the case of lowest rank where chance has held out none or all, as it may with few cases.

    It alone may move when cases are added: once chance holds out another one, it is trained on.
    """
    if len({item.held_out for item in items}) != 1:
        return items  # chance has done well, or there are none
    lowest = min((item.case for item in items), key=_rank)
    return [replace(item, held_out=item.case == lowest) for item in items]


def _wanted(name: Path, only: tuple[str, ...]) -> bool:
    return not only or any(fnmatch(name.name, pattern) or fnmatch(name.as_posix(), pattern) for pattern in only)


def _found(data: Path, modality: Modality) -> Iterator[_Entry | Finding]:
    bids = (data / _BIDS).is_file()
    for path in data.rglob("*"):
        parts = path.relative_to(data).parts
        if any(part.startswith(".") for part in parts) or path.name in _CLUTTER or not path.is_file():
            continue
        if bids and (not _NOT_RAW.isdisjoint(parts) or path.name.split(".")[0].endswith(_LABELS)):
            continue
        if format_of(path, modality):
            yield _Entry(path)
        elif path.name.lower().endswith(OTHERS):
            text = f"{path}: {path.suffix} files are not read; convert it to {FORMATS[modality.ndim]}"
            yield Finding(path, text, "not-this-format")


def _published(data: Path, layout: str, modality: Modality) -> Iterator[_Entry | Finding]:
    for found in published(data, layout, modality):
        if isinstance(found, Finding):
            yield found
        else:
            yield _Entry(found.files[0], found.patient, found.split, files=found.files, part=found.part)


def _listed(
    data: Path, index: tuple[str, ...], modality: Modality, classes: Collection[str]
) -> Iterator[_Entry | Finding]:
    seen: set[str] = set()
    for name in index:
        file = data / name
        for number, row in _rows(file):
            cells = {_column(name): (value or "").strip() for name, value in row.items() if name}
            relative, split = cells.get("file", ""), cells.get("split", "")
            path = data / relative
            where = f"{file}, row {number}"
            if reason := _why_not(data, cells, modality, classes):
                yield Finding(file, f"{where}: {reason}", "index")
            elif relative not in seen or split:
                seen.add(relative)
                mask = data / cells["mask"] if cells.get("mask") else None
                case = cells.get("case") or cells.get("patient") or ""
                slices = sorted(one for one in path.iterdir() if is_dicom(one)) if path.is_dir() else [path]
                for one in slices:
                    yield _Entry(one, case, split, where, mask)


def _column(name: str) -> str:
    return "mask" if name.endswith("_mask") else name


def _why_not(data: Path, cells: dict[str, str], modality: Modality, classes: Collection[str]) -> str:
    """Why a row of an index can't be used and what to do, or nothing."""
    file, split = cells.get("file", ""), cells.get("split", "")
    if not file:
        return "no file is named; fill in the column 'file'"
    for column in ("file", "mask"):
        named = cells.get(column, "")
        if PurePosixPath(named).is_absolute() or not (data / named).resolve().is_relative_to(data.resolve()):
            return f"its {column} lies outside the data folder; use a path inside it"
        if not (data / named).exists():
            return f"'{named}' does not exist; copy it, or remove the row"
    path = data / file
    if path.is_dir():
        if not any(is_dicom(one) for one in path.iterdir()):
            return f"'{file}' is a folder without DICOM files; name a file"
    elif format_of(path, modality) is None:
        return f"'{file}' does not end in {', '.join(suffixes(modality))}; is it of another modality?"
    if split and split not in SPLITS:
        return f"split '{split}' is none of {', '.join(SPLITS)}; correct it"
    if classes and cells.get("label", "") not in classes:
        label = cells.get("label") or "none"
        return f"its label ({label}) is not one of {', '.join(sorted(classes))}; correct it"
    return ""


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV index with their line numbers; raises DataError when the file can't be read as one."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, restkey="", restval="")
            if not reader.fieldnames or "file" not in reader.fieldnames:
                raise DataError(f"{file}: has no column 'file'; its first line must name the columns")
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{file}: can't read the index ({error.strerror}); correct `index` in site.toml") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a UTF-8 CSV file ({error}); save it again") from None


def _items(data: Path, entries: Iterable[_Entry], modality: Modality) -> tuple[list[tuple[Item, str]], list[Finding]]:
    """The images of `entries`, DICOM slices put together, each with its row of the index; and useless DICOM files."""
    items: list[tuple[Item, str]] = []
    rejected: list[Finding] = []
    dicoms: list[_Entry] = []
    slices: dict[tuple[str, str], dict[Path, tuple[_Entry, Header]]] = {}
    for entry in entries:
        if format_of(entry.path, modality) == "dicom":
            dicoms.append(entry)
        else:
            items.append((_item(data, entry, entry.files or (entry.path,)), entry.where))
    with ThreadPoolExecutor(READERS) as threads:
        for entry, header in zip(dicoms, threads.map(_header, dicoms), strict=True):
            if isinstance(header, Finding):
                rejected.append(header)
            elif modality.ndim == 2:
                items.append((_item(data, entry, [entry.path], header), entry.where))
            else:
                slices.setdefault((entry.case, entry.split), {})[entry.path] = entry, header
    for together in slices.values():
        for files in find_series(header for _, header in together.values()):
            entry, header = together[files[0]]
            items.append((_item(data, entry, files, header), entry.where))
    return items, rejected


def _header(entry: _Entry) -> Header | Finding:
    try:
        check_not_empty(entry.path)
        return header_of(entry.path)
    except UnreadableFile as error:
        return Finding(entry.path, str(error), error.kind)


def _item(data: Path, entry: _Entry, files: Sequence[Path], header: Header | None = None) -> Item:
    name = entry.path.relative_to(data).as_posix()
    subject = _SUBJECT.search(name)
    case = entry.case or (f"sub-{subject[1]}" if subject else "") or (header.patient if header else "") or name
    held_out = entry.split == HELD_OUT if entry.split else split_of(case)
    return Item(files[0], case, held_out, tuple(files), entry.mask, entry.split, entry.part)


def _without_split_cases(items: list[tuple[Item, str]]) -> tuple[list[Item], list[Finding]]:
    """Leave out every case that is in two splits: a model must not be judged on a patient it learned from."""
    sides = {(item.case, item.held_out) for item, _ in items}
    clashing = {case for case, count in Counter(case for case, _ in sides).items() if count > 1}
    kept = {(item.path, item.part): item for item, _ in items if item.case not in clashing}
    rejected = [
        Finding(item.path, f"{where or item.path}: its case is in train and test; put every case in one split", "index")
        for item, where in items
        if item.case in clashing
    ]
    return list(kept.values()), rejected
