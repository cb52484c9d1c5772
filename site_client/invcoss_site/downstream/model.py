"""A task's whole model: the encoder with its head, behind the scale of values that pre-training knows.

B = batch, C = channels, K = classes, L = tokens; S = shape of one input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from invcoss_common.model import MultiModalMAE
from invcoss_common.seeds import derive_seed
from invcoss_site.downstream.encoder import DROP_PATH, Encoder, from_scratch, image_encoder, pretrained, text_encoder
from invcoss_site.downstream.heads import Classifier, Segmenter
from invcoss_site.downstream.task import TEXT, Task


class OnTask(nn.Module):
    """An encoder, or one with its head, that takes what a task's cases hold."""

    def __init__(self, task: Task, inner: nn.Module) -> None:
        super().__init__()
        self.task, self.inner = task, inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(entering(self.task, x))
        return out


def entering(task: Task, x: Tensor) -> Tensor:
    """Images (B, C, *S) as pre-training showed them, about in [0, 1]; tokens (B, L) as they are.

    Values of mean 0 and SD 1, or near that by a window, get mean 1/2 and SD 1/4. This is done here and not when a case
    is read, because the published augmentation and the filling with 0 are for values of mean 0.
    """
    return x if task.input == TEXT or task.intensity == "unit" else 0.5 + 0.25 * x


def trunk(weights: Path, *, random_init: bool, seed: int) -> MultiModalMAE:
    """The model in the file `weights`, or one of its size with random initial weights. Raises WeightsError."""
    model = pretrained(weights)
    return from_scratch(model, seed) if random_init else model


def task_encoder(
    task: Task, model: MultiModalMAE, vocabulary: int, origin: Path, seed: int, *, drop_path: float = 0.0
) -> Encoder:
    """The encoder of a task's inputs, on the trunk of `model`, which came from `origin`. Raises as `image_encoder`.

    The table of `vocabulary` tokens, for text, is random: pre-training had none.
    """
    if task.input != TEXT:
        return image_encoder(model, task.size, task.channels, origin, drop_path=drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "table"))
        return text_encoder(model, vocabulary, task.size[0], drop_path=drop_path)


def task_model(task: Task, model: MultiModalMAE, vocabulary: int, origin: Path, seed: int) -> OnTask:
    """The model to fine-tune, which gives logits (B, K) of classes or (B, K, *S) of masks.

    The same seed gives the same head, whatever the trunk. Raises WeightsError or DataError if they don't fit.
    """
    encoder = task_encoder(task, model, vocabulary, origin, seed, drop_path=DROP_PATH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        classes = len(task.classes)
        if task.kind == "classify":
            return OnTask(task, Classifier(encoder, classes, mlp=task.mlp))
        return OnTask(task, Segmenter(encoder, classes, origin))
