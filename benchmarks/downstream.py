"""What pre-training is good for: eight real tasks, fine-tuned from a pre-trained model and from random weights.

    python benchmarks/downstream.py --data DIR [--weights model.safetensors]

DIR holds the folders xray, ct, mri, pathology and text that the task files of plans/tasks/ are for. Without --weights
the model of plans/real-small.toml is made first. Every run is kept in --cells and gone on with, so the command may be
stopped, and several may work on different --tasks; the measurement is written by the one that finds all runs done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from invcoss_common.canonical import sha256_file
from invcoss_common.seeds import derive_seed
from invcoss_site.downstream.finetune import Result, Start, finetune
from invcoss_site.downstream.metrics import Score, Scorer, difference, with_interval
from invcoss_site.downstream.probing import probe_task
from invcoss_site.downstream.sets import find_cases
from invcoss_site.downstream.sets.cases import SPLITS, Case, of_split
from invcoss_site.downstream.table import COLUMNS, UP, mean_over_seeds
from invcoss_site.downstream.task import SEEDS, TEXT, Task, load_task_file
from invcoss_site.downstream.train import Machine
from measurement import MEASUREMENTS, ROOT, write_measurement

PLAN, TASK_FILES = ROOT / "plans/real-small.toml", ROOT / "plans/tasks"
LR, EPOCHS = 1e-3, 10  # for all tasks; it falls epoch by epoch
STEPS = {"text": 600, "classify": 200, "segment": 100}  # a table of tokens begins with nothing
# Sizes near those of pre-training, so that the whole table takes minutes; the task files have the larger ones.
SMALLER: dict[str, dict[str, object]] = {
    "ct-lungs": {"size": (16, 32, 32), "spacing_mm": (4.0, 8.0, 8.0), "batch": 4},
    "ct-regions": {"size": (16, 48, 48), "batch": 8},
    "hippocampus": {"size": (16, 32, 32), "batch": 4},
    "lung-tissue": {"size": (64, 64), "batch": 32},
    "nuclei": {"size": (128, 128), "batch": 4},
    "sentence-roles": {"size": (48,), "batch": 32, "vocabulary": 4096},
    "xray-lungs": {"size": (128, 128), "batch": 4},
    "xray-pneumonia": {"size": (64, 64), "batch": 16},
}
STARTS = ("pretrained", "random_init")
DRAWS = 2000

Runs = dict[str, dict[str, list[Result]]]  # by task and start, one a seed


def tasks() -> list[Task]:
    found = [load_task_file(path) for path in sorted(TASK_FILES.glob("*.toml"))]
    return [
        task.model_copy(
            update={
                "lr": LR,
                "epochs": EPOCHS,
                "iterations": STEPS[TEXT if task.input == TEXT else task.kind] // EPOCHS,
                "picked": "last",
                "flips": False,
                **SMALLER[task.name],
            }
        )
        for task in found
    ]


def pretrain(data: Path, out: Path) -> Path:
    """The model of the plan, made on the training images; the same folder goes on."""
    code = "from invcoss_server.cli import main; main()"
    command = ["simulate", str(PLAN), "--data", str(data), "--out", str(out)]
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    return out / "model.safetensors"


def fine_tuned(task: Task, cases: Sequence[Case], start: Start, folder: Path, machine: Machine) -> list[Result]:
    """A result a seed."""
    results = []
    for seed in SEEDS:
        done = finetune(task, cases, start, folder / f"seed-{seed}", seed, machine, overlays=False)
        values = ", ".join(f"{name} {value[0]:.3f}" for name, value in done.scores.items() if value[0])
        print(
            f"{task.name}, {folder.name}, seed {seed}: {values}; {done.train_seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        results.append(done)
    return results


def overall(result: Scorer) -> Scorer:
    """One score of a task: the mean of those that should be high."""

    def score(weights: np.ndarray) -> dict[str, float]:
        found = result(weights)
        return {"up": float(np.mean([found[name] for name in UP if name in found]))}

    return score


def gain(runs: Runs) -> tuple[Score, np.ndarray]:
    """Pre-trained minus random, mean over tasks, with a 95 % interval; and that of each task and seed (T, S).

    The interval is by bootstrap of three levels: tasks, then seeds of each, then test patients, the same for both.
    """
    random = np.random.default_rng(derive_seed(0, "gain"))
    pairs = [
        [
            difference(overall(a.scorer), overall(b.scorer))
            for a, b in zip(*(by[start] for start in STARTS), strict=True)
        ]
        for by in runs.values()
    ]
    people = [np.unique(by["pretrained"][0].patients, return_inverse=True)[1] for by in runs.values()]
    each = np.array([[pair(np.ones(len(of)))["up"] for pair in seeds] for seeds, of in zip(pairs, people, strict=True)])
    drawn = []
    for _ in range(DRAWS):
        values = []
        for chosen in random.integers(len(pairs), size=len(pairs)):
            seeds, of = pairs[chosen], people[chosen]
            count = int(of.max()) + 1
            weights = np.bincount(random.integers(count, size=count), minlength=count)[of].astype(float)
            seed = random.integers(len(seeds), size=len(seeds))
            values.append(np.mean([seeds[number](weights)["up"] for number in seed]))
        drawn.append(np.nanmean(values))
    lo, hi = np.nanpercentile(drawn, (2.5, 97.5))
    return Score(float(each.mean()), float(lo), float(hi)), each


def probes(task: Task, cases: Sequence[Case], weights: Path, machine: Machine) -> dict[str, dict[str, float]]:
    """Scores by start, as `knn_acc` and so on, means of the seeds."""
    found = {}
    for start in STARTS:
        origin = Start(weights, random_init=start == "random_init")
        seeds = SEEDS if origin.random_init else SEEDS[:1]
        scores = [probe_task(task, cases, origin, machine, seed) for seed in seeds]
        found[start] = {
            f"{kind}_{name}": float(np.mean([one[kind][name].value for one in scores]))
            for kind in scores[0]
            for name in scores[0][kind]
        }
    return found


def suffix(start: str) -> str:
    return "" if start == "pretrained" else "_random_init"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(score: Score, factor: float, sign: str = "") -> str:
    return f"{score.value * factor:{sign}.1f} ({score.lo * factor:{sign}.1f} to {score.hi * factor:{sign}.1f})"


def page(
    known: Sequence[Task],
    counts: dict[str, list[int]],
    scores: dict[str, dict[str, dict[str, Score]]],
    mean_gain: Score,
    each: np.ndarray,
    probed: dict[str, dict[str, dict[str, float]]],
) -> str:
    lines = []
    for task in known:
        for name in [name for name in COLUMNS if name in scores[task.name]["pretrained"]]:
            head, factor = COLUMNS[name]
            values = [shown(scores[task.name][start][name], factor) for start in STARTS]
            lines.append([task.title, head, *values, shown(scores[task.name]["difference"][name], factor, "+")])
    gain_head = ["task", "cases train / val / test", "input", "batch"]
    gain_head += [f"seed {seed}" for seed in SEEDS]
    gains = [
        [task.title, " / ".join(map(str, counts[task.name])), "x".join(map(str, task.size)), task.batch]
        + [f"{value * 100:+.1f}" for value in row]
        for task, row in zip(known, each, strict=True)
    ]
    helped = "helps" if mean_gain.lo > 0 else "harms" if mean_gain.hi < 0 else "is not shown to help or harm"
    knn = [
        [next(task.title for task in known if task.name == name), kind, *(f"{by[s][kind] * 100:.1f}" for s in STARTS)]
        for name, by in probed.items()
        for kind in by["pretrained"]
    ]
    return f"""# Eight downstream tasks, from pre-trained and from random weights

