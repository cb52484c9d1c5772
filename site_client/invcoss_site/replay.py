"""Rehearsal of earlier modalities on synthetic pools, beside the training on the site's new images.

One step rehearses one earlier modality: a mixed batch, one mask, the student against the frozen previous model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from invcoss_common.config import ReplayConfig
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, masked_error, reconstruction_loss
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import Mask, random_mask
from invcoss_site import ranks

Rehearse = Callable[[nn.Module, int], Tensor]
ReplayLoss = Callable[[nn.Module, MultiModalMAE, Tensor, Geometry, Mask, float], Tensor]


@dataclass(frozen=True)
class ReplayPool:
    """Images (N, C, *size) of one earlier modality, uint8."""

    images: npt.NDArray[np.uint8]
    geometry: Geometry


def distil_loss(
    student: nn.Module, teacher: MultiModalMAE, images: Tensor, geometry: Geometry, mask: Mask, weight: float = 1.0
) -> Tensor:
    """Latent tokens plus decoder predictions of the teacher, on the same images and mask: a scalar.

    ||f - f_t||^2 / Var(f_t) + masked MSE(g(f), g_t(f_t)). Synthetic pixels are never a target, so their artefacts are
    not learned (docs/adr/0003). `images` are the part of the batch that has `weight` (ranks.Part); the result is times
    it, and Var is over the whole batch.
    """
    with torch.no_grad():
        teacher_latent, teacher_prediction = teacher(images, geometry, mask)
        mean = teacher_latent.mean()
        offset = mean - ranks.averaged(weight * mean)
        variance = ranks.averaged(weight * (teacher_latent.var(unbiased=False) + offset.square()))
    latent, prediction = student(images, geometry, mask)
    features = (latent - teacher_latent).square().mean() / variance
    out: Tensor = weight * (features + masked_error(prediction, teacher_prediction, mask).mean())
    return out


def published_loss(
    student: nn.Module, teacher: MultiModalMAE, images: Tensor, geometry: Geometry, mask: Mask, weight: float = 1.0
) -> Tensor:
    """Masked modelling on the images plus latent distillation over visible tokens (MedCoSS), times `weight`."""
    with torch.no_grad():
        teacher_latent = teacher.encode(images, geometry, mask.keep)
    latent, prediction = student(images, geometry, mask)
    features = (latent - teacher_latent).square().mean()
    out: Tensor = weight * (reconstruction_loss(prediction, images, geometry, mask) + features)
    return out


LOSSES: dict[str, ReplayLoss] = {"distil": distil_loss, "published": published_loss}


def mix_pairs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Intra-modal mixup x' = a x_i + (1 - a) x_j, a uniform in [0, 1], partners from the batch (MedCoSS)."""
    partner = torch.randperm(len(images), generator=generator)
    share = torch.rand(len(images), *[1] * (images.dim() - 1), generator=generator).to(images.device)
    return share * images + (1 - share) * images[partner.to(images.device)]


def add_noise(images: Tensor, largest_sd: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise on images (N, C, *size) in [0, 1], its SD uniform in [0, largest_sd] per image; clipped.

    The student then matches the teacher in a neighbourhood of the pool that reaches real images, whose fine texture
    the inverted ones lack. Nothing regresses the noise: under `distil` pixels are no target.
    """
    spread = largest_sd * torch.rand(len(images), *[1] * (images.dim() - 1), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (images + (spread * noise).to(images.device)).clamp(0, 1)


def rehearsal(
    teacher: MultiModalMAE,
    pools: Sequence[ReplayPool],
    config: ReplayConfig,
    *,
    batch_size: int,
    mask_ratio: float,
    seed: int,
) -> Rehearse:
    """A function (student, step) -> weighted replay loss; draws one earlier modality uniformly per step.

    `teacher` is the model as it arrived, frozen, on the student's device; `batch_size` is that of the new modality.
    With several processes each returns the loss of its part of the batch; the replay loss is their `ranks.averaged`.
    """
    teacher.eval().requires_grad_(False)
    loss = LOSSES[config.loss]
    count = max(2, round(batch_size * config.batch_share))
    part = ranks.part_of(count)
    device = teacher.cls_token.device

    def rehearse(student: nn.Module, step: int) -> Tensor:
        generator = generator_for(seed, "replay", step)
        pool = pools[int(torch.randint(len(pools), (), generator=generator))]
        rows = torch.randint(len(pool.images), (count,), generator=generator)
        images = torch.from_numpy(pool.images[rows.numpy()]).to(device, torch.float32) / 255
        if config.mixup:
            images = mix_pairs(images, generator)
        if config.loss == "distil" and config.noise:
            images = add_noise(images, config.noise, generator)
        mask = random_mask(count, pool.geometry.tokens, mask_ratio, generator).rows(part.start, part.stop).to(device)
        return config.weight * loss(student, teacher, images[part.start : part.stop], pool.geometry, mask, part.weight)

    return rehearse
