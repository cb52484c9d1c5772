"""What every set gives: cases with their split, patient and truth, as paths, and what all must obey."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import DataError
from invcoss_site.downstream.task import Task

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = {"val": 0.2, "test": 0.2}  # of the patients, where nobody says
SHOWN = 5  # lines of a long list in a message


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled input. `files` are its image (of a series, the slices), or the file that holds its `text`.

    `label` is the class's number, to classify; `mask` is a file, to segment, and the image's own if that holds both.
    """

    id: str
    patient: str
    split: Split
    files: tuple[Path, ...]
    text: str = ""
    label: int | None = None
    mask: Path | None = None


def of_split(cases: Iterable[Case], split: Split) -> list[Case]:
    return [case for case in cases if case.split == split]


def checked(task: Task, cases: Sequence[Case], data: Path) -> tuple[Case, ...]:
    """The cases as they are; raises DataError for an id or patient in two places, a label out of range, an empty split.

    `data` is the folder, for messages.
    """
    ids: dict[str, Case] = {}
    home: dict[str, Case] = {}
    for case in cases:
        at = case.files[0]
        other = home.setdefault(case.patient, case)
        if other.split != case.split:
            raise DataError(
                f"{at}: patient {case.patient} is in {case.split} and, with {other.files[0]}, in {other.split}; "
                f"put all that is of one patient into one split"
            )
        if case.id in ids:
            raise DataError(f"{at}: {case.id} is also in {ids[case.id].files[0]}; every case needs its own name")
        if task.kind == "classify" and (case.label is None or not 0 <= case.label < len(task.classes)):
            raise DataError(f"{at}: label {case.label} is outside 0 to {len(task.classes) - 1}; correct it")
        if task.kind == "segment" and case.mask is None:
            raise DataError(f"{at}: has no mask; add it or leave the image out")
        ids[case.id] = case
    needed: list[Split] = ["train", "test"] if task.picked == "last" else ["train", "val", "test"]
    for split in needed:
        if not of_split(cases, split):
            raise DataError(f"{data}: no case in {split}; check the split lists, or the column that says the split")
    return tuple(cases)


def by_patient(cases: Sequence[Case], shares: dict[Split, float]) -> list[Case]:
    """The cases with these shares of their patients, at least one, in other splits; the rest stays in train.

    Which patients is decided by a hash of their names, so that it is the same everywhere and at any time.
    """
    ranked = sorted({case.patient for case in cases}, key=_rank)
    home: dict[str, Split] = {}
    for split, share in shares.items():
        count = max(1, round(share * len(ranked)))
        start = len(home)
        home.update(dict.fromkeys(ranked[start : start + count], split))
    return [replace(case, split=home.get(case.patient, "train")) for case in cases]


def with_validation(cases: Sequence[Case]) -> list[Case]:
    """The cases with a fifth of the patients of train in val, where no case is in val."""
    if of_split(cases, "val"):
        return list(cases)
    moved = {case.id: case for case in by_patient(of_split(cases, "train"), {"val": SHARES["val"]})}
    return [moved.get(case.id, case) for case in cases]


def split_anew(cases: Sequence[Case]) -> list[Case]:
    """The cases split by patient as `SHARES` says."""
    return by_patient(cases, {"test": SHARES["test"], "val": SHARES["val"]})


def first_part(names: Sequence[str], share: float = 0.8) -> set[str]:
    """The published cut: the first four fifths in the order given, rounded down."""
    return set(names[: int(share * len(names))])


def write_splits(folder: Path, cases: Iterable[Case]) -> None:
    """The ids of each split in `folder`/{train,val,test}.txt, one a line, for whoever wants to repeat a run."""
    for split in SPLITS:
        lines = [f"{case.id}\n" for case in of_split(cases, split)]
        write_atomic(folder / f"{split}.txt", "".join(lines).encode())


def _rank(patient: str) -> bytes:
    return hashlib.sha256(patient.encode()).digest()


def read_list(path: Path) -> list[list[str]]:
    """The words of each line that is not blank; raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as a list of names ({error}); copy it again") from None
    return [words for line in lines if (words := line.split())]


def existing(path: Path, named_in: Path) -> Path:
    """`path`, or DataError that says which list names it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, though {named_in} names it; copy it, or correct the list")
    return path


def some(names: Iterable[object]) -> str:
    """The first few of `names`, for a message."""
    words = [str(name) for name in names]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
