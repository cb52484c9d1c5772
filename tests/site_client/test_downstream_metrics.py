"""Scores agree with scikit-learn and a count by hand, at the edges too; intervals are those of patients."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from invcoss_common.errors import TrainingError
from invcoss_site.downstream.metrics import (
    ONE_EMPTY_HD95,
    classification_scorer,
    dice,
    difference,
    hd95,
    mask_scores,
    mean_scorer,
    with_interval,
)

CLOSE = {"rel": 0, "abs": 1e-6}


def predictions(cases, classes, seed, decimals=8):
    """Random probabilities that lean to the truth; few decimals make ties."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=cases)
    p = random.random((cases, classes)) + 0.4 * np.eye(classes)[labels]
    p = (p / p.sum(axis=1, keepdims=True)).round(decimals)
    p[:, -1] = 1 - p[:, :-1].sum(axis=1)
    return p, labels


def of_all(p, labels):
    return classification_scorer(p, labels)(np.ones(len(labels)))


@pytest.mark.parametrize("decimals", [8, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_classification_is_that_of_scikit_learn(classes, seed, decimals):
    p, labels = predictions(60, classes, seed, decimals)
    ours, guess = of_all(p, labels), p.argmax(axis=1)
    binary = classes == 2
    assert ours["acc"] == pytest.approx(accuracy_score(labels, guess), **CLOSE)
    assert ours["f1"] == pytest.approx(f1_score(labels, guess, average="binary" if binary else "macro"), **CLOSE)
    auc = roc_auc_score(labels, p[:, 1]) if binary else roc_auc_score(labels, p, multi_class="ovo")
    assert ours["auc"] == pytest.approx(auc, **CLOSE)


def test_a_class_that_is_not_there():
    p, labels = predictions(80, 4, seed=0)
    there = labels != 2
    p, labels = p[there], labels[there]
    ours, guess = of_all(p, labels), p.argmax(axis=1)
    assert (guess == 2).any()  # predicted, never true: counts as an F1 of 0
    assert ours["f1"] == pytest.approx(f1_score(labels, guess, average="macro", zero_division=0), **CLOSE)
    pairs = [
        np.mean([roc_auc_score(labels[of] == k, p[of, k]) for k in pair])
        for pair in itertools.combinations([0, 1, 3], 2)
        for of in [np.isin(labels, pair)]
    ]
    assert ours["auc"] == pytest.approx(np.mean(pairs), **CLOSE)

    p[:, 2] = 0  # neither predicted nor true: left out of the mean
    guess = p.argmax(axis=1)
    assert of_all(p, labels)["f1"] == pytest.approx(f1_score(labels, guess, average="macro"), **CLOSE)


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_alone_has_no_auc(only):
    p = np.array([[0.3, 0.7], [0.9, 0.1]])
    scores = of_all(p, np.array([only, only]))
    assert math.isnan(scores["auc"])
    assert scores["acc"] == 0.5 and scores["f1"] == (pytest.approx(2 / 3) if only else 0.0)


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_repetitions(classes):
    p, labels = predictions(40, classes, seed=5, decimals=2)
    weights = np.random.default_rng(0).integers(4, size=40)
    weighted = classification_scorer(p, labels)(weights.astype(float))
    assert weighted == pytest.approx(of_all(np.repeat(p, weights, axis=0), np.repeat(labels, weights)), **CLOSE)


def test_probabilities_that_are_no_numbers_are_refused():
    with pytest.raises(TrainingError, match="not finite"):
        classification_scorer([[0.5, math.nan]], [0])


def blob(shape, seed):
    """A random mask of connected pieces; some touch the border."""
    noise = np.random.default_rng(seed).random(shape)
    for axis in range(len(shape)):
        noise = noise + np.roll(noise, 1, axis)
    return noise > np.quantile(noise, 0.8)


def surface_by_hand(mask):
    inside = {tuple(place) for place in np.argwhere(mask)}
    steps = [s for s in itertools.product((-1, 0, 1), repeat=mask.ndim) if sum(map(abs, s)) == 1]
    return np.array(
        sorted(p for p in inside if any(tuple(np.add(p, s)) not in inside for s in steps)), dtype=float
    ).reshape(-1, mask.ndim)


def hd95_by_hand(a, b, spacing):
    distances = cdist(surface_by_hand(a) * spacing, surface_by_hand(b) * spacing)
    return np.percentile(np.concatenate([distances.min(axis=1), distances.min(axis=0)]), 95)


def single(shape, place):
    mask = np.zeros(shape, dtype=bool)
    mask[place] = True
    return mask


PAIRS = {
    "2-D": (blob((20, 24), 0), blob((20, 24), 1), (0.7, 2.5)),
    "3-D": (blob((6, 12, 11), 2), blob((6, 12, 11), 3), (5.0, 0.8, 0.9)),
    "equal": (blob((9, 9), 4), blob((9, 9), 4), (1.5, 3.0)),
    "one voxel each": (single((5, 8, 9), (0, 0, 0)), single((5, 8, 9), (4, 7, 8)), (3.0, 1.0, 1.0)),
    "one voxel": (single((20, 24), (19, 23)), blob((20, 24), 5), (1.0, 0.5)),
    "full": (np.ones((7, 8), dtype=bool), blob((7, 8), 6), (2.0, 1.0)),
}
each_pair = pytest.mark.parametrize(("prediction", "truth", "spacing"), PAIRS.values(), ids=PAIRS)


@each_pair
def test_masks_are_scored_as_by_hand(prediction, truth, spacing):
    assert dice(prediction, truth) == pytest.approx(f1_score(truth.ravel(), prediction.ravel()), **CLOSE)
    ones = np.ones(truth.ndim)
    for unit, given in ((ones, None), (np.array(spacing), spacing)):
        assert hd95(prediction, truth, given) == pytest.approx(hd95_by_hand(prediction, truth, unit), **CLOSE)


def test_empty_masks_as_published():
    some, none = blob((8, 8), 0), np.zeros((8, 8), dtype=bool)
    assert (dice(none, none), hd95(none, none), hd95(none, none, (2, 2))) == (1, 0, 0)
    for pair in ((some, none), (none, some)):
        assert (dice(*pair), hd95(*pair), hd95(*pair, (2, 2))) == (0, ONE_EMPTY_HD95, ONE_EMPTY_HD95)
    assert ONE_EMPTY_HD95 == 500
    assert dice(none, none, plus_one=True) == 0
    assert dice(some, some, plus_one=True) == pytest.approx(2 * some.sum() / (2 * some.sum() + 1))


def test_scores_of_a_case_are_means_and_those_of_each_mask():
    a, b, spacing = PAIRS["3-D"]
    case = mask_scores(np.stack([a, b]), np.stack([b, b]), ["organ", "tumour"], spacing)
    assert case["dice"] == pytest.approx((dice(a, b) + 1) / 2)
    assert case["hd95_mm_organ"] == hd95(a, b, spacing) and case["hd95_voxels_tumour"] == 0
    assert case["hd95_mm"] == pytest.approx(hd95(a, b, spacing) / 2)
    alone = mask_scores(a[None], b[None], ["organ"])
    assert alone == {"dice": dice(a, b), "hd95_voxels": hd95(a, b)}

    means = mean_scorer([{"dice": 1.0, "hd95_mm": 2.0}, {"dice": 0.5}])
    assert means(np.array([1.0, 1.0])) == {"dice": 0.75}  # one case has no known spacing
    assert means(np.array([1.0, 3.0])) == {"dice": 0.625}


def test_an_interval_is_as_wide_as_theory_says():
    right = np.random.default_rng(0).random(400) < 0.8
    scorer = mean_scorer([{"acc": float(r)} for r in right])
    score = with_interval(scorer, [str(n) for n in range(400)], seed=1)["acc"]
    deviation = math.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert score.value == right.mean()
    assert score.lo == pytest.approx(score.value - 1.96 * deviation, abs=0.3 * deviation)
    assert score.hi == pytest.approx(score.value + 1.96 * deviation, abs=0.3 * deviation)


def test_cases_of_one_patient_are_drawn_together():
    right = np.repeat(np.random.default_rng(0).random(40) < 0.7, 10)
    scorer = mean_scorer([{"acc": float(r)} for r in right])
    alone = with_interval(scorer, [str(n) for n in range(400)])["acc"]
    together = with_interval(scorer, [str(n // 10) for n in range(400)])["acc"]
    assert together.hi - together.lo > 2 * (alone.hi - alone.lo)
    assert with_interval(scorer, ["all"] * 400, draws=5)["acc"].lo == alone.value


def test_draws_are_the_same_again_and_paired():
    p, labels = predictions(60, 3, seed=0)
    patients = [str(n % 20) for n in range(60)]
    scorer = classification_scorer(p, labels)
    first = with_interval(scorer, patients, draws=50)
    assert first == with_interval(scorer, patients, draws=50)
    assert first != with_interval(scorer, patients, draws=50, seed=1)
    assert all((d.value, d.lo, d.hi) == (0, 0, 0) for d in with_interval(difference(scorer, scorer), patients).values())


def test_draws_without_a_class_are_passed_over():
    p, labels = predictions(6, 2, seed=1)
    labels[:] = [0, 0, 0, 0, 0, 1]
    auc = with_interval(classification_scorer(p, labels), list("abcdef"), draws=200)["auc"]
    assert 0 <= auc.lo <= auc.value <= auc.hi <= 1
    never = with_interval(classification_scorer(p, labels * 0), list("abcdef"), draws=5)["auc"]
    assert math.isnan(never.value) and math.isnan(never.lo) and math.isnan(never.hi)
