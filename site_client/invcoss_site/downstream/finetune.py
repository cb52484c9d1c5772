"""One fine-tuning from cases to a result: tokeniser, model, training, test, predictions, all in one folder.

A folder holds run.json (its settings), the checkpoints, tensorboard/, predictions/ and, once done, result.json. It
names patients and cases: it stays at the site. K = classes, N = cases, S = shape of one image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from invcoss_common.canonical import canonical_json, sha256_file, sha256_hex, write_atomic
from invcoss_common.errors import DataError, PlanError, UnreadableFile
from invcoss_site.downstream.inference import segment
from invcoss_site.downstream.metrics import Scorer, classification_scorer, dice, mask_scores, mean_scorer, with_interval
from invcoss_site.downstream.model import OnTask, task_model, trunk
from invcoss_site.downstream.predictions import Masks, cleaned, file_name, write_classes, write_masks, write_overlay
from invcoss_site.downstream.reading import Example, Reader, TaskBatches
from invcoss_site.downstream.sets.cases import Case, of_split, some, write_splits
from invcoss_site.downstream.task import TEXT, Task
from invcoss_site.downstream.train import LAST, Machine, Standing, fit
from invcoss_site.downstream.words import read_tokeniser, train_tokeniser, write_tokeniser

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SETTINGS, RESULT, TOKENISER, PREDICTIONS = "run.json", "result.json", "tokeniser.json", "predictions"
SHOWN = 5  # bad files in a message


@dataclass(frozen=True)
class Start:
    """Where the first weights come from: the file of a pre-trained model, or by chance for a model of its size."""

    weights: Path
    random_init: bool = False
    vocabulary: Path | None = None  # of text: a BERT vocab.txt or a tokeniser's JSON; none: trained on the task's text


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseResult(_Kept):
    """A test case with its true class and the probability of each, or with the scores of its masks."""

    id: str
    patient: str
    label: int | None = None
    probabilities: tuple[float, ...] = ()
    scores: dict[str, float] = {}


class Result(_Kept):
    """What came of one fine-tuning. `scores` are value, lower and upper end of the interval; null is not defined.

    `validation` is the score that its weights were picked by (`train.total`), if they were.
    """

    task: str
    seed: int
    random_init: bool
    lr: float
    steps: int
    picked_step: int
    validation: float | None
    train_seconds: float
    images_per_s: float
    scores: dict[str, tuple[float | None, float | None, float | None]]
    cases: tuple[CaseResult, ...]

    @property
    def scorer(self) -> Scorer:
        if self.cases[0].label is None:
            return mean_scorer([case.scores for case in self.cases])
        labels = [case.label if case.label is not None else -1 for case in self.cases]
        return classification_scorer([case.probabilities for case in self.cases], labels)

    @property
    def patients(self) -> list[str]:
        return [case.patient for case in self.cases]


def finetune(
    task: Task,
    cases: Sequence[Case],
    start: Start,
    folder: Path,
    seed: int,
    machine: Machine,
    on_progress: Callable[[Standing], None] = lambda _standing: None,
    on_tested: Callable[[int, int], None] = lambda _done, _of: None,
    *,
    overlays: bool = True,
) -> Result:
    """Train, pick, test and write the predictions of one seed into `folder`; one that is done there is only read.

    `overlays` are pictures of segmented cases, about three a second.

    A folder of an interrupted run is gone on with. Raises PlanError if it holds a run with other settings, and what
    reading the cases and the weights raises.
    """
    _same_settings(folder, task, cases, start, seed)
    if (folder / RESULT).exists():
        return Result.model_validate_json((folder / RESULT).read_bytes())
    tokeniser = tokeniser_for(task, cases, start)
    model = new_model(task, start, seed, tokeniser).to(machine.device)
    if tokeniser:
        write_tokeniser(folder / TOKENISER, tokeniser)
    write_splits(folder / "splits", cases)
    read = Reader(task, tokeniser, machine.keep_mb / (1 + machine.workers))
    validation = of_split(cases, "val")

    def validate(model: OnTask) -> dict[str, float]:
        return _validated(model, validation, read, machine)

    standing = fit(
        model,
        TaskBatches(task, of_split(cases, "train"), seed, read),
        folder,
        machine,
        validate=validate if task.picked == "best" else None,
        on_progress=on_progress,
    )
    tested = _test(model, of_split(cases, "test"), read, machine, folder / PREDICTIONS, on_tested, overlays)
    result = Result(
        task=task.name,
        seed=seed,
        random_init=start.random_init,
        lr=task.lr,
        steps=standing.steps,
        picked_step=standing.best_step or standing.steps,
        validation=standing.best if standing.best_step else None,
        train_seconds=standing.train_seconds,
        images_per_s=standing.images_per_s,
        scores={},
        cases=tuple(tested),
    )
    scores = with_interval(result.scorer, result.patients)
    result = result.model_copy(
        update={"scores": {name: tuple(map(_defined, (s.value, s.lo, s.hi))) for name, s in scores.items()}}
    )
    write_atomic(folder / RESULT, result.model_dump_json(indent=1).encode())
    return result


def look_through(task: Task, cases: Sequence[Case], on_item: Callable[[int, int], None]) -> None:
    """Read every case once, so that a bad one is known before hours of training; raises DataError that lists them."""
    bad: list[str] = []
    for number, case in enumerate(cases if task.input != TEXT else (), start=1):
        try:
            Reader(task)(case)
        except UnreadableFile as error:
            bad.append(str(error))
        on_item(number, len(cases))
    if len(bad) == 1:
        raise DataError(bad[0])
    if bad:
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        lines = "\n".join(f"  {text}" for text in bad[:SHOWN])
        raise DataError(f"{task.name}: {len(bad)} of {len(cases)} cases can't be used:\n{lines}{more}")


def begun(folder: Path) -> bool:
    """Whether a run in this folder got so far that its cases were looked through."""
    return (folder / LAST).exists() or (folder / RESULT).exists()


def tokeniser_for(task: Task, cases: Sequence[Case], start: Start) -> Tokenizer | None:
    """The tokeniser of a text task: the one that was given, or one trained on the training split."""
    if task.input != TEXT:
        return None
    if start.vocabulary:
        return read_tokeniser(start.vocabulary)
    return train_tokeniser((case.text for case in of_split(cases, "train")), task.vocabulary)


def new_model(task: Task, start: Start, seed: int, tokeniser: Tokenizer | None) -> OnTask:
    """The model before its first step. Raises WeightsError or DataError if the weights don't fit the task."""
    model = trunk(start.weights, random_init=start.random_init, seed=seed)
    return task_model(task, model, tokeniser.get_vocab_size() if tokeniser else 0, start.weights, seed)


