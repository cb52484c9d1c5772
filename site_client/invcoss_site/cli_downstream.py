"""The hospital's commands `finetune` and `probe`: what a pre-trained model is good for, on labelled cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from invcoss_common.command import AsJson, tell
from invcoss_common.errors import DataError, PlanError

if TYPE_CHECKING:
    from invcoss_site.downstream.finetune import Result, Start
    from invcoss_site.downstream.sets.cases import Case
    from invcoss_site.downstream.task import Task
    from invcoss_site.downstream.train import Machine

commands = typer.Typer()

TaskName = Annotated[str | None, typer.Argument(metavar="[TASK]", help="a published task, such as GlaS")]
TaskFile = Annotated[Path | None, typer.Option(metavar="TOML", help="a task of your own, instead of TASK")]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="folder with the task's cases")]
Weights = Annotated[Path, typer.Option(metavar="MODEL", help="model.safetensors of a run")]
RandomInit = Annotated[bool, typer.Option(help="random initial weights of the model's size, to compare with")]
Vocabulary = Annotated[
    Path | None, typer.Option(metavar="FILE", help="of text: a BERT vocab.txt; by default one is learned from the text")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one")]
SEEDS = "0,10,100"


@commands.command()
def finetune(
    weights: Weights,
    task: TaskName = None,
    task_file: TaskFile = None,
    data: Data = None,
    all_tasks: Annotated[bool, typer.Option("--all", help="all nine published tasks, as one table")] = False,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="for --all: holds a folder for each task, by its name")
    ] = None,
    random_init: RandomInit = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="results; the same command goes on there")] = Path(
        "runs/finetune"
    ),
    seeds: Annotated[str, typer.Option(help="runs to average over, as published")] = SEEDS,
    epochs: Annotated[int | None, typer.Option(min=1, help="instead of the published number")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="batches an epoch, instead of the published")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="instead of the published size")] = None,
    lr: Annotated[float | None, typer.Option(min=0, max=1, help="instead of the published rate")] = None,
    validated: Annotated[
        bool, typer.Option(help="LiTS, VS, LA: pick the epoch on a fifth of the training patients")
    ] = False,
    vocabulary: Vocabulary = None,
    device: Device = "auto",
    precision: Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="auto: bf16 on a GPU")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="processes that prepare batches")] = 0,
    keep_mb: Annotated[float, typer.Option(min=0, help="MB of memory to keep cases in that were read")] = 1000.0,
    overlays: Annotated[bool, typer.Option(help="a picture of each segmented test case")] = True,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pre-trained model for a labelled task, test it, and write predictions; nothing is sent."""
    from invcoss_site.downstream.finetune import Start  # here, because they need seconds to import
    from invcoss_site.downstream.table import as_values, markdown, row, terminal_table, write_table
    from invcoss_site.downstream.task import TASKS

    changes = {"epochs": epochs, "iterations": iterations, "batch": batch, "lr": lr}
    if all_tasks:
        if task or task_file or data or data_root is None:
            raise PlanError("--all needs --data-root, and no TASK, --task-file or --data")
        tasks = [_changed(one, changes, validated) for one in TASKS.values()]
        folders = {one.name: _own_folder(one, data_root) for one in tasks}
    else:
        tasks = [_changed(_one_task(task, task_file), changes, validated)]
        if data is None:
            raise PlanError("give --data, the folder with the task's cases")
        folders = {tasks[0].name: data}
    numbers = _seed_numbers(seeds)
    machine = _machine(device, precision, workers, keep_mb)
    start = Start(weights, random_init, vocabulary)
    found = _found(tasks, folders, start)
    results: dict[str, list[Result]] = {}
    for one in tasks:
        if one.name in found:
            results[one.name] = _run(one, found[one.name], start, out / one.name, numbers, machine, overlays)
    rows = {one.name: row(results[one.name]) if one.name in results else None for one in tasks}
    values = as_values(tasks, rows, results)
    note = (
        f"{'Random initial weights' if random_init else 'Pre-trained weights'}, mean of seeds {seeds}, with 95 % "
        f"intervals by bootstrap over the test patients."
    )
    place = out if all_tasks else out / tasks[0].name
    write_table(place, values, markdown(tasks, rows, note))
    if as_json:
        print(json.dumps({"out": str(place), **values}))
        return
    console = Console()
    console.print(terminal_table(tasks, rows))
    for one in tasks:
        if one.name not in results:
            console.print(
                f"{one.title}: no data; there is no folder {folders[one.name]}", highlight=False, soft_wrap=True
            )
    print(f"{place}: table.json, table.md; predictions, checkpoints and tensorboard/ by seed. They stay here.")


