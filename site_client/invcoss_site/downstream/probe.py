"""What frozen features tell about labels, in minutes on a CPU: nearest neighbours, and one linear layer.

N = cases, D = width of the encoder, K = classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from invcoss_common.errors import DataError
from invcoss_site.downstream.encoder import Encoder

Probe = Literal["knn", "linear"]
PROBES: tuple[Probe, ...] = get_args(Probe)

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the kNN, as usual for self-supervised models (Wu et al. 2018)
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # on the squared weights of the linear layer, one is chosen


@torch.no_grad()
def features(encoder: Encoder, batches: Iterable[Tensor]) -> Tensor:
    """The mean tokens (N, D) of all inputs, on the CPU in float32; the encoder is in evaluation mode afterwards."""
    encoder.eval()
    device = encoder.cls_token.device
    return torch.cat([encoder(batch.to(device)).pooled.float().cpu() for batch in batches])


def probe(kind: Probe, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], test: Tensor, classes: int) -> Tensor:
    """Probabilities (M, K) of test features (M, D), learned from features (N, D) and labels (N,) of training cases.

    Validation cases choose how much the linear layer is held back, and nothing else; the kNN does not use them.
    Features are scaled by what the training cases have. Raises DataError if training cases are of fewer than two
    classes, or if there are no validation cases.
    """
    known, labels = train
    if len(labels.unique()) < 2:
        raise DataError("the training cases of the probe have fewer than two classes; check its labels and split")
    if not len(val[1]):
        raise DataError("the probe has no validation cases, which choose its penalty; check the split")
    mean, spread = known.mean(dim=0), known.std(dim=0, correction=0).clamp(min=1e-6)
    known, seen, asked = ((part - mean) / spread for part in (known, val[0], test))
    if kind == "knn":
        return _vote(known, labels, asked, classes)
    layers = [_fit(known, labels, classes, penalty) for penalty in PENALTIES]
    losses = torch.tensor([float(F.cross_entropy(_apply(layer, seen), val[1])) for layer in layers])
    return _apply(layers[int(losses.argmin())], asked).softmax(dim=1).float()


def _vote(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Each of the nearest by angle votes for its class, more the nearer it is."""
    likeness = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    nearest = likeness.topk(min(NEIGHBOURS, len(known)), dim=1)
    votes = (nearest.values / TEMPERATURE).softmax(dim=1)
    return torch.zeros(len(asked), classes).scatter_add_(1, labels[nearest.indices], votes)


def _fit(known: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights and bias (D + 1, K) of the logistic regression: mean cross-entropy plus penalty times squared weights.

    It is convex; from zero, L-BFGS in float64 comes to the same layer on every machine.
    """
    inputs, layer = known.double(), torch.zeros(known.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([layer], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(_apply(layer, inputs), labels) + penalty * layer[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return layer.detach()


def _apply(layer: Tensor, inputs: Tensor) -> Tensor:
    return inputs.double() @ layer[:-1] + layer[-1]
