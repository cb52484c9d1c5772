"""What differential privacy costs: held-out loss and error of the statistics by noise, and the time of the gradients.

    python benchmarks/dp_cost.py --data DIR/xray

DIR/xray holds X-rays and the index labels.csv. A nano model is trained once for each amount of noise, from the same
start and for as many steps. Epsilons are of the training and the statistics together, unless said otherwise.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from rich.console import Console

from invcoss_common.config import DpConfig, TrainConfig
from invcoss_common.modality import MODALITIES, SIZES, Geometry, geometry_for
from invcoss_common.model import MultiModalMAE, build_model, reconstruction_loss
from invcoss_common.statistics import NormStatistics, record_statistics
from invcoss_common.tokens import random_mask
from invcoss_site.batches import whole_images
from invcoss_site.dp import Private, image_gradients
from invcoss_site.dp_statistics import private_statistics, smooth_images
from invcoss_site.evaluate import heldout_loss
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import SiteImages, prepare
from invcoss_site.privacy import Charge, epsilon
from invcoss_site.trainer import train
from measurement import MEASUREMENTS, write_measurement

DELTA = 1e-5
KEY = bytes(32)  # nothing here is to be protected, and the numbers are to be had again
NOISES = (None, 0.25, 0.5, 1.0, 2.0)  # None: without differential privacy
STATISTICS_NOISES = (1.0, 3.0, 10.0)
LARGER_SITES = ((330, 32, 400), (3_000, 256, 2_000), (30_000, 256, 10_000), (300_000, 1_024, 20_000))
MASK_RATIO = 0.75


@dataclass(frozen=True)
class Trained:
    """A model, its held-out loss, what it cost, and how long it took."""

    noise: float | None
    batch_size: int
    model: MultiModalMAE
    loss: float
    epsilon: float | None
    seconds: float


def spent(noise: float, rate: float, steps: int, statistics_noise: float) -> float:
    one = {"visit": "0" * 64, "run": "cost", "hop": "s00-train", "noise_multiplier": noise, "sample_rate": rate}
    return epsilon([Charge.model_validate({**one, "steps": steps, "statistics_noise": statistics_noise})], DELTA)


def train_with(images: SiteImages, geometry: Geometry, noise: float | None, batch_size: int, steps: int) -> Trained:
    model = build_model(SIZES["nano"].model, [geometry], seed=0)
    config = TrainConfig(steps=steps, batch_size=batch_size)
    private = None if noise is None else Private(DpConfig(noise_multiplier=noise), images.case_of, KEY)
    began = time.perf_counter()
    train(model, images.train, geometry, config, seed=0, private=private)
    seconds = time.perf_counter() - began
    heldout = torch.from_numpy(np.ascontiguousarray(images.heldout))
    loss = heldout_loss(model, heldout, geometry, mask_ratio=MASK_RATIO, draws=4, batch_size=64, seed=0)
    cost = None if private is None else spent(noise or 0.0, private.sample_rate(config), steps, 10.0)
    return Trained(noise, batch_size, model, loss, cost, seconds)


def statistics_error(found: NormStatistics, true: NormStatistics) -> tuple[float, float, float]:
    """Root mean square over channels: mean in true SDs, log of variances; and the difference of the losses."""
    mean = ((found.mean - true.mean) / true.variance.sqrt()).square().mean().sqrt()
    variance = (found.variance / true.variance).log().square().mean().sqrt()
    return float(mean), float(variance), float(found.task_loss - true.task_loss)


def statistics_errors(
    model: MultiModalMAE, images: SiteImages, geometry: Geometry
) -> dict[str, tuple[float, float, float]]:
    """By noise: the errors of the statistics, with the cases there are and with ten times as many alike."""
    true = record_statistics(model, whole_images(images.train, geometry, 64), geometry, MASK_RATIO, seed=0, draws=4)
    made_up = record_statistics(model, smooth_images(geometry, 64).split(64), geometry, MASK_RATIO, seed=0)
    errors = {"made-up images alone": statistics_error(made_up, true)}
    for times in (1, 10):
        case_of = np.concatenate([images.case_of + number * images.train_cases for number in range(times)])
        train_images = np.concatenate([images.train] * times)
        for noise in STATISTICS_NOISES:
            private = Private(DpConfig(statistics_noise=noise), case_of, KEY)
            found = private_statistics(model, train_images, geometry, MASK_RATIO, private, 64, lambda done, of: None)
            errors[f"{noise:g} with {private.cases:,} cases"] = statistics_error(found, true)
    return errors


def gradient_seconds(geometry: Geometry, batch: int, repeats: int = 5) -> dict[str, float]:
    """Least seconds of one pass by each way to per-image gradients; Opacus's leave out the bare tokens."""
    model = build_model(SIZES["nano"].model, [geometry], seed=0)
    images = torch.rand(batch, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(0))
    mask = random_mask(batch, geometry.tokens, MASK_RATIO, torch.Generator().manual_seed(0))

    def backward(module: torch.nn.Module, first: int = 0, stop: int = batch) -> None:
        module.zero_grad(set_to_none=True)
        part, some = mask.rows(first, stop), images[first:stop]
        _, prediction = module(some, geometry, part)
        reconstruction_loss(prediction, some, geometry, part).backward()

    def by_opacus(functorch: bool) -> Callable[[], None]:
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            parameter.requires_grad_("_token" not in name)
        wrapped = GradSampleModule(other, strict=False, force_functorch=functorch)

        def run() -> None:
            for parameter in wrapped.parameters():
                parameter.grad_sample = None
            backward(wrapped)

        return run

    ways: dict[str, Callable[[], object]] = {
        "one gradient for all": lambda: backward(model),
        "one image after the other": lambda: [backward(model, row, row + 1) for row in range(batch)],
        "torch.func (used)": lambda: image_gradients(model, images, geometry, mask),
        "Opacus, hooks": by_opacus(False),
        "Opacus, functorch": by_opacus(True),
    }
    return {name: min(_timed(way) for _ in range(repeats)) for name, way in ways.items()}


