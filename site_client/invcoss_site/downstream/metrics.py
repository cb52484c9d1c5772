"""What predictions are scored by (accuracy, AUC, F1; Dice, HD95), each with an interval by bootstrap over patients.

A scorer is a function from the weights of the cases to named scores, so that a bootstrap draw, in which some patients
count twice and some not at all, costs no new sorting and no new distances. The difference of two is a scorer too.

N = cases, K = classes, S = shape of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from invcoss_common.errors import TrainingError
from invcoss_common.seeds import derive_seed

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Scorer = Callable[[Array], dict[str, float]]

ONE_EMPTY_HD95 = 500.0  # as published: the distance if prediction or truth, but not both, is empty; in either unit


@dataclass(frozen=True)
class Score:
    """A figure and its interval; NaN where it is not defined, as an AUC without negatives."""

    value: float
    lo: float
    hi: float


def classification_scorer(probabilities: ArrayLike, labels: ArrayLike) -> Scorer:
    """Scores `acc`, `auc` and `f1` of probabilities (N, K) against labels (N,) in 0..K-1.

    With two classes AUC and F1 are those of class 1. With more, F1 is the mean over the classes that were predicted or
    are true, and AUC the mean over all pairs of classes that occur, one against one (Hand & Till 2001): scikit-learn's
    `macro` and `ovo`. Raises TrainingError if a probability is not finite.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(labels, dtype=np.int64)
    cases, classes = p.shape
    assert truth.shape == (cases,) and cases and truth.min() >= 0 and truth.max() < classes
    if not np.isfinite(p).all():
        raise TrainingError("the model predicts probabilities that are not finite; train it with a lower lr")
    guess = p.argmax(axis=1)
    asked = [1] if classes == 2 else range(classes)
    places = {k: np.unique(p[:, k], return_inverse=True)[1] for k in asked}  # equal probabilities share a place

    def score(weights: Array) -> dict[str, float]:
        confusion = _counts(truth, guess, weights, (classes, classes))
        auc = [_wins(places[k], truth, weights, classes)[k] for k in asked]
        return {
            "acc": float(confusion.trace() / confusion.sum()),
            "auc": float(np.nanmean(auc)) if np.isfinite(auc).any() else float("nan"),
            "f1": _f1(confusion),
        }

    return score


def _wins(places: Indices, truth: Indices, weights: Array, classes: int) -> Array:
    """(K, K): how often a case of class a is placed above one of class b; ties half, NaN where no such pair exists."""
    width = int(places.max()) + 1
    counts = _counts(truth, places, weights, (classes, width))
    below = counts.cumsum(axis=1) - counts / 2
    totals = counts.sum(axis=1)
    pairs = np.outer(totals, totals)
    np.fill_diagonal(pairs, 0)
    shares: Array = np.divide(counts @ below.T, pairs, out=np.full((classes, classes), np.nan), where=pairs > 0)
    return shares


def _counts(row: Indices, column: Indices, weights: Array, shape: tuple[int, int]) -> Array:
    """A table of `shape` with the weight of the cases of each row and column."""
    flat = np.bincount(row * shape[1] + column, weights, shape[0] * shape[1])
    return flat.astype(np.float64).reshape(shape)


def _f1(confusion: Array) -> float:
    hits, seen = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = np.divide(2 * hits, seen, out=np.zeros_like(seen), where=seen > 0)
    return float(f1[1] if len(f1) == 2 else f1[seen > 0].mean())


def dice(prediction: Mask, truth: Mask, *, plus_one: bool = False) -> float:
    """Overlap of two masks (S): 2 |A and B| / (|A| + |B|); 1 if both are empty.

    `plus_one` adds 1 to the denominator, as published for LiTS and VS; it is 0 then if both are empty.
    """
    assert prediction.shape == truth.shape and prediction.dtype == truth.dtype == np.bool_
    total = int(prediction.sum()) + int(truth.sum()) + plus_one
    return 2.0 * int((prediction & truth).sum()) / total if total else 1.0


