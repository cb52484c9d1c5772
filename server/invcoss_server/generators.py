"""Generators that inversion optimises: InvUNet (the paper's) and two simpler ones to compare it with.

All map latents z (B, Z, *bottleneck) to images (B, C, *size) in [0, 1], in 2-D and 3-D alike.
B = batch, C = image channels, Z = latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invcoss_common.modality import Geometry

Size = tuple[int, ...]
LARGEST_BOTTLENECK = 8
SMALLEST_BOTTLENECK = 4
GROUPS = 4


def scales_for(size: Size) -> list[Size]:
    """Spatial sizes from the bottleneck up to `size`.

    Every axis is halved while it is even and longer than 4, until none is longer than 8: (64, 64) -> [(8, 8), (16, 16),
    (32, 32), (64, 64)]; (16, 192, 192) -> [(4, 6, 6), (4, 12, 12), ..., (16, 192, 192)].
    """
    scales = [size]
    while max(scales[0]) > LARGEST_BOTTLENECK:
        smaller = tuple(n // 2 if n % 2 == 0 and n > SMALLEST_BOTTLENECK else n for n in scales[0])
        if smaller == scales[0]:
            break
        scales.insert(0, smaller)
    return scales


def _convolution(ndim: int) -> type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]


def _upsample(x: Tensor, size: Size, smooth: bool) -> Tensor:
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1] if smooth else "nearest"
    return F.interpolate(x, size=size, mode=mode, align_corners=False if smooth else None)


def _channels(wanted: int) -> int:
    """At least 16, and what GroupNorm's four groups can share."""
    return max(wanted // GROUPS * GROUPS, 16)


def _double_convolution(inputs: int, outputs: int, ndim: int) -> nn.Sequential:
    conv = _convolution(ndim)
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [conv(channels, outputs, 3, padding=1), nn.GroupNorm(GROUPS, outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class MemoryMap(nn.Module):
    """A learned structural prior (1, c, *size) of one scale; in 3-D the sum of an in-plane and a depth profile, which
    keeps its parameters from growing with the number of voxels."""

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        shapes = [size] if len(size) < 3 else [(1, *size[1:]), (size[0], *[1] * (len(size) - 1))]
        self.factors = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, channels, *shape)) for shape in shapes)

    def forward(self) -> Tensor:
        out: Tensor = sum(self.factors[1:], start=self.factors[0])
        return out


class InvUNet(nn.Module):
    """The paper's generator: z enters at the bottleneck; a light memory cache branch makes
    multi-scale priors, and the main branch upsamples and fuses them at every scale."""

    def __init__(self, geometry: Geometry, latent_channels: int, width: int) -> None:
        super().__init__()
        self.scales = scales_for(geometry.size)
        ndim = geometry.ndim
        conv = _convolution(ndim)
        widths = [_channels(width // 2**i) for i in range(len(self.scales))]
        caches = [max(w // 3 // 4 * 4, 8) for w in widths]

        self.bottleneck = _double_convolution(latent_channels, widths[0], ndim)
        self.cache_in = conv(latent_channels, caches[0], 1)
        self.cache_steps = nn.ModuleList(conv(a, b, 1) for a, b in pairwise(caches))
        self.memory = nn.ModuleList(MemoryMap(c, s) for c, s in zip(caches[1:], self.scales[1:], strict=True))
        self.steps = nn.ModuleList(
            _double_convolution(widths[i] + caches[i + 1], widths[i + 1], ndim) for i in range(len(widths) - 1)
        )
        self.out = conv(widths[-1], geometry.channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        main, cache = self.bottleneck(z), self.cache_in(z)
        for size, cache_step, memory, step in zip(
            self.scales[1:], self.cache_steps, self.memory, self.steps, strict=True
        ):
            cache = F.leaky_relu(cache_step(_upsample(cache, size, smooth=False)) + memory(), 0.2)
            main = step(torch.cat([_upsample(main, size, smooth=True), cache], dim=1))
        return torch.sigmoid(self.out(main))


class DcganDecoder(nn.Module):
    """Comparator: a plain stack of upsampling convolutions (DCGAN-like), without cache branch or skip connections."""

    def __init__(self, geometry: Geometry, latent_channels: int, width: int) -> None:
        super().__init__()
        self.scales = scales_for(geometry.size)
        ndim = geometry.ndim
        conv = _convolution(ndim)
        widths = [_channels(width * 2 // 2**i) for i in range(len(self.scales))]
        self.into = nn.Sequential(
            conv(latent_channels, widths[0], 3, padding=1), nn.GroupNorm(GROUPS, widths[0]), nn.ReLU()
        )
        self.steps = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, padding=1), nn.GroupNorm(GROUPS, b), nn.ReLU()) for a, b in pairwise(widths)
        )
        self.out = conv(widths[-1], geometry.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.into(z)
        for size, step in zip(self.scales[1:], self.steps, strict=True):
            x = step(_upsample(x, size, smooth=False))
        return torch.sigmoid(self.out(x))


class DirectPixels(nn.Module):
    """Comparator: no generator; the latents are the images' logits themselves (use with `latent_shape` (C, *size))."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)


Builder = Callable[[Geometry, int, int], nn.Module]
GENERATORS: dict[str, Builder] = {
    "invunet": InvUNet,
    "dcgan": DcganDecoder,
    "pixels": lambda _geometry, _latent_channels, _width: DirectPixels(),
}


def latent_shape(kind: str, geometry: Geometry, latent_channels: int) -> Size:
    """Shape of one latent for a generator of this kind."""
    if kind == "pixels":
        return (geometry.channels, *geometry.size)
    return (latent_channels, *scales_for(geometry.size)[0])
