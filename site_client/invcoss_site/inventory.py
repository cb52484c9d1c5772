"""What images a site has: which file belongs to which case and which cases are held out; opens no image.

With an index (CSV files with columns `file`, `case` or `patient`, and perhaps `split`) only the files listed are used.
Without one every file of the modality's formats is; its case is its BIDS subject (`sub-x` in its path) or itself.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from invcoss_common.errors import DataError
from invcoss_common.modality import Modality
from invcoss_site.ingest import FORMATS, suffixes

HELD_OUT = "test"  # the split that is never trained on
SPLITS = ("train", "val", HELD_OUT)
HELD_OUT_SHARE = 0.2  # of the cases, where no split is given
_SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")


@dataclass(frozen=True)
class Item:
    """One image file, its case (patient, slide, ...) and whether that case is held out from training."""

    path: Path
    case: str
    held_out: bool


@dataclass(frozen=True)
class Rejected:
    """A file or index row that is not used; `reason` names it and says what to do. Stays at the site."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Inventory:
    """A site's usable files in a fixed order, and what was rejected before any file was opened."""

    items: tuple[Item, ...]
    rejected: tuple[Rejected, ...]


def take_inventory(data: Path, modality: Modality, index: tuple[str, ...] = ()) -> Inventory:
    """List the images under `data`; raises DataError when there is no folder, no image, or a useless index."""
    endings = suffixes(modality)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; set `data` in site.toml to the folder that holds the images")
    rows = _listed(data, index, endings) if index else _found(data, endings)
    items: list[Item] = []
    rejected: list[Rejected] = []
    for row in rows:
        if isinstance(row, Item):
            items.append(row)
        else:
            rejected.append(row)
    items, clashes = _without_split_cases(items)
    if not index:
        items = _some_held_out(items)
    items.sort(key=lambda item: item.path.relative_to(data).as_posix())
    if not items:
        kind = FORMATS[modality.ndim]
        why = f"; {len(rejected)} entries were rejected, first: {rejected[0].reason}" if rejected else ""
        raise DataError(f"{data}: no {kind} images to use; check the folder and what the plan calls its modality{why}")
    return Inventory(tuple(items), (*rejected, *clashes))


def split_of(case: str) -> bool:
    """Whether `case` is held out when nobody says: by a hash of its name, so that new cases move no old one."""
    return _rank(case) < HELD_OUT_SHARE


def _rank(case: str) -> float:
    return int.from_bytes(hashlib.sha256(case.encode()).digest()[:8], "big") / 2**64


def _some_held_out(items: list[Item]) -> list[Item]:
    """Hold out the case of lowest rank where chance has held out none or all, as it may with few cases."""
    if len({item.held_out for item in items}) != 1:
        return items
    lowest = min((item.case for item in items), key=_rank)
    return [replace(item, held_out=item.case == lowest) for item in items]


def _found(data: Path, endings: tuple[str, ...]) -> Iterator[Item]:
    for path in data.rglob("*"):
        name = path.relative_to(data).as_posix()
        if any(part.startswith(".") for part in PurePosixPath(name).parts) or not path.name.lower().endswith(endings):
            continue
        if path.is_file():
            subject = _SUBJECT.search(name)
            case = f"sub-{subject[1]}" if subject else name
            yield Item(path, case, split_of(case))


def _listed(data: Path, index: tuple[str, ...], endings: tuple[str, ...]) -> Iterator[Item | Rejected]:
    seen: set[str] = set()
    for name in index:
        file = data / name
        for number, row in _rows(file):
            where = f"{file}, row {number}"
            relative = (row.get("file") or "").strip()
            case = (row.get("case") or row.get("patient") or relative).strip()
            split = (row.get("split") or "").strip()
            path = data / relative
            reason = ""
            if not relative:
                reason = "no file is named; fill in the column 'file'"
            elif PurePosixPath(relative).is_absolute() or not path.resolve().is_relative_to(data.resolve()):
                reason = "its file lies outside the data folder; use a path inside it"
            elif not path.name.lower().endswith(endings):
                reason = f"'{relative}' does not end in {', '.join(endings)}; is it of another modality?"
            elif split and split not in SPLITS:
                reason = f"split '{split}' is none of {', '.join(SPLITS)}; correct it"
            elif not path.is_file():
                reason = f"'{relative}' does not exist; copy it, or remove the row"
            if reason:
                yield Rejected(file, f"{where}: {reason}")
            elif relative not in seen or split:
                seen.add(relative)
                yield Item(path, case, split == HELD_OUT if split else split_of(case))


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


def _without_split_cases(items: list[Item]) -> tuple[list[Item], list[Rejected]]:
    """Leave out every case that is in two splits: a model must not be judged on a patient it learned from."""
    sides = {(item.case, item.held_out) for item in items}
    clashing = {case for case, count in Counter(case for case, _ in sides).items() if count > 1}
    kept: dict[Path, Item] = {item.path: item for item in items if item.case not in clashing}
    rejected = {
        item.path: Rejected(item.path, f"{item.path}: its case is in train and test; put every case in one split")
        for item in items
        if item.case in clashing
    }
    return list(kept.values()), list(rejected.values())
