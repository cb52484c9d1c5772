"""Masked-reconstruction loss of a model on held-out images: one number, comparable across modalities and sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, masked_error, target_patches
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import random_mask


@torch.no_grad()
def heldout_loss(
    model: MultiModalMAE,
    images: Tensor,
    geometry: Geometry,
    *,
    mask_ratio: float,
    draws: int,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> float:
    """Mean loss over images (N, C, *size) in [0, 1] and `draws` masks that depend on `seed` only, not on batches.

    `on_progress(done, of)` counts images, each once a draw.
    """
    model.eval()
    device = model.cls_token.device
    total = 0.0
    for draw in range(draws):
        masks = random_mask(len(images), geometry.tokens, mask_ratio, generator_for(seed, "evaluate", draw))
        for start in range(0, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            batch = images[start:stop].to(device, torch.float32)
            mask = masks.rows(start, stop).to(device)
            _, prediction = model(batch, geometry, mask)
            total += float(masked_error(prediction, target_patches(batch, geometry), mask).sum())
            on_progress(draw * len(images) + stop, draws * len(images))
    return total / (len(images) * draws)
