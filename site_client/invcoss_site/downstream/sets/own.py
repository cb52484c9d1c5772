"""A site's own task: cases from an index (CSV or JSON lines), or from folders, as its task file says."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from invcoss_common.errors import DataError
from invcoss_site.downstream.sets.cases import SHOWN, SPLITS, Case, split_anew, with_validation
from invcoss_site.downstream.task import TEXT, OwnData, Task
from invcoss_site.ingest.dicom import is_dicom

Row = dict[str, str]


def own_cases(task: Task, data: Path) -> list[Case]:
    """The cases; raises DataError that lists the bad rows of the index by number, or says which folder is wrong.

    Where no row has a split, all cases are split by patient; a validation split that is missing is taken from train.
    """
    assert task.data is not None
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; give the one that the paths of the task file start from")
    if not task.data.index:
        return split_anew(_in_folders(task, task.data, data))
    cases, told = _listed(task, task.data, data)
    return with_validation(cases) if told else split_anew(cases)


def _listed(task: Task, source: OwnData, data: Path) -> tuple[list[Case], bool]:
    """The cases of an index, and whether it says their splits."""
    index = data / source.index
    cases: list[Case] = []
    bad: list[str] = []
    splits: Counter[bool] = Counter()
    for number, row in _rows(index):
        try:
            if not _wanted(source, row):
                continue
            case = _case(task, source, data, row, f"{index.stem}-{number}")
            splits[bool(row.get(source.split))] += 1
            cases.append(replace(case, files=case.files or (index,)))
        except ValueError as error:
            bad.append(f"  row {number}: {error}")
    if bad:
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise DataError("\n".join([f"{index}: {len(bad)} rows can't be used:", *bad[:SHOWN], *more]))
    if not cases:
        raise DataError(f"{index}: no row is left by `folder` and `where` of the task file; correct them")
    if len(splits) == 2:
        raise DataError(f"{index}: column '{source.split}' is empty in {splits[False]} rows; fill in all or none")
    return cases, splits[True] > 0


def _rows(index: Path) -> Iterator[tuple[int, Row]]:
    """The rows of an index as stripped words, by line number."""
    try:
        with index.open(encoding="utf-8-sig", newline="") as file:
            if index.suffix.lower() != ".jsonl":
                reader = csv.DictReader(file, restkey="", restval="")
                for row in reader:
                    yield reader.line_num, {name: str(value or "").strip() for name, value in row.items() if name}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    yield number, {name: str(value).strip() for name, value in row.items() if value is not None}
    except OSError as error:
        raise DataError(f"{index}: can't read the index ({error.strerror}); correct data.index") from None
    except (ValueError, AttributeError, csv.Error) as error:
        raise DataError(f"{index}: not UTF-8 CSV or JSON lines ({error}); save it again") from None


def _wanted(source: OwnData, row: Row) -> bool:
    for column, pattern in source.where.items():
        if not fnmatchcase(_cell(row, column), pattern):
            return False
    folder = source.folder.strip("/")
    return not folder or _cell(row, source.file).startswith(f"{folder}/")


def _cell(row: Row, column: str) -> str:
    if column not in row:
        raise ValueError(f"has no column '{column}', which the task file names")
    return row[column]


def _case(task: Task, source: OwnData, data: Path, row: Row, number: str) -> Case:
    """The case of a row, without files if it is text; raises ValueError with what is wrong and what to do."""
    split = row.get(source.split) or "train"
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is none of {', '.join(SPLITS)}; correct it")
    text, name = "", number
    files: tuple[Path, ...] = ()
    if task.input == TEXT:
        text = _cell(row, source.text)
        if not text:
            raise ValueError("the text is empty; fill it in or remove the row")
        name = row.get("id") or number
    else:
        name = _cell(row, source.file)
        files = _files(_path(data, name, source.file))
    label = mask = None
    if task.kind == "classify":
        label = _label(task, _cell(row, source.label))
    else:
        mask = _path(data, _cell(row, source.mask), source.mask)
    patient = _cell(row, source.patient) if source.patient else name
    if not patient:
        raise ValueError(f"no {source.patient} is named; fill it in")
    return Case(name, patient, split, files, text, label, mask)


def _path(data: Path, name: str, column: str) -> Path:
    if not name:
        raise ValueError(f"column '{column}' is empty; fill it in, or leave the row out with `where`")
    path = data / name
    if not path.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"its {column} lies outside the data folder; use a path inside it")
    if not path.exists():
        raise ValueError(f"'{name}' does not exist; copy it, or remove the row")
    return path


def _files(path: Path) -> tuple[Path, ...]:
    """The file itself, or the DICOM slices in a folder."""
    if not path.is_dir():
        return (path,)
    slices = tuple(sorted(one for one in path.iterdir() if is_dicom(one)))
    if not slices:
        raise ValueError(f"'{path.name}' is a folder without DICOM files; name a file")
    return slices


def _label(task: Task, name: str) -> int:
    if name not in task.classes:
        raise ValueError(f"its label ({name or 'none'}) is not one of {', '.join(task.classes)}; correct it")
    return task.classes.index(name)


def _in_folders(task: Task, source: OwnData, data: Path) -> list[Case]:
    """The cases of a pattern of images; each is a patient of its own."""
    images = sorted(path for path in data.glob(source.images) if path.is_file() and not path.name.startswith("."))
    if not images:
        raise DataError(f"{data}: no file matches '{source.images}'; correct data.images of the task file")
    return [_in_folder(task, source, data, path) for path in images]


def _in_folder(task: Task, source: OwnData, data: Path, path: Path) -> Case:
    name = path.relative_to(data).as_posix()
    try:
        if task.kind == "classify":
            return Case(name, name, "train", (path,), label=_label(task, path.parent.name))
        stem = path.name.partition(".")[0]
        return Case(name, name, "train", (path,), mask=_path(data, source.masks.format(stem=stem), "masks"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