Nano models. Pre-trained: by `plans/real-small.toml` (X-ray, CT, MRI, pathology, one after the other, with synthetic
replay). The same heads on random initial weights, with the same seeds and batches. This is a comparison at a small
scale, not the published recipe: {STEPS["classify"]} steps to classify images, {STEPS["text"]} for sentences and
{STEPS["segment"]} to segment, at a learning rate that falls from {LR:g}, with small inputs and no mirror images; the
last weights are tested. Nothing is chosen on validation or test cases; two recipes that were tried before are in
[docs/LOG.md](../LOG.md).

    python benchmarks/downstream.py --data DIR

Pre-trained minus random, mean over tasks of the mean of what should be high (ACC, AUC and F1, or Dice):
**{shown(mean_gain, 100, "+")} points**. At this scale pre-training {helped} on average. The interval is by bootstrap of
three levels: tasks, seeds of each task, test patients of each task, the same for both models.

Sentence roles: the plan has no text stage. What is reused there is the trunk alone, trained on images, behind a
random table of tokens.

Nuclei: the tiles are split anew by patient, as their own split leaves no test cases here; pre-training therefore saw
the test tiles, without their masks. No other test image was seen in it. CT segmentation has one test volume and CT
classification few test patients: their intervals say little. The lung masks were made by programs, not by experts.

