"""Random changes of training images as published: colour for classified pictures, nnU-Net's for the rest, by MONAI.

C = channels, K = classes, S = shape of one image.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from monai.transforms import (
    Compose,
    GaussianSmooth,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
)
from torch import Tensor

from invcoss_site.downstream.task import Task

_GREY = torch.tensor((0.299, 0.587, 0.114))  # of R, G, B (ITU-R BT.601)
_TO_YIQ = torch.tensor(((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1  # turns
ELASTIC_SHARE = 0.2  # of the images
ELASTIC_SIGMA = (9.0, 13.0)  # voxels; of the Gaussian that makes the field smooth
ELASTIC_VOXELS = {2: 3.0, 3: 2.0}  # by dimensions; what the published strengths come to
COARSE = 4


def augmented(task: Task, image: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Image (C, *S) and mask (K, *S) changed at random, the same for the same seed, in the shapes they had."""
    if task.augment == "colour":
        return coloured(image, torch.Generator().manual_seed(seed), flip=task.flips), mask
    if task.augment == "none":
        return image, mask
    mean, sd = image.mean(), image.std().clamp(min=1e-6)  # the published strengths are those for such images
    image = (image - mean) / sd
    generator = torch.Generator().manual_seed(seed)
    if torch.rand((), generator=generator) < ELASTIC_SHARE:
        image, mask = elastic(image, mask, generator)
    inputs = {"image": image} if mask is None else {"image": image, "mask": mask}
    change = _spatial(tuple(inputs), task.ndim, task.flips)
    change.set_random_state(seed % 2**32)
    changed = change(inputs)
    image = _plain(changed["image"]) * sd + mean
    image = image.clamp(0, 1) if task.intensity == "unit" else image
    return image, None if mask is None else _plain(changed["mask"])


def elastic(image: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Both bent alike: every voxel is moved along each axis, smoothly in space, by an SD of up to `ELASTIC_VOXELS`.

    The field is drawn at a quarter of the resolution: it is far smoother than that, and this is much faster.
    """
    size, ndim = image.shape[1:], image.ndim - 1
    low, high = ELASTIC_SIGMA
    sigma, strength = torch.rand(2, generator=generator).tolist()
    coarse = [max(2, math.ceil(side / COARSE)) for side in size]
    noise = torch.rand((1, ndim, *coarse), generator=generator) * 2 - 1
    field = GaussianFilter(ndim, (low + (high - low) * sigma) / COARSE)(noise)
    field = field / field.std().clamp(min=1e-6) * strength * ELASTIC_VOXELS[ndim]
    field = F.interpolate(field, size, mode="bilinear" if ndim == 2 else "trilinear", align_corners=True)[0]
    places = torch.stack(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")) + field
    scale = torch.tensor([2 / max(side - 1, 1) for side in size]).reshape(-1, *(1,) * ndim)
    grid = (places * scale - 1).flip(0).movedim(0, -1)[None]  # last axis first, as grid_sample wants it

    def bent(part: Tensor, mode: str) -> Tensor:
        return F.grid_sample(part[None], grid, mode=mode, padding_mode="border", align_corners=True)[0]

    return bent(image, "bilinear"), None if mask is None else bent(mask, "nearest")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor  # MONAI's own kind of tensor


@lru_cache
def _spatial(keys: tuple[str, ...], ndim: int, flips: bool) -> Compose:
    """nnU-Net's changes but the elastic one, of images with mean 0 and SD 1, with the published strengths."""
    modes = ["bilinear", "nearest"][: len(keys)]
    angle = 15 / 360 * 2 * torch.pi
    brightness, gamma = ((-0.3, 0.5), (0.5, 2.0)) if ndim == 2 else ((-0.25, 0.25), (0.7, 1.5))
    turn = angle if ndim == 2 else (angle,) * 3
    scale = ((-0.15, 0.25),) * ndim  # per axis; where the published code stretches all alike
    mirrors = [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(ndim)] if flips else []
    return Compose(
        [
            RandAffined(keys, rotate_range=turn, prob=0.2, mode=modes, padding_mode="border"),
            RandAffined(keys, scale_range=scale, prob=0.2, mode=modes, padding_mode="border"),
            RandGaussianNoised("image", std=0.1, prob=0.1),
            RandGaussianSmoothd("image", *(((0.5, 1.0),) * 3), prob=0.2),
            RandScaleIntensityd("image", factors=brightness, prob=0.15),
            RandShiftIntensityd("image", offsets=0.1, prob=0.15),
            RandScaleIntensityFixedMeand("image", factors=0.25, prob=0.15),
            RandSimulateLowResolutiond(
                "image", zoom_range=(0.5, 1.0), upsample_mode="bilinear" if ndim == 2 else "trilinear", prob=0.25
            ),
            RandAdjustContrastd("image", gamma=gamma, retain_stats=True, prob=0.15),
            *mirrors,
        ]
    )


def coloured(image: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """A picture (C, H, W) in [0, 1], grey or RGB, jittered, greyed, blurred and mirrored at random as published."""

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    brightness, contrast = drawn(1 - BRIGHTNESS, 1 + BRIGHTNESS), drawn(1 - CONTRAST, 1 + CONTRAST)
    saturation, hue = drawn(1 - SATURATION, 1 + SATURATION), drawn(-HUE, HUE)
    if drawn(0, 1) < 0.8:
        image = (image * brightness).clamp(0, 1)
        mean = _grey(image).mean()
        image = ((image - mean) * contrast + mean).clamp(0, 1)
        if len(image) == 3:
            grey = _grey(image)
            image = _hue_turned(((image - grey) * saturation + grey).clamp(0, 1), hue)
    if drawn(0, 1) < 0.2:
        image = _grey(image).expand_as(image)
    sigma = drawn(0.1, 2.0)
    if drawn(0, 1) < 0.5:
        image = _plain(GaussianSmooth(sigma)(image))
    return image.flip(-1) if drawn(0, 1) < 0.5 and flip else image


def _grey(image: Tensor) -> Tensor:
    """Brightness (1, H, W)."""
    return image if len(image) == 1 else torch.einsum("c,chw->hw", _GREY, image)[None]


def _hue_turned(image: Tensor, turns: float) -> Tensor:
    """Colours turned by so many turns around grey, brightness kept."""
    angle = torch.tensor(2 * torch.pi * turns)
    turn = torch.eye(3)
    turn[1:, 1:] = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    matrix = torch.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ
    return torch.einsum("dc,chw->dhw", matrix, image).clamp(0, 1)