def _same_settings(folder: Path, task: Task, cases: Sequence[Case], start: Start, seed: int) -> None:
    """Write down what the run is, or raise PlanError if the folder has another one."""
    splits = [[case.id, case.patient, case.split, case.label] for case in cases]
    asked = {
        "task": task.model_dump(mode="json"),
        "seed": seed,
        "weights": sha256_file(start.weights),
        "random_init": start.random_init,
        "vocabulary": sha256_file(start.vocabulary) if start.vocabulary else None,
        "cases": sha256_hex(canonical_json(splits)),
    }
    path = folder / SETTINGS
    if not path.exists():
        write_atomic(path, (json.dumps(asked, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise PlanError(f"{path}: damaged; give another --out, or remove {folder}") from None
    if other := [name for name in asked if found.get(name) != asked[name]]:
        raise PlanError(f"{folder}: holds a run with other {some(other)}; give another --out, or remove it")


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _validated(model: OnTask, cases: Sequence[Case], read: Reader, machine: Machine) -> dict[str, float]:
    """Scores of validation cases; masks without mirror images and without distances, which take long."""
    task = model.task
    if task.kind == "classify":
        scorer = classification_scorer(probabilities(model, cases, read, machine), [case.label or 0 for case in cases])
        return scorer(np.ones(len(cases)))
    each = []
    for case in cases:
        example = read(case)
        found, truth = predicted(model, example, machine, flips=False), example.target.numpy() > 0.5
        each += [dice(p, t, plus_one=task.dice_plus_one) for p, t in zip(found, truth, strict=True)]
    return {"dice": float(np.mean(each))}


@torch.no_grad()
def probabilities(model: OnTask, cases: Sequence[Case], read: Reader, machine: Machine) -> Tensor:
    """Of each class, (N, K) on the CPU."""
    model.eval()
    found = []
    for batch in batched_inputs(cases, read, model.task.batch):
        with machine.autocast():
            found.append(model(batch.to(machine.device)).float().softmax(dim=1).cpu())
    return torch.cat(found)


def batched_inputs(cases: Sequence[Case], read: Reader, size: int) -> Iterable[Tensor]:
    """The inputs of the cases, in order, `size` at a time."""
    for first in range(0, len(cases), size):
        yield torch.stack([read(case).image for case in cases[first : first + size]])


def predicted(model: OnTask, example: Example, machine: Machine, *, flips: bool) -> Masks:
    """Masks (K, *S) of one case, after what the task does to them."""
    task = model.task
    with machine.autocast():
        found = segment(model, example.image[None], task.size, overlap=task.overlap, flips=flips)
    return cleaned(task, found[0].numpy() > 0.5)


def _test(
    model: OnTask,
    cases: Sequence[Case],
    read: Reader,
    machine: Machine,
    folder: Path,
    on_tested: Callable[[int, int], None],
    overlays: bool,
) -> list[CaseResult]:
    """Predict the test cases, write that down in `folder`, and give what they are scored by."""
    task = model.task
    if task.kind == "classify":
        found = probabilities(model, cases, read, machine)
        write_classes(folder / "classes.csv", task, cases, found)
        return [
            CaseResult(id=case.id, patient=case.patient, label=case.label, probabilities=tuple(row))
            for case, row in zip(cases, found.tolist(), strict=True)
        ]
    tested = []
    for number, case in enumerate(cases, start=1):
        example = read(case)
        masks = predicted(model, example, machine, flips=task.flips)
        write_masks(folder / "masks", task, case, example, masks)
        if overlays:
            write_overlay(folder / "overlays" / f"{file_name(case)}.png", task, case, example, masks)
        truth = example.target.numpy() > 0.5
        scores = mask_scores(masks, truth, task.classes, example.spacing_mm, plus_one=task.dice_plus_one)
        tested.append(CaseResult(id=case.id, patient=case.patient, scores=scores))
        on_tested(number, len(cases))
    return tested