@commands.command()
def probe(
    weights: Weights,
    task: TaskName = None,
    task_file: TaskFile = None,
    data: Data = None,
    random_init: RandomInit = False,
    seed: Annotated[int, typer.Option(help="of random weights, and of the intervals")] = 0,
    vocabulary: Vocabulary = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say in minutes what a model's frozen features know of a task's classes, by kNN and by a linear layer."""
    from invcoss_site.downstream.finetune import Start  # here, because they need seconds to import
    from invcoss_site.downstream.probing import probe_task

    one = _one_task(task, task_file)
    if data is None:
        raise PlanError("give --data, the folder with the task's cases")
    cases = _found([one], {one.name: data}, Start(weights, random_init, vocabulary))[one.name]
    start, machine = Start(weights, random_init, vocabulary), _machine(device, "auto", 0, 0.0)
    with _bar() as bar:
        line = bar.add_task("features", total=len(cases), detail="")
        scores = probe_task(
            one, cases, start, machine, seed, lambda done, of: bar.update(line, completed=done, total=of)
        )
    tell(
        as_json,
        {kind: {name: [s.value, s.lo, s.hi] for name, s in each.items()} for kind, each in scores.items()},
        *(
            f"{kind:7s}" + "  ".join(f"{name} {s.value:.3f} ({s.lo:.3f} to {s.hi:.3f})" for name, s in each.items())
            for kind, each in scores.items()
        ),
    )


def _one_task(name: str | None, file: Path | None) -> Task:
    from invcoss_site.downstream.task import load_task_file, published_task

    if (name is None) == (file is None):
        raise PlanError("give exactly one of TASK and --task-file")
    return published_task(name) if name is not None else load_task_file(Path(str(file)))


def _changed(task: Task, changes: dict[str, int | float | None], validated: bool) -> Task:
    """The task with another recipe."""
    given = {name: value for name, value in changes.items() if value is not None}
    changed = task.model_copy(update=given)
    return changed.validated() if validated else changed


def _own_folder(task: Task, root: Path) -> Path:
    """The folder of a task under `root`: its name or title, in any case."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the one that holds a folder for each task")
    names = (task.name, task.title.lower())
    return next((one for one in sorted(root.iterdir()) if one.name.lower() in names), root / task.title)


def _seed_numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise PlanError(f"--seeds {text}: give whole numbers with commas between, such as {SEEDS}") from None
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise PlanError(f"--seeds {text}: give each seed once, and none below 0")
    return numbers


def _machine(device: str, precision: str, workers: int, keep_mb: float) -> Machine:
    import torch

    from invcoss_site.downstream.train import Machine

    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise PlanError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    chosen = torch.device("cuda" if gpu and device != "cpu" else "cpu")
    auto = chosen.type == "cuda" and torch.cuda.is_bf16_supported()
    return Machine(chosen, precision == "bf16" or (precision == "auto" and auto), workers, keep_mb)


def _found(tasks: Sequence[Task], folders: dict[str, Path], start: Start) -> dict[str, tuple[Case, ...]]:
    """The cases of each task that has a folder, if there are several tasks; checks folders and weights before all."""
    from invcoss_site.downstream.finetune import new_model, tokeniser_for
    from invcoss_site.downstream.sets import find_cases

    found: dict[str, tuple[Case, ...]] = {}
    for one in tasks:
        if len(tasks) == 1 or folders[one.name].is_dir():
            found[one.name] = find_cases(one, folders[one.name])
    if not found:
        known = ", ".join(one.title for one in tasks)
        raise DataError(f"no task has data; name the folders in --data-root after the tasks: {known}")
    for one in tasks:
        if one.name in found:
            new_model(one, start, 0, tokeniser_for(one, found[one.name], start))
    return found


def _run(
    task: Task,
    cases: tuple[Case, ...],
    start: Start,
    folder: Path,
    seeds: Sequence[int],
    machine: Machine,
    overlays: bool,
) -> list[Result]:
    """One result a seed, with progress on stderr."""
    from invcoss_site.downstream.finetune import begun, finetune, look_through
    from invcoss_site.downstream.train import Standing

    results = []
    places = [folder / f"seed-{seed}" for seed in seeds]
    with _bar() as bar:
        title = task.title or task.name
        if not any(begun(place) for place in places):
            line = bar.add_task(f"{title}: looking through all cases", total=len(cases), detail="")
            look_through(task, cases, lambda done, of: bar.update(line, completed=done, total=of))
            bar.remove_task(line)
        for seed, place in zip(seeds, places, strict=True):
            line = bar.add_task(f"{title}, seed {seed}", total=None, detail="")

            def on_step(standing: Standing, line=line) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
                unit = "texts" if task.ndim == 1 else "images"
                best = f", best {standing.best:.3f}" if standing.checks else ""
                detail = f"{standing.images_per_s:.1f} {unit}/s, loss {standing.losses[-1]:.3f}{best}"
                bar.update(line, completed=standing.step, total=standing.steps, detail=detail)

            def on_tested(done: int, of: int, line=line, seed=seed) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
                bar.update(line, description=f"{title}, seed {seed}: testing", completed=done, total=of, detail="")

            done = finetune(task, cases, start, place, seed, machine, on_step, on_tested, overlays=overlays)
            results.append(done)
            bar.remove_task(line)
    return results


@contextmanager
def _bar() -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield progress