def hd95(prediction: Mask, truth: Mask, spacing: Sequence[float] | None = None) -> float:
    """95th percentile of the distances between the surfaces of two masks (S), both ways taken together.

    In voxels, or in the unit of `spacing` (of each axis). 0 if both are empty, ONE_EMPTY_HD95 if one is. A surface
    voxel is one with a neighbour across a face that is not of the mask, or is outside the image: MedPy's definition.
    """
    assert prediction.shape == truth.shape and prediction.dtype == truth.dtype == np.bool_
    if not (prediction.any() and truth.any()):
        return ONE_EMPTY_HD95 if prediction.any() or truth.any() else 0.0
    unit = np.ones(truth.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    a, b = (np.argwhere(mask & ~binary_erosion(mask)) * unit for mask in (prediction, truth))
    return float(np.percentile(np.concatenate([KDTree(b).query(a)[0], KDTree(a).query(b)[0]]), 95))


def mask_scores(
    prediction: Mask,
    truth: Mask,
    names: Sequence[str],
    spacing_mm: Sequence[float] | None = None,
    *,
    plus_one: bool = False,
) -> dict[str, float]:
    """Scores of one case from masks (K, *S), one per name: `dice`, `hd95_voxels`, and `hd95_mm` if spacing is known.

    Each is the mean over the masks; with more than one, those of each follow as `dice_<name>` and so on.
    """
    assert len(prediction) == len(truth) == len(names)
    each = []
    for p, t in zip(prediction, truth, strict=True):
        scores = {"dice": dice(p, t, plus_one=plus_one), "hd95_voxels": hd95(p, t)}
        each.append(scores if spacing_mm is None else scores | {"hd95_mm": hd95(p, t, spacing_mm)})
    mean = {key: float(np.mean([scores[key] for scores in each])) for key in each[0]}
    if len(names) == 1:
        return mean
    return mean | {
        f"{key}_{name}": value for name, scores in zip(names, each, strict=True) for key, value in scores.items()
    }


def mean_scorer(cases: Sequence[Mapping[str, float]]) -> Scorer:
    """Means over cases of what `mask_scores` gave for each; `hd95_mm` is left out unless every case has it."""
    assert cases
    names = [name for name in cases[0] if all(name in case for case in cases)]
    values = np.array([[case[name] for name in names] for case in cases])

    def score(weights: Array) -> dict[str, float]:
        return dict(zip(names, map(float, weights @ values / weights.sum()), strict=True))

    return score


def difference(a: Scorer, b: Scorer) -> Scorer:
    """Scores of model a minus those of model b on the same cases; their interval is that of paired differences."""

    def score(weights: Array) -> dict[str, float]:
        other = b(weights)
        return {name: value - other[name] for name, value in a(weights).items()}

    return score


def with_interval(
    scorer: Scorer, patients: Sequence[str], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Score]:
    """Each score over all cases, with its percentile interval over `draws` samples of the patients with replacement.

    `patients` (N,) names the patient of each case; cases of one patient stay together. Draws in which a score is not
    defined are passed over. The same patients and seed give the same draws, whatever the scorer.
    """
    _, of_patient = np.unique(np.asarray(patients), return_inverse=True)
    count = int(of_patient.max()) + 1
    values = scorer(np.ones(len(of_patient)))
    random = np.random.default_rng(derive_seed(seed, "bootstrap"))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(draws):
        weights = np.bincount(random.integers(count, size=count), minlength=count)[of_patient]
        for name, value in scorer(weights.astype(np.float64)).items():
            drawn[name].append(value)
    return {name: Score(value, *_percentiles(np.array(drawn[name]), level)) for name, value in values.items()}


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    defined = values[np.isfinite(values)]
    if not defined.size:
        return float("nan"), float("nan")
    lo, hi = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)
