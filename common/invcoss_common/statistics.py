"""Normalisation statistics: what a site ships beside its weights, and what inversion matches (InvCoSS).

They are taken at the INPUT of every encoder LayerNorm, per channel, over images and tokens (class and visible), with
the model frozen (docs/method.md). K = 2 depth + 1 norm layers, D = encoder width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import MultiModalMAE, reconstruction_loss
from invcoss_common.tokens import random_mask
from invcoss_common.weights import Schema, tensors_from_bytes, tensors_to_bytes


@dataclass(frozen=True)
class NormStatistics:
    """Channel `mean` and `variance` (K, D) float32 at each norm's input, the mean masked loss and the image count."""

    mean: Tensor
    variance: Tensor
    task_loss: Tensor  # () float32: mean masked-reconstruction loss over the same pass
    images: Tensor  # () int64: training images that the statistics were taken over


@contextmanager
def norm_inputs(model: MultiModalMAE) -> Iterator[list[Tensor]]:
    """Collect the input (B, T, D) of every encoder norm during each forward pass inside the context, in order."""
    collected: list[Tensor] = []

    def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        collected.append(inputs[0])

    handles = [norm.register_forward_pre_hook(collect) for norm in model.encoder_norms()]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_statistics(
    model: MultiModalMAE, batches: Iterable[Tensor], geometry: Geometry, mask_ratio: float, seed: int, draws: int = 2
) -> NormStatistics:
    """Exact statistics over one pass of `batches` (each (B, C, *size) in [0, 1]) with `draws` masks per image."""
    model.eval()
    norms = len(model.encoder_norms())
    total = torch.zeros(norms, model.shape.width, dtype=torch.float64)
    squares = torch.zeros_like(total)
    rows, loss_sum, images = 0, 0.0, 0
    generator = torch.Generator().manual_seed(seed)
    with norm_inputs(model) as inputs:
        for batch in batches:
            images += len(batch)
            for _ in range(draws):
                mask = random_mask(len(batch), geometry.tokens, mask_ratio, generator).to(batch.device)
                _, prediction = model(batch, geometry, mask)
                loss_sum += float(reconstruction_loss(prediction, batch, geometry, mask)) * len(batch)
                for layer, features in enumerate(inputs):
                    flat = features.reshape(-1, features.shape[-1]).double()
                    total[layer] += flat.sum(dim=0).cpu()
                    squares[layer] += flat.square().sum(dim=0).cpu()
                rows += inputs[0].shape[0] * inputs[0].shape[1]
                inputs.clear()
    mean = total / rows
    variance = (squares / rows - mean.square()).clamp_min(0.0)
    return NormStatistics(
        mean=mean.float(),
        variance=variance.float(),
        task_loss=torch.tensor(loss_sum / (images * draws), dtype=torch.float32),
        images=torch.tensor(images, dtype=torch.int64),
    )


def statistics_schema(shape: ModelShape) -> Schema:
    layers = (2 * shape.depth + 1, shape.width)
    return {
        "mean": (layers, torch.float32),
        "variance": (layers, torch.float32),
        "task_loss": ((), torch.float32),
        "images": ((), torch.int64),
    }


def statistics_to_bytes(statistics: NormStatistics) -> bytes:
    return tensors_to_bytes(vars(statistics))


def statistics_from_bytes(data: bytes, shape: ModelShape) -> NormStatistics:
    """Parse statistics for a model of this shape; raises WeightsError when they don't fit or are not finite."""
    return NormStatistics(**tensors_from_bytes(data, statistics_schema(shape)))
