"""Masks of whole images from a model of a fixed input size: a sliding window, and the mean over mirror images."""

from __future__ import annotations

from itertools import combinations

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

SIGMA = {2: 1 / 4, 3: 1 / 8}  # of the windows' Gaussian weights, as a share of the window; as published


@torch.no_grad()
def segment(
    model: nn.Module,
    images: Tensor,
    window: tuple[int, ...],
    *,
    overlap: float = 0.5,
    flips: bool = True,
    batch: int = 4,
) -> Tensor:
    """Probabilities (B, K, *S) on the CPU, from images (B, C, *S) of any size, by a model that gives logits.

    The model sees windows of shape `window`, `batch` at a time; smaller images are filled up with 0. Windows overlap
    by that share of their length and count most in their middle. `flips` averages over all mirror images: 4 in 2-D, 8
    in 3-D. The model is in evaluation mode afterwards.
    """
    model.eval()
    device = next(model.parameters()).device
    axes = range(2, 2 + len(window))
    mirrors = [chosen for count in range(len(window) + 1) for chosen in combinations(axes, count)] if flips else [()]

    def probabilities(windows: Tensor) -> Tensor:
        total = sum(model(windows.flip(mirror)).float().sigmoid().flip(mirror) for mirror in mirrors)
        assert isinstance(total, Tensor)
        return total / len(mirrors)

    merged = sliding_window_inference(
        images,
        roi_size=window,
        sw_batch_size=batch,
        predictor=probabilities,
        overlap=overlap,
        mode="gaussian",
        sigma_scale=SIGMA[len(window)],
        sw_device=device,
        device="cpu",
    )
    assert isinstance(merged, Tensor)
    return merged
