"""Rehearsal of earlier modalities on synthetic pools, beside the training on the site's new images.

One step rehearses one earlier modality: a mixed batch, one mask, the student against the frozen previous model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from invcoss_common.config import ReplayConfig
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, masked_error, reconstruction_loss
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import Mask, random_mask

Rehearse = Callable[[MultiModalMAE, int], Tensor]
ReplayLoss = Callable[[MultiModalMAE, MultiModalMAE, Tensor, Geometry, Mask], Tensor]


@dataclass(frozen=True)
class ReplayPool:
    """Images (N, C, *size) of one earlier modality, uint8."""

    images: npt.NDArray[np.uint8]
    geometry: Geometry


def distil_loss(
    student: MultiModalMAE, teacher: MultiModalMAE, images: Tensor, geometry: Geometry, mask: Mask
) -> Tensor:
    """Latent tokens plus decoder predictions of the teacher, on the same images and mask: a scalar.

    ||f - f_t||^2 / Var(f_t) + masked MSE(g(f), g_t(f_t)). Synthetic pixels are never a target, so their artefacts are
    not learned (docs/adr/0003).
    """
    with torch.no_grad():
        teacher_latent, teacher_prediction = teacher(images, geometry, mask)
    latent, prediction = student(images, geometry, mask)
    features = (latent - teacher_latent).square().mean() / teacher_latent.var(unbiased=False)
    out: Tensor = features + masked_error(prediction, teacher_prediction, mask).mean()
    return out


def published_loss(
    student: MultiModalMAE, teacher: MultiModalMAE, images: Tensor, geometry: Geometry, mask: Mask
) -> Tensor:
    """Masked modelling on the replayed images plus latent distillation over visible tokens (MedCoSS)."""
    with torch.no_grad():
        teacher_latent = teacher.encode(images, geometry, mask.keep)
    latent, prediction = student(images, geometry, mask)
    features = (latent - teacher_latent).square().mean()
    out: Tensor = reconstruction_loss(prediction, images, geometry, mask) + features
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

    `teacher` is the model as it arrived, frozen; `batch_size` is that of the new modality.
    """
    teacher.eval().requires_grad_(False)
    loss = LOSSES[config.loss]
    count = max(2, round(batch_size * config.batch_share))

    def rehearse(student: MultiModalMAE, step: int) -> Tensor:
        generator = generator_for(seed, "replay", step)
        pool = pools[int(torch.randint(len(pools), (), generator=generator))]
        rows = torch.randint(len(pool.images), (count,), generator=generator)
        device = student.cls_token.device
        images = torch.from_numpy(pool.images[rows.numpy()]).to(device, torch.float32) / 255
        if config.mixup:
            images = mix_pairs(images, generator)
        if config.loss == "distil" and config.noise:
            images = add_noise(images, config.noise, generator)
        mask = random_mask(count, pool.geometry.tokens, mask_ratio, generator).to(device)
        return config.weight * loss(student, teacher, images, pool.geometry, mask)

    return rehearse
