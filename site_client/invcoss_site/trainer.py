"""Masked image modelling at a site: the training loop, its checkpoint and its rules for bad numbers.

Randomness is drawn per step from the seed and the step number, so a run that was killed and resumed ends with the same
weights as one that was not; several processes (ranks.py) train on the same batches and masks as one does. B = batch,
C = channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from invcoss_common.config import TrainConfig
from invcoss_common.errors import TrainingError
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, reconstruction_loss
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import random_mask
from invcoss_common.weights import check_tensors, schema_of, write_tensors
from invcoss_site import ranks
from invcoss_site.batches import FloatImages, TrainingBatches, batch_loader
from invcoss_site.dp import PoissonBatches, Private, leave_private_gradient
from invcoss_site.replay import Rehearse

T = TypeVar("T")


@dataclass
class Progress:
    """Where a training stands; `losses` holds the masked-reconstruction loss of every step so far, none if private."""

    step: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    images: int = 0

    @property
    def images_per_s(self) -> float:
        return self.images / self.train_seconds if self.train_seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        return self.wait_seconds / self.train_seconds if self.train_seconds else 0.0


def steps_for(config: TrainConfig, images: int) -> int:
    """Optimiser steps of one stage over `images` training images; of a private one, over so many cases."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * images / (config.batch_size * config.accumulate)))


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to 0 (MAE, Table 8)."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: MultiModalMAE,
    images: FloatImages,
    geometry: Geometry,
    config: TrainConfig,
    *,
    seed: int,
    flip: bool = True,
    rehearse: Rehearse | None = None,
    private: Private | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train `model` in place on `images` (N, C, *stored) in [0, 1].

    `rehearse(model, step)` adds a loss for what was learned before. With `private`, the gradient of the images is that
    of DP-SGD; what comes after it knows of no image, and no loss is kept. With `checkpoint`, the state is saved there
    every `checkpoint_every_s` and a later call goes on from it. Raises TrainingError after `max_bad_steps` non-finite
    steps.

    With several processes all call it alike. Each works on its part of every batch and of the replay batch; the losses,
    the rule for bad numbers and the weights are the same in all of them, and the first alone writes checkpoints, which
    any number of processes can go on from.
    """
    assert private is None or ranks.count() == 1
    model.train()
    device = model.cls_token.device
    optimiser = make_optimiser(model, config)
    progress = Progress(steps=steps_for(config, private.cases if private else len(images)))
    if checkpoint and checkpoint.exists():
        _load_checkpoint(checkpoint, model, optimiser, progress)
    student = ranks.synchronised(model)
    part = ranks.part_of(config.batch_size)
    batches = TrainingBatches(
        images,
        geometry,
        batch_size=config.batch_size,
        crop_scale=config.crop_scale,
        flip=flip,
        seed=seed,
        part=slice(part.start, part.stop),
    )
    per_step = config.accumulate if private is None else 1
    loader: Iterator[Any] = iter(  # of images, or if private of images and masks
        batch_loader(
            batches if private is None else PoissonBatches(batches, private, config),
            progress.step * per_step,
            progress.steps * per_step,
            config.workers,
        )
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_use_bf16(config, device))
    bad_in_a_row = 0
    saved_at = time.monotonic()

    while progress.step < progress.steps:
        began = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress.step, progress.steps, config)
        if private is None:
            loss_sum = _leave_gradient(
                student, loader, geometry, config, seed, progress, device, autocast, last=rehearse is None
            )
        else:
            drawn, mask = _await(loader, progress)
            leave_private_gradient(model, drawn.to(device), mask.to(device), geometry, private, config, progress.step)
            loss_sum = 0.0  # nobody is to know it
        progress.images += config.accumulate * config.batch_size
        if rehearse is not None:
            with autocast:
                replay_loss = rehearse(student, progress.step)
            replay_loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
        loss_mean, norm = ranks.averaged(torch.tensor([loss_sum, norm], dtype=torch.float64)).tolist()
        if math.isfinite(norm) and math.isfinite(loss_mean):
            optimiser.step()
            if private is None:
                progress.losses.append(loss_mean)
            bad_in_a_row = 0
        else:
            progress.skipped += 1
            bad_in_a_row += 1
            if bad_in_a_row > config.max_bad_steps:
                raise TrainingError(
                    f"the loss was not a finite number for {bad_in_a_row} steps in a row (step {progress.step}); "
                    "lower train.lr or set train.precision to fp32"
                )
        optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        progress.train_seconds += time.monotonic() - began
        due = time.monotonic() - saved_at > config.checkpoint_every_s or progress.step == progress.steps
        if checkpoint and due and ranks.rank() == 0:
            _save_checkpoint(checkpoint, model, optimiser, progress)
            saved_at = time.monotonic()
        if on_progress:
            on_progress(progress)
    model.eval()
    return progress


def _leave_gradient(
    student: nn.Module,
    loader: Iterator[Tensor],
    geometry: Geometry,
    config: TrainConfig,
    seed: int,
    progress: Progress,
    device: torch.device,
    autocast: AbstractContextManager[None],
    *,
    last: bool,
) -> float:
    """Leave the mean gradient of one step's images in `grad`, and return their mean loss.

    Where several processes train, the gradient is averaged over them at its end if `last`, that is if nothing is to be
    added to it.
    """
    part = ranks.part_of(config.batch_size)
    loss_sum = 0.0
    for turn in range(config.accumulate):
        batch = _await(loader, progress).to(device, non_blocking=True)
        generator = generator_for(seed, "mask", progress.step, turn)
        mask = random_mask(config.batch_size, geometry.tokens, config.mask_ratio, generator)
        mask = mask.rows(part.start, part.stop).to(device)
        with nullcontext() if last and turn == config.accumulate - 1 else ranks.unsynchronised(student):
            with autocast:
                _, prediction = student(batch, geometry, mask)
                loss = part.weight * reconstruction_loss(prediction, batch, geometry, mask)
            (loss / config.accumulate).backward()
        loss_sum += float(loss.detach()) / config.accumulate
    return loss_sum


def _await(loader: Iterator[T], progress: Progress) -> T:
    """The next item of `loader`; the time that it takes is noted."""
    began = time.monotonic()
    item = next(loader)
    progress.wait_seconds += time.monotonic() - began
    return item


def make_optimiser(model: MultiModalMAE, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and single tokens (MAE, Table 8)."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def _use_bf16(config: TrainConfig, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


def state_tensors(model: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything that a resumed run needs, as tensors: weights and both Adam moments by parameter name."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimiser.state.get(parameter) or {}
        tensors[f"adam_step/{name}"] = state.get("step", torch.zeros(()))
        tensors[f"adam_mean/{name}"] = state.get("exp_avg", torch.zeros_like(parameter))
        tensors[f"adam_square/{name}"] = state.get("exp_avg_sq", torch.zeros_like(parameter))
    return tensors


def restore_state(tensors: dict[str, Tensor], model: nn.Module, optimiser: torch.optim.AdamW) -> None:
    """Put back what `state_tensors` gave; raises WeightsError for tensors of another model."""
    check_tensors(tensors, schema_of(state_tensors(model, optimiser)))
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    for name, parameter in model.named_parameters():
        optimiser.state[parameter] = {
            "step": tensors[f"adam_step/{name}"],
            "exp_avg": tensors[f"adam_mean/{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"adam_square/{name}"].to(parameter.device),
        }


def _save_checkpoint(path: Path, model: MultiModalMAE, optimiser: torch.optim.AdamW, progress: Progress) -> None:
    tensors = state_tensors(model, optimiser)
    tensors["counters"] = torch.tensor([progress.step, progress.skipped, progress.images], dtype=torch.int64)
    tensors["seconds"] = torch.tensor([progress.train_seconds, progress.wait_seconds], dtype=torch.float64)
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    write_tensors(path, tensors)


def _load_checkpoint(path: Path, model: MultiModalMAE, optimiser: torch.optim.AdamW, progress: Progress) -> None:
    tensors = load_file(path)
    progress.step, progress.skipped, progress.images = tensors.pop("counters").tolist()
    progress.train_seconds, progress.wait_seconds = tensors.pop("seconds").tolist()
    progress.losses = tensors.pop("losses").tolist()
    restore_state(tensors, model, optimiser)
