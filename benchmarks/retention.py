"""Retention: how much each way of replaying earlier modalities keeps, on one plan, one trainer and one list of seeds.

    python benchmarks/retention.py --plan plans/real-small.toml --data DIR \\
        --methods finetune,mnoise,real5,invcoss --seeds 3

Every trained stage is kept under --work, so that an interrupted benchmark goes on where it stood, and methods or seeds
may be added later. --jobs runs are trained side by side, one process each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from invcoss_common.canonical import write_atomic
from invcoss_common.config import Plan, load_plan
from invcoss_common.modality import SIZES, Geometry
from invcoss_common.model import MultiModalMAE, build_model
from invcoss_common.pools import pool_from_bytes, pool_to_bytes
from invcoss_common.seeds import derive_seed, generator_for
from invcoss_common.statistics import record_statistics
from invcoss_common.weights import model_from_bytes, model_to_bytes
from invcoss_server.inversion import invert
from invcoss_server.pool import contact_sheet, slices_sheet
from invcoss_site.batches import whole_images
from invcoss_site.evaluate import heldout_loss
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import SiteImages, prepare
from invcoss_site.replay import ReplayPool, rehearsal
from invcoss_site.simulated import simulated_home
from invcoss_site.trainer import train
from measurement import stem, write_measurement

Pixels = npt.NDArray[np.uint8]
REAL_SHARE = 0.05  # of the training images, the buffer of ER and MedCoSS


@dataclass(frozen=True)
class Stage:
    """What one stage needs beside the model: its images, geometry and the plan it is part of."""

    plan: Plan
    number: int
    images: SiteImages

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry(self.number)

    @property
    def name(self) -> str:
        return self.plan.stages[self.number].modality


def no_buffer(stage: Stage, model: MultiModalMAE, folder: Path) -> Pixels | None:
    """Plain fine-tuning: nothing is kept."""
    return None


def mean_noise(stage: Stage, model: MultiModalMAE, folder: Path) -> Pixels:
    """The control of the lab: independent Gaussian pixels around the mean image, with the SD image as their spread."""
    mean, square, count = 0.0, 0.0, 0
    for batch in whole_images(stage.images.train, stage.geometry, 256):
        mean, square, count = mean + batch.double().sum(0), square + batch.double().square().sum(0), count + len(batch)
    mean, square = mean / count, square / count
    spread = (square - mean**2).clamp_min(0).sqrt()
    random = generator_for(stage.plan.seed, "mnoise", stage.number)
    noise = torch.randn(stage.plan.inversion.pool_size, *mean.shape, generator=random)
    return ((mean + spread * noise).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def real_images(stage: Stage, model: MultiModalMAE, folder: Path) -> Pixels:
    """5 % of the real training images, drawn at random: what InvCoSS must do without."""
    images = torch.cat(list(whole_images(stage.images.train, stage.geometry, 256)))
    random = generator_for(stage.plan.seed, "real5", stage.number)
    rows = torch.randperm(len(images), generator=random)[: real_count(len(images))]
    return (images[rows] * 255).round().to(torch.uint8).numpy()


def real_count(images: int) -> int:
    return max(2, round(REAL_SHARE * images))


def inverted(stage: Stage, model: MultiModalMAE, folder: Path) -> Pixels:
    """The coordinator's pool: inversion of the model and the statistics of its stage."""
    plan = stage.plan
    shipped = record_statistics(
        model,
        whole_images(stage.images.train, stage.geometry, plan.evaluate.batch_size),
        stage.geometry,
        plan.train.mask_ratio,
        seed=derive_seed(plan.seed, "statistics", stage.number),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return invert(
        model,
        shipped,
        stage.geometry,
        plan.inversion,
        mask_ratio=plan.train.mask_ratio,
        seed=derive_seed(plan.seed, "inversion", stage.number),
        folder=folder,
    )


@dataclass(frozen=True)
class Method:
    """What is kept of a finished stage, and by which loss it is rehearsed."""

    buffer: Callable[[Stage, MultiModalMAE, Path], Pixels | None]
    loss: str
    meaning: str
    noise: bool = True  # whether the plan's replay noise is added, under distillation


METHODS = {
    "finetune": Method(no_buffer, "distil", "no replay"),
    # Noise on noise makes the control worse (docs/LOG.md, 2026-11-24), so it goes without.
    "mnoise": Method(
        mean_noise, "distil", "Gaussian around mean and SD image; latents and predictions distilled", False
    ),
    "real5": Method(real_images, "published", "5 % real images; masked modelling and latent distillation (MedCoSS)"),
    "real5-distil": Method(real_images, "distil", "5 % real images; latents and predictions distilled"),
    "invcoss": Method(inverted, "distil", "inverted pool; latents and predictions distilled (the default)"),
    "invcoss-published": Method(inverted, "published", "inverted pool; masked modelling and latent distillation"),
}

Matrix = dict[str, dict[str, float]]  # after stage -> modality -> held-out loss


def run(base: Plan, data: Path | None, work: Path, name: str, count: int) -> tuple[Matrix, float]:
    """Train the first `count` stages with one method: the held-out losses after each stage, and the seconds it took."""
    method, folder = METHODS[name], work / f"seed{base.seed}"
    stages = [Stage(base, number, images) for number, images in enumerate(site_images(base, data, work))]
    model: MultiModalMAE | None = None
    pools: list[ReplayPool] = []
    matrix: Matrix = {}
    started = time.monotonic()
    for stage in stages[:count]:
        # Nothing is replayed in the first stage, so all methods share it.
        here = folder / ("first" if stage.number == 0 else name) / f"stage{stage.number}"
        model = trained(stage, model, pools, method, here)
        matrix[stage.name] = losses(stages[: stage.number + 1], model, here)
        if stage.number + 1 < count:
            kept = buffer_of(stage, model, method, folder / name / f"buffer{stage.number}")
            pools += [ReplayPool(kept, stage.geometry)] if kept is not None else []
    return matrix, time.monotonic() - started


def trained(
    stage: Stage, before: MultiModalMAE | None, pools: list[ReplayPool], method: Method, folder: Path
) -> MultiModalMAE:
    plan, file = stage.plan, folder / "model.safetensors"
    shape = SIZES[plan.size].model
    families = [plan.geometry(number) for number in range(len(plan.stages))]
    if file.exists():
        return model_from_bytes(file.read_bytes(), shape, families)
    seed = derive_seed(plan.seed, "stage", stage.number)
    rehearse = None
    if before is not None and pools:
        rehearse = rehearsal(
            model_from_bytes(model_to_bytes(before), shape, families),
            pools,
            plan.replay.model_copy(update={"loss": method.loss} | ({} if method.noise else {"noise": 0.0})),
            batch_size=plan.train.batch_size,
            mask_ratio=plan.train.mask_ratio,
            seed=seed,
        )
    model = before or build_model(shape, families, derive_seed(plan.seed, "model"))
    model.requires_grad_(True)
    train(
        model,
        stage.images.train,
        stage.geometry,
        plan.train_for(stage.number),
        seed=seed,
        flip=plan.modality(stage.number).horizontal_flip,
        rehearse=rehearse,
    )
    write_atomic(file, model_to_bytes(model))
    return model


def losses(stages: list[Stage], model: MultiModalMAE, folder: Path) -> dict[str, float]:
    file = folder / "losses.json"
    if not file.exists():
        evaluate = stages[0].plan.evaluate
        values = {
            stage.name: heldout_loss(
                model,
                torch.from_numpy(np.array(stage.images.heldout[: evaluate.max_images])),
                stage.geometry,
                mask_ratio=stage.plan.train.mask_ratio,
                draws=evaluate.mask_draws,
                batch_size=evaluate.batch_size,
                seed=stage.plan.seed,
            )
            for stage in stages
        }
        write_atomic(file, json.dumps(values).encode())
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return known


def buffer_of(stage: Stage, model: MultiModalMAE, method: Method, folder: Path) -> Pixels | None:
    file = folder / "pool.safetensors"
    if not file.exists():
        kept = method.buffer(stage, model, folder)
        if kept is None:
            return None
        write_atomic(file, pool_to_bytes(kept))
        if method.buffer is inverted:  # pictures of synthetic images only
            write_atomic(folder / "pool.png", contact_sheet(kept))
            if stage.geometry.ndim == 3:
                write_atomic(folder / "volume.png", slices_sheet(kept[0]))
    return pool_from_bytes(file.read_bytes())


def shown(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())


Results = dict[str, list[Matrix]]  # by method, one matrix a seed


def last_losses(results: Results, method: str, modality: str) -> list[float]:
    """Held-out loss of a modality after the last stage, one a seed."""
    return [list(matrix.values())[-1][modality] for matrix in results[method]]


def figures_of(results: Results, earlier: list[str]) -> dict[str, float]:
    """The flat figures: loss per method and modality, the share of the gap that is closed, and the control."""
    figures: dict[str, float] = {}
    for method in results:
        for modality in earlier:
            figures[f"loss_{method}_{modality}"] = statistics.mean(last_losses(results, method, modality))
        figures[f"loss_{method}_mean"] = statistics.mean(figures[f"loss_{method}_{m}"] for m in earlier)
    if {"finetune", "real5", "invcoss"} <= results.keys():
        shares = {m: gap_closed(results, "invcoss", m) for m in earlier}
        for modality, values in shares.items():
            figures[f"gap_closed_{modality}"] = statistics.mean(values)
        figures["gap_closed_vs_real5"] = statistics.mean(v for values in shares.values() for v in values)
        worst = [
            ours - plain
            for m in earlier
            for ours, plain in zip(last_losses(results, "invcoss", m), last_losses(results, "finetune", m), strict=True)
        ]
        figures["invcoss_minus_finetune_worst"] = max(worst)
    if {"mnoise", "invcoss"} <= results.keys():
        for modality in earlier:
            pairs = zip(
                last_losses(results, "invcoss", modality), last_losses(results, "mnoise", modality), strict=True
            )
            figures[f"invcoss_minus_mnoise_{modality}"] = statistics.mean(a - b for a, b in pairs)
    return figures


def gap_closed(results: Results, method: str, modality: str) -> list[float]:
    """(finetune - method) / (finetune - real5) per seed: 1 is as good as 5 % real replay, 0 as bad as none."""
    columns = (last_losses(results, name, modality) for name in ("finetune", method, "real5"))
    return [(plain - ours) / (plain - real) for plain, ours, real in zip(*columns, strict=True)]


def report(results: Results, figures: dict[str, float], plan: Plan, images: list[SiteImages]) -> str:
    """The page beside the figures."""
    names = list(next(iter(results.values()))[0])
    earlier, last = names[:-1], names[-1]
    seeds = len(next(iter(results.values())))

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"

    lines = [
        f"# Retention on plan `{plan.name}` ({seeds} seeds)",
        "",
        f"Order {' -> '.join(names)}; masked-reconstruction loss on held-out real images after the last stage "
        "(lower is better, 1 is what predicting each patch's mean scores), mean ± population SD over seeds. One "
        "trainer, schedule, budget and seed list for all methods; the first stage is shared.",
        "",
        "| method | " + " | ".join(f"{m}" for m in earlier) + f" | mean | {last} (new) | what is replayed |",
        "| --- |" + " --- |" * (len(earlier) + 3),
    ]
    for method in results:
        means = [statistics.mean(row) for row in zip(*(last_losses(results, method, m) for m in earlier), strict=True)]
        row = [cell(last_losses(results, method, m)) for m in earlier] + [cell(means)]
        lines.append(
            f"| {method} | {' | '.join(row)} | {cell(last_losses(results, method, last))} | {METHODS[method].meaning} |"
        )
    if "finetune" in results:
        learned = [statistics.mean(matrix[name][name] for matrix in results["finetune"]) for name in earlier]
        shown_learned = ", ".join(f"{name} {value:.3f}" for name, value in zip(earlier, learned, strict=True))
        lines += ["", f"Right after their own stage, under fine-tuning: {shown_learned}."]
    if "gap_closed_vs_real5" in figures:
        lines += ["", "| share of the gap between finetune and real5 that is closed | " + " | ".join(earlier) + " |"]
        lines += ["| --- |" + " --- |" * len(earlier)]
        for method in results:
            if method not in ("finetune", "real5"):
                shares = [gap_closed(results, method, m) for m in earlier]
                lines.append(f"| {method} | " + " | ".join(" / ".join(f"{v:.0%}" for v in s) for s in shares) + " |")
        verdict = "reached" if figures["gap_closed_vs_real5"] >= 0.85 else "MISSED"
        lines += [
            "",
            f"InvCoSS closes {figures['gap_closed_vs_real5']:.1%} of the gap (mean over modalities and seeds); the "
            f"target of 85 % is {verdict}. In the worst modality and seed it is "
            f"{figures['invcoss_minus_finetune_worst']:+.3f} against fine-tuning (negative is better).",
        ]
    if f"invcoss_minus_mnoise_{earlier[0]}" in figures:
        against = ", ".join(f"{m} {figures[f'invcoss_minus_mnoise_{m}']:+.3f}" for m in earlier)
        lines += ["", f"InvCoSS minus the control `mnoise` (negative: inversion is better): {against}."]
    counts = ", ".join(f"{n} {len(i.train)}/{len(i.heldout)}" for n, i in zip(names, images, strict=True))
    kept = [f"{real_count(len(i.train))} {n}" for n, i in zip(earlier, images, strict=False)]
    lines += [
        "",
        f"Images, train/held out: {counts}. `real5` keeps {', '.join(kept)} images; the pools of `mnoise` and "
        f"`invcoss` have {plan.inversion.pool_size} each.",
        "",
        f"![Loss after the last stage by modality and method]({stem('retention')}.png)",
        "",
    ]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Bars: loss after the last stage by modality and method; a dot a seed."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(next(iter(results.values()))[0])
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(results)
    for place, method in enumerate(results):
        at = np.arange(len(names)) + (place - (len(results) - 1) / 2) * width
        values = [last_losses(results, method, name) for name in names]
        bars = axes.bar(at, [statistics.mean(v) for v in values], width * 0.92, label=method)
        for x, seeds in zip(at, values, strict=True):
            axes.plot([x] * len(seeds), seeds, ".", color="black", markersize=4)
        assert bars
    axes.set_xticks(range(len(names)), [*names[:-1], f"{names[-1]} (new)"])
    axes.set_ylabel("held-out masked-reconstruction loss")
    axes.set_title("What each method keeps after the last stage (lower is better, a dot is a seed)")
    axes.legend(frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def site_images(plan: Plan, data: Path | None, work: Path) -> list[SiteImages]:
    """The prepared images of every stage, as its site would have them."""
    images = []
    for number, stage in enumerate(plan.stages):
        home = simulated_home(plan, stage.site, data, work)
        inventory = take_inventory(home.data, plan.modality(number), home.index)
        images.append(prepare(inventory, plan.modality(number), plan.geometry(number), stage.spacing_mm, home.cache))
    return images


def run_all(
    base: Plan, data: Path | None, work: Path, methods: list[str], seeds: range, jobs: int, console: Console
) -> Results:
    """Every method with every seed; the shared first stages first, then the costliest methods."""
    costly_first = sorted(methods, key=lambda name: METHODS[name].buffer is not inverted)
    threads = max(1, (base.threads or os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        done: dict[tuple[str, int], Matrix] = {}
        for names, stages in ((methods[:1], 1), (costly_first, len(base.stages))):
            waiting = {
                pool.submit(run, base.model_copy(update={"seed": seed}), data, work, name, stages): (name, seed)
                for name in names
                for seed in seeds
            }
            for future in as_completed(waiting):
                (name, seed), (matrix, seconds) = waiting[future], future.result()
                done[name, seed] = matrix
                console.print(
                    f"{name}, seed {seed}, {stages} stage(s), {seconds:.0f} s: {shown(list(matrix.values())[-1])}"
                )
    return {method: [done[method, seed] for seed in seeds] for method in methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder that the plan's site folders are in")
    parser.add_argument("--methods", default="finetune,mnoise,real5,invcoss", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, starting at the plan's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, each with its share of the cores")
    parser.add_argument("--work", type=Path, default=Path("runs/retention"))
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    asked = parser.parse_args()
    methods = asked.methods.split(",")
    if unknown := set(methods) - METHODS.keys():
        parser.error(f"unknown method {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}")

    base = load_plan(asked.plan)
    names = [stage.modality for stage in base.stages]
    if len(set(names)) < len(names):
        parser.error(
            f"the plan has a modality twice ({', '.join(names)}); this benchmark tells stages apart by modality"
        )
    work = asked.work / base.digest()[:12]
    images = site_images(base, asked.data, work)
    seeds = range(base.seed, base.seed + asked.seeds)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    results = run_all(base, asked.data, work, methods, seeds, asked.jobs, console)
    figures = figures_of(results, names[:-1])
    page = report(results, figures, base, images)
    config = {
        "plan": base.model_dump(mode="json"),
        "methods": methods,
        "seeds": list(seeds),
        "jobs": asked.jobs,
    }
    written = write_measurement("retention", figures, config, results, page, asked.out)
    draw(results, written.with_suffix(".png"))
    console.print(page)
    console.print(f"{written} and .md, .png beside it")


if __name__ == "__main__":
    main()
