"""Which cases a task has: one plain function a published set, and one for a site's own; all give the same `Case`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from invcoss_site.downstream.sets.cases import Case, checked, with_validation
from invcoss_site.downstream.sets.layouts import wrong_folder
from invcoss_site.downstream.sets.own import own_cases
from invcoss_site.downstream.sets.planes import chestxr, glas, nct_crc_he, pubmed20k, qatav2
from invcoss_site.downstream.sets.volumes import la, lits, ricord, vs
from invcoss_site.downstream.task import Task

PUBLISHED: dict[str, Callable[[Path], list[Case]]] = {
    "pubmed20k": pubmed20k,
    "chestxr": chestxr,
    "qatav2": qatav2,
    "ricord": ricord,
    "lits": lits,
    "vs": vs,
    "la": la,
    "nct-crc-he": nct_crc_he,
    "glas": glas,
}


def find_cases(task: Task, data: Path) -> tuple[Case, ...]:
    """The cases of a task in the folder `data`, in a fixed order. Raises DataError that shows the expected layout, or
    names the file or row that is wrong.

    LiTS, VS and LA have no validation cases as published. If the epoch is nevertheless to be picked on some
    (`task.validated()`), they are a fifth of the training patients.
    """
    if task.data is not None:
        return checked(task, own_cases(task, data), data)
    if not data.is_dir():
        raise wrong_folder(task.name, data, "there is no such folder")
    cases = PUBLISHED[task.name](data)
    return checked(task, with_validation(cases) if task.picked == "best" else cases, data)