## By task

Means of the seeds {", ".join(map(str, SEEDS))}, with 95 % intervals by bootstrap over the test patients; differences on
the same patients.

{table(["task", "metric", "pre-trained", "random", "difference"], lines)}

## Pre-trained minus random by seed, in points

{table(gain_head, gains)}

## Frozen features

Probes of the mean token, without fine-tuning; random weights as the mean of {len(SEEDS)} seeds. In %.

{table(["task", "probe", "pre-trained", "random"], knn)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with xray, ct, mri, pathology and text")
    parser.add_argument("--weights", type=Path, help="pre-trained model.safetensors; by default it is made")
    parser.add_argument("--cells", type=Path, default=Path("runs/downstream"), help="where finished runs are kept")
    parser.add_argument("--tasks", help="names with commas between; by default all")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    say = Console(stderr=True).print
    machine = Machine(torch.device("cpu"), keep_mb=1000)
    weights = asked.weights or pretrain(asked.data, asked.cells / "model")
    known = tasks()
    chosen = asked.tasks.split(",") if asked.tasks else [task.name for task in known]
    cases = {task.name: find_cases(task, asked.data / task.input) for task in known}
    runs: Runs = {}
    for task in known:
        if task.name not in chosen:
            continue
        runs[task.name] = {
            start: fine_tuned(
                task,
                cases[task.name],
                Start(weights, random_init=start == "random_init"),
                asked.cells / task.name / start,
                machine,
            )
            for start in STARTS
        }
    if len(runs) < len(known):
        say(f"{len(runs)} of {len(known)} tasks done; run it without --tasks for the measurement")
        return
    classified = [task for task in known if task.kind == "classify" and task.input != TEXT]
    probed = {task.name: probes(task, cases[task.name], weights, machine) for task in classified}
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    for name, by in runs.items():
        scorers = {start: mean_over_seeds([one.scorer for one in by[start]]) for start in STARTS}
        scorers["difference"] = difference(scorers["pretrained"], scorers["random_init"])
        scores[name] = {what: with_interval(scorer, by["pretrained"][0].patients) for what, scorer in scorers.items()}
    mean_gain, each = gain(runs)
    figures = {
        f"{task}_{metric}{suffix(start)}": score.value
        for task, by in scores.items()
        for start in STARTS
        for metric, score in by[start].items()
    }
    figures |= {
        f"{task}_{metric}{suffix(start)}": value
        for task, by in probed.items()
        for start in STARTS
        for metric, value in by[start].items()
    }
    figures |= {
        "pretrained_minus_random_mean": mean_gain.value,
        "pretrained_minus_random_mean_lo": mean_gain.lo,
        "pretrained_minus_random_mean_hi": mean_gain.hi,
    }
    counts = {name: [len(of_split(found, split)) for split in SPLITS] for name, found in cases.items()}
    config: dict[str, object] = {
        "tasks": {task.name: task.model_dump(mode="json", exclude={"data"}) for task in known},
        "seeds": SEEDS,
        "weights_sha256": sha256_file(weights),
        "draws": DRAWS,
    }
    raw = {
        "scores": {
            task: {what: {k: [s.value, s.lo, s.hi] for k, s in by.items()} for what, by in each_of.items()}
            for task, each_of in scores.items()
        },
        "seeds": {
            task: {
                start: [
                    {"seed": one.seed, "seconds": one.train_seconds, "validation": one.validation, "scores": one.scores}
                    for one in by[start]
                ]
                for start in STARTS
            }
            for task, by in runs.items()
        },
        "gain": dict(zip(runs, each.tolist(), strict=True)),
        "cases": counts,
        "probes": probed,
    }
    markdown = page(known, counts, scores, mean_gain, each, probed)
    say(write_measurement("downstream", figures, config, raw, markdown, asked.out))


if __name__ == "__main__":
    main()
