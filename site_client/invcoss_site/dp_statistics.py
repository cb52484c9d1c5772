"""Normalisation statistics with differential privacy: one Gaussian release a visit, in place of `record_statistics`.

Each case gives one vector: its images' features, in units of the same model's features on made-up smooth images, which
everybody has. It is clipped, the vectors are summed, noise is added, and all else is worked out from that.

K = norm layers, D = encoder width, N = training images, B = cases at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, masked_error, target_patches
from invcoss_common.statistics import NormStatistics, norm_inputs, record_statistics
from invcoss_common.tokens import Mask, random_mask
from invcoss_site.batches import FloatImages, whole_images
from invcoss_site.dp import Private, clipped_sum, together

LARGEST = 2.0  # norm of a case's vector; most are between 1 and 2, for each of its three parts is about 1 at most
DRAWS = 2  # images, with a mask each, that a case's vector is the mean over
REFERENCE_IMAGES = 64
LEAST_SHARE = 0.01  # of a layer's mean reference variance that a channel has at least, so that none is divided by 0
LEAST_VARIANCE = 0.1  # of the reference's; noise must not make one negative


@torch.no_grad()
def private_statistics(
    model: MultiModalMAE,
    images: FloatImages,
    geometry: Geometry,
    mask_ratio: float,
    private: Private,
    batch_size: int,
    tell: Callable[[int, int], None],
) -> NormStatistics:
    """Noised statistics over `images` (N, C, *stored) in [0, 1]; `tell(done, of)` counts cases.

    A case that comes or goes changes the sum by a norm of LARGEST at most, and the noise's standard deviation is
    `statistics_noise` times that.
    """
    model.eval()
    device = model.cls_token.device
    smooth = (batch.to(device) for batch in smooth_images(geometry, REFERENCE_IMAGES).split(batch_size))
    reference = record_statistics(model, smooth, geometry, mask_ratio, seed=0)
    mean, variance = reference.mean.double(), reference.variance.double()
    spread = torch.maximum(variance, LEAST_SHARE * variance.mean(dim=1, keepdim=True)).sqrt()

    total = torch.zeros(2 * mean.numel() + 1, dtype=torch.float64)
    words = private.stream("statistics-sample").words(private.cases, DRAWS, 2)
    for start in range(0, private.cases, batch_size):
        cases = range(start, min(start + batch_size, private.cases))
        vectors = torch.zeros(len(cases), len(total), dtype=torch.float64, device=device)
        for draw in range(DRAWS):
            batch, mask = _drawn(images, geometry, mask_ratio, private, cases, words[:, draw])
            vectors += _vectors(model, batch.to(device), mask.to(device), geometry, mean.to(device), spread.to(device))
        total += clipped_sum({"": vectors / DRAWS}, LARGEST)[""].cpu()
        tell(cases.stop, private.cases)
    deviation = private.config.statistics_noise * LARGEST
    noised = (total + deviation * private.stream("statistics-noise").normal(len(total))) / private.cases

    root = math.sqrt(mean.numel())
    first, second = (root * noised[:-1]).reshape(2, *mean.shape)
    first, excess = _moments(first, second, (root * deviation / private.cases) ** 2)
    return NormStatistics(
        mean=(mean + spread * first).float(),
        variance=(spread.square() * (1 + excess).clamp_min(LEAST_VARIANCE)).float(),
        task_loss=(1 + noised[-1]).clamp_min(0.0).float(),
        images=torch.tensor(len(images), dtype=torch.int64),
    )


def _drawn(
    images: FloatImages, geometry: Geometry, mask_ratio: float, private: Private, cases: range, words: Tensor
) -> tuple[Tensor, Mask]:
    """An image (B, C, *size) and a mask of each of `cases`, whatever the others are; `words` (all cases, 2)."""
    rows, masks = [], []
    for case in cases:
        row, generator = private.drawn(case, words[case])
        rows.append(row)
        masks.append(random_mask(1, geometry.tokens, mask_ratio, generator))
    return next(whole_images(images[rows], geometry, len(rows))), together(masks)


def _vectors(
    model: MultiModalMAE, batch: Tensor, mask: Mask, geometry: Geometry, mean: Tensor, spread: Tensor
) -> Tensor:
    """One vector (B, 2 K D + 1) an image: mean and mean square of its features less the reference's, loss less 1."""
    with norm_inputs(model) as inputs:
        _, prediction = model(batch, geometry, mask)
        features = (torch.stack(inputs, dim=1).double() - mean[:, None]) / spread[:, None]  # (B, K, tokens, D)
    loss = masked_error(prediction, target_patches(batch, geometry), mask).double() - 1
    root = math.sqrt(mean.numel())
    first, second = features.mean(dim=2).flatten(1) / root, (features.square().mean(dim=2) - 1).flatten(1) / root
    return torch.cat([first, second, loss[:, None]], dim=1)


def _moments(first: Tensor, second: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and variance less 1 from noised mean and mean square less 1, each with noise of this mean square."""
    excess = second - first.square() + noise  # which is what the noise adds to the square
    signal = max(0.0, float(first.square().mean()) - noise)
    return _shrunk(first, noise), _shrunk(excess, noise * (1 + 4 * signal + 2 * noise))


def _shrunk(values: Tensor, noise: float) -> Tensor:
    """`values` shrunk towards 0 by the share of noise in them, whose mean square is `noise`."""
    power = float(values.square().mean())
    return values * max(0.0, (power - noise) / power)


def smooth_images(geometry: Geometry, count: int) -> Tensor:
    """Made-up images (count, C, *size), each from 0 to 1: Gaussian fields with amplitudes that fall as 1/f^2."""
    axes = range(geometry.ndim)
    grid = torch.meshgrid(*(torch.fft.fftfreq(extent) for extent in geometry.size), indexing="ij")
    frequency = torch.stack(grid).square().sum(dim=0).sqrt().clamp_min(1 / max(geometry.size))
    white = torch.randn(count, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(0))
    dims = [2 + axis for axis in axes]
    fields = torch.fft.ifftn(torch.fft.fftn(white, dim=dims) / frequency.square(), dim=dims).real.flatten(1)
    low, high = fields.amin(dim=1, keepdim=True), fields.amax(dim=1, keepdim=True)
    out: Tensor = ((fields - low) / (high - low)).reshape(white.shape)
    return out
