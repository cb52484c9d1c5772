"""Patches, random masks and positions for 1-D, 2-D and 3-D grids alike.

B = batch, C = channels, L = tokens (patches) of an image, V = visible tokens, P = values per patch, D = width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invcoss_common.modality import Geometry


@dataclass(frozen=True)
class Mask:
    """A random mask for B images: `keep` (B, V) are visible tokens, `restore` (B, L) undoes the shuffle that put the
    visible ones first, `removed` (B, L) is True where a patch is hidden."""

    keep: Tensor
    restore: Tensor
    removed: Tensor

    def rows(self, start: int, stop: int) -> Mask:
        """The mask of images start..stop."""
        return Mask(self.keep[start:stop], self.restore[start:stop], self.removed[start:stop])

    def to(self, device: torch.device) -> Mask:
        return Mask(self.keep.to(device), self.restore.to(device), self.removed.to(device))


def random_mask(batch: int, tokens: int, ratio: float, generator: torch.Generator) -> Mask:
    """Remove a random `ratio` of the tokens of each image, at least one kept and one removed.

    `generator` lives on the CPU, so that the same seed gives the same mask on every device.
    """
    visible = min(max(round(tokens * (1 - ratio)), 1), tokens - 1)
    shuffle = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return Mask(keep=shuffle[:, :visible], restore=restore, removed=restore >= visible)


def patchify(images: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut images (B, C, *size) into patches (B, L, P), P = prod(patch) * C with channels last."""
    batch, channels, *size = images.shape
    split: list[int] = []
    for extent, step in zip(size, patch, strict=True):
        split += [extent // step, step]
    axes = len(patch)
    grid_axes = [2 + 2 * i for i in range(axes)]
    patch_axes = [3 + 2 * i for i in range(axes)]
    cut = images.reshape(batch, channels, *split).permute(0, *grid_axes, *patch_axes, 1)
    return cut.reshape(batch, math.prod(split[0::2]), math.prod(patch) * channels)


def unpatchify(patches: Tensor, geometry: Geometry) -> Tensor:
    """Inverse of `patchify`: (B, L, P) to images (B, C, *size)."""
    batch = patches.shape[0]
    axes = geometry.ndim
    channels = patches.shape[2] // math.prod(geometry.patch)
    cut = patches.reshape(batch, *geometry.grid, *geometry.patch, channels)
    order = [0, 2 * axes + 1]
    for axis in range(axes):
        order += [1 + axis, 1 + axes + axis]
    return cut.permute(*order).reshape(batch, channels, *geometry.size)


def sincos_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed sine-cosine positions (L, D) of an n-D grid; each axis gets an equal, even share of the width.

    Widths that don't divide evenly are filled up with zeros.
    """
    share = width // len(grid) // 2 * 2
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(share // 2, dtype=torch.float64) / (share / 2))
    parts = []
    for axis in axes:
        angles = axis.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    positions = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(positions, (0, width - positions.shape[1])).float()