def _timed(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with X-rays and labels.csv")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # of hooks and of the accountant, in what Opacus does here
    say, row = Console(stderr=True).print, MODALITIES["xray"]
    geometry = geometry_for(row, "nano")
    with tempfile.TemporaryDirectory() as cache:
        images = prepare(take_inventory(asked.data, row, ("labels.csv",)), row, geometry, None, Path(cache))
        runs = []
        for noise in NOISES:
            runs.append(train_with(images, geometry, noise, asked.batch, asked.steps))
            say(f"noise {noise}: loss {runs[-1].loss:.3f}, epsilon {runs[-1].epsilon}, {runs[-1].seconds:.0f} s")
        start = build_model(SIZES["nano"].model, [geometry], seed=0)
        heldout = torch.from_numpy(np.ascontiguousarray(images.heldout))
        untrained = heldout_loss(start, heldout, geometry, mask_ratio=MASK_RATIO, draws=4, batch_size=64, seed=0)
        errors = statistics_errors(runs[0].model, images, geometry)
    seconds = {
        f"{geometry.ndim}-D": gradient_seconds(geometry, 64),
        "3-D": gradient_seconds(geometry_for(MODALITIES["ct"], "nano"), 32),
    }
    alone = {noise: _alone(noise) for noise in STATISTICS_NOISES}
    sites = [(*site, spent(1.0, site[1] / site[0], site[2], 10.0)) for site in LARGER_SITES]
    markdown = f"""# What differential privacy costs

X-rays: {len(images.train)} training images of {images.train_cases} cases, {len(images.heldout)} held-out images. Nano models, {asked.steps} steps
of {asked.batch} cases on average, one run each. delta = {DELTA:g}, clip_norm 1. Before training the loss is {untrained:.3f}.

    python benchmarks/dp_cost.py --data DIR/xray --steps {asked.steps} --batch {asked.batch}

{table(["noise multiplier", "epsilon", "held-out loss"], [["without", "–", f"{runs[0].loss:.3f}"], *([f"{run.noise:g}", f"{run.epsilon:.3g}", f"{run.loss:.3f}"] for run in runs[1:])])}

With `statistics_noise` 10, whose own epsilon is {alone[10.0]:.2g}, included.

## Epsilon at other sites

By accounting alone, for a noise multiplier of 1:

{table(["cases", "batch", "steps", "epsilon"], [[f"{n:,}", batch, f"{steps:,}", f"{cost:.3g}"] for n, batch, steps, cost in sites])}

## Shipped statistics

Of the model trained without noise. Errors are root mean squares over all channels of all norms, and the difference of
the mean losses; those of made-up images alone are what is left when noise hides all. The larger site has each case ten
times. Epsilons of the statistics alone: {", ".join(f"{alone[noise]:.2g} for {noise:g}" for noise in STATISTICS_NOISES)}.

{table(["statistics_noise", "mean, in SDs", "log variance", "loss"], [[name, *(f"{error:.2f}" for error in found)] for name, found in errors.items()])}

## Seconds of per-image gradients

One forward and backward pass, 64 images in 2-D, 32 in 3-D; Opacus without the class and mask tokens, for which it has
no sampler.

{table(["", *seconds], [[way, *(f"{times[way]:.3f}" for times in seconds.values())] for way in seconds["3-D"]])}
"""  # noqa: E501 - the lines of the page
    figures = {f"loss_noise_{run.noise if run.noise is not None else 'none'}": run.loss for run in runs}
    raw = {
        "runs": [
            {"noise": run.noise, "loss": run.loss, "epsilon": run.epsilon, "seconds": run.seconds} for run in runs
        ],
        "untrained_loss": untrained,
        "statistics": errors,
        "sites": sites,
        "gradient_seconds": seconds,
    }
    config: dict[str, object] = {"steps": asked.steps, "batch": asked.batch, "delta": DELTA, "size": "nano"}
    say(write_measurement("dp-cost", figures, config, raw, markdown, asked.out))


def _alone(noise: float) -> float:
    """Epsilon of the statistics without a training: of one whose noise hides everything."""
    return spent(1e6, 1e-6, 1, noise)


if __name__ == "__main__":
    main()
