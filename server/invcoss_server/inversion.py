"""Model inversion: a frozen model and its normalisation statistics become a pool of synthetic images.

L_inv = w_task L_task + w_norm L_norm + w_img L_img + w_rep L_rep (InvCoSS; docs/method.md). Images are
made in groups, one generator each; every finished group is on disk, and a group under way has a checkpoint, so that a
killed inversion goes on and ends with the same pool. B = batch, C = channels, K = norm layers, D = encoder width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from invcoss_common.canonical import write_atomic
from invcoss_common.config import InversionConfig
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, reconstruction_loss
from invcoss_common.seeds import derive_seed, generator_for
from invcoss_common.statistics import NormStatistics, norm_inputs
from invcoss_common.tokens import random_mask
from invcoss_common.weights import tensors_to_bytes
from invcoss_server.generators import GENERATORS, latent_shape

VARIANCE_FLOOR = 1e-5


@dataclass(frozen=True)
class InversionProgress:
    """Where an inversion stands; the four terms are those of the latest step, unweighted."""

    step: int
    steps: int
    images_per_s: float
    task: float
    norm: float
    image: float
    repulsive: float


OnProgress = Callable[[InversionProgress], None]


def norm_loss(inputs: Sequence[Tensor], statistics: NormStatistics) -> Tensor:
    """L_norm: distance of the batch's channel mean and variance to the stored ones, relative to the stored variance.

    (1/K) sum_l (1/D) sum_c (mu - m)^2 / (v + e) + (var - v)^2 / (v + e)^2, each of `inputs` (B, T, D). The paper's
    formula is a plain sum of norms; unscaled, a few channels dominate and the images are texture (docs/LOG.md).
    """
    total = inputs[0].new_zeros(())
    for layer, features in enumerate(inputs):
        mean, variance = statistics.mean[layer], statistics.variance[layer]
        flat = features.reshape(-1, features.shape[-1])
        floor = variance + VARIANCE_FLOOR
        mean_term = (flat.mean(dim=0) - mean).square() / floor
        variance_term = (flat.var(dim=0, unbiased=False) - variance).square() / floor.square()
        total = total + (mean_term + variance_term).mean()
    return total / len(inputs)


def image_loss(images: Tensor) -> Tensor:
    """L_img: total variation, the sum over spatial axes of the mean absolute difference of neighbours."""
    return torch.stack([images.diff(dim=axis).abs().mean() for axis in range(2, images.dim())]).sum()


def repulsive_loss(features: Tensor, slots: Tensor, own: Tensor, filled: Tensor) -> Tensor:
    """L_rep: mean over the batch and the pool of cos(h_i, p_j)^2, own slot and empty slots left out.

    `features` (B, D), `slots` (N, D) unit rows of the persistent pool, `own` (B,) slot numbers, `filled` (N,) bool.
    """
    cosine = nn.functional.normalize(features, dim=1) @ slots.T
    counted = filled.expand(len(features), -1).clone()
    counted[torch.arange(len(features), device=own.device), own] = False
    return (cosine.square() * counted).sum() / counted.sum().clamp_min(1)


def invert(
    model: MultiModalMAE,
    statistics: NormStatistics,
    geometry: Geometry,
    config: InversionConfig,
    *,
    mask_ratio: float,
    seed: int,
    folder: Path,
    on_progress: OnProgress | None = None,
) -> npt.NDArray[np.uint8]:
    """Synthesise `config.pool_size` images (N, C, *size) uint8 from the frozen `model`; works in and resumes from
    `folder`. The same seed gives the same pool."""
    model.eval().requires_grad_(False)
    device = model.cls_token.device
    statistics = NormStatistics(**{name: tensor.to(device) for name, tensor in vars(statistics).items()})
    slots = torch.zeros(config.pool_size, model.shape.width, device=device)
    filled = torch.zeros(config.pool_size, dtype=torch.bool, device=device)
    groups = _groups(config)
    pool = np.empty((config.pool_size, geometry.channels, *geometry.size), np.uint8)
    for number, (first, count) in enumerate(groups):
        finished = folder / f"group-{number:04d}.safetensors"
        if not finished.exists():
            group = _Group(model, statistics, geometry, config, slots, filled, first, count, mask_ratio, seed)
            checkpoint = folder / f"group-{number:04d}.checkpoint"
            images = group.run(checkpoint, number * config.steps, len(groups) * config.steps, on_progress)
            write_atomic(finished, tensors_to_bytes({"images": images, "slots": slots[first : first + count]}))
            checkpoint.unlink(missing_ok=True)
        stored = load_file(finished)
        slots[first : first + count] = stored["slots"].to(device)
        filled[first : first + count] = True
        pool[first : first + count] = stored["images"].numpy()
    return pool


def _groups(config: InversionConfig) -> list[tuple[int, int]]:
    """First image and number of images of each generator; the last takes a remainder of one with it."""
    starts = list(range(0, config.pool_size, config.images_per_generator))
    if config.pool_size - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], config.pool_size], strict=True)]


class _Group:
    """One generator and the latents of its images, optimised together."""

    def __init__(
        self,
        model: MultiModalMAE,
        statistics: NormStatistics,
        geometry: Geometry,
        config: InversionConfig,
        slots: Tensor,
        filled: Tensor,
        first: int,
        count: int,
        mask_ratio: float,
        seed: int,
    ) -> None:
        self.model, self.statistics, self.geometry, self.config = model, statistics, geometry, config
        self.slots, self.filled, self.first, self.count = slots, filled, first, count
        self.mask_ratio, self.seed = mask_ratio, derive_seed(seed, "group", first)
        device = model.cls_token.device
        self.shape = latent_shape(config.generator, geometry, config.latent_channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator = GENERATORS[config.generator](geometry, config.latent_channels, config.width)
            # Convolutions run up to twice as fast with channels last.
            self.layout = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)[geometry.ndim - 1]
            self.generator = generator.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
            self.latents = nn.Embedding(count, int(np.prod(self.shape)), sparse=True).to(device)  # standard normal
        # Only the latents drawn in a step move: sparse Adam leaves the others' momentum alone.
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.SparseAdam(self.latents.parameters(), lr=config.lr_latent, betas=(0.9, 0.99))
        ]
        if list(self.generator.parameters()):
            self.optimisers.append(
                torch.optim.Adam(self.generator.parameters(), lr=config.lr_generator, betas=(0.9, 0.99))
            )
        self.rates = [config.lr_latent, config.lr_generator]

    def run(self, checkpoint: Path, done_before: int, steps: int, on_progress: OnProgress | None) -> Tensor:
        """Optimise for `config.steps` steps and return the images (count, C, *size) uint8."""
        step = self._resume(checkpoint)
        saved_at = began = time.monotonic()
        started_at = step
        while step < self.config.steps:
            terms = self._step(step)
            step += 1
            if time.monotonic() - saved_at > self.config.checkpoint_every_s:
                self._save(checkpoint, step)
                saved_at = time.monotonic()
            if on_progress:
                visits = (step - started_at) * min(self.config.batch_size, self.count)
                images_per_s = visits / (time.monotonic() - began) * self.count / self._visits()
                values = [float(term) for term in terms]
                on_progress(InversionProgress(done_before + step, steps, images_per_s, *values))
        return self._images()

    def _visits(self) -> int:
        return self.config.steps * min(self.config.batch_size, self.count)

    def _step(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, geometry = self.config, self.geometry
        decay = 0.5 * (1 + np.cos(np.pi * step / config.steps))
        for optimiser, rate in zip(self.optimisers, self.rates, strict=False):
            optimiser.param_groups[0]["lr"] = rate * decay
        random = generator_for(self.seed, "step", step)
        rows = torch.randperm(self.count, generator=random)[: config.batch_size]
        mask = random_mask(len(rows), geometry.tokens, self.mask_ratio, random)
        device = self.slots.device
        rows, mask = rows.to(device), mask.to(device)

        images = self._generate(rows)
        with norm_inputs(self.model) as inputs:
            latent, prediction = self.model(images, geometry, mask)
            task = reconstruction_loss(prediction, images, geometry, mask)
            norm = norm_loss(inputs, self.statistics)
        image = image_loss(images)
        features = latent[:, 1:].mean(dim=1)
        own = rows + self.first
        repulsive = repulsive_loss(features, self.slots, own, self.filled)
        loss = (
            config.task_weight * task
            + config.norm_weight * norm
            + config.image_weight * image
            + config.repulsive_weight * repulsive
        )
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.slots[own] = nn.functional.normalize(features.detach(), dim=1)
        self.filled[own] = True
        return task.detach(), norm.detach(), image.detach(), repulsive.detach()

    def _generate(self, rows: Tensor) -> Tensor:
        latents = self.latents(rows).reshape(-1, *self.shape)
        images: Tensor = self.generator(latents.to(memory_format=self.layout))
        return images

    @torch.no_grad()
    def _images(self) -> Tensor:
        batches = []
        for start in range(0, self.count, self.config.batch_size):
            rows = torch.arange(start, min(start + self.config.batch_size, self.count), device=self.slots.device)
            batches.append((self._generate(rows) * 255).round().to(torch.uint8).cpu())
        return torch.cat(batches)

    def _save(self, path: Path, step: int) -> None:
        own = slice(self.first, self.first + self.count)
        tensors = {"step": torch.tensor(step), "slots": self.slots[own], "filled": self.filled[own]}
        for kind, values in self._state().items():
            tensors |= {f"{kind}/{name}": value for name, value in values.items()}
        write_atomic(path, tensors_to_bytes(tensors))

    def _state(self) -> dict[str, dict[str, Tensor]]:
        state = {"generator": self.generator.state_dict(), "latents": self.latents.state_dict()}
        for number, optimiser in enumerate(self.optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                state[f"optimiser{number}.{index}"] = {k: torch.as_tensor(v) for k, v in values.items()}
        return state

    def _resume(self, path: Path) -> int:
        if not path.exists():
            return 0
        tensors = load_file(path)
        own = slice(self.first, self.first + self.count)
        self.slots[own], self.filled[own] = tensors.pop("slots").to(self.slots), tensors.pop("filled").to(self.filled)
        step = int(tensors.pop("step"))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parts.setdefault(kind, {})[name] = tensor
        self.generator.load_state_dict(parts.get("generator", {}))
        self.latents.load_state_dict(parts["latents"])
        for number, optimiser in enumerate(self.optimisers):
            whole = optimiser.state_dict()
            for kind, values in parts.items():
                if kind.startswith(f"optimiser{number}."):
                    # SparseAdam counts its steps in an int; a tensor instead would round its bias correction.
                    state = {k: int(v) if v.dtype == torch.int64 else v for k, v in values.items()}
                    whole["state"][int(kind.split(".")[1])] = state
            optimiser.load_state_dict(whole)
        return step
