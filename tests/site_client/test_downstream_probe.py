"""Probes find a class that is in the features, and nothing where there is nothing."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from invcoss_common.errors import DataError
from invcoss_common.modality import SIZES, Geometry
from invcoss_common.model import build_model
from invcoss_site.downstream.encoder import image_encoder
from invcoss_site.downstream.metrics import classification_scorer, with_interval
from invcoss_site.downstream.probe import NEIGHBOURS, PENALTIES, PROBES, TEMPERATURE, features, probe

torch.set_num_threads(1)

each_probe = pytest.mark.parametrize("kind", PROBES)


def planted(cases, strength, seed, width=24, classes=3):
    """Gaussian features; the first axes carry the class with `strength` standard deviations."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (cases,), generator=random)
    x = torch.randn(cases, width, generator=random)
    x[:, :classes] += strength * torch.eye(classes)[labels]
    return x * torch.logspace(-2, 2, width), labels


def scores(kind, strength):
    train, val, (x, labels) = planted(150, strength, 0), planted(50, strength, 1), planted(100, strength, 2)
    p = probe(kind, train, val, x, 3)
    assert p.shape == (100, 3)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(100))
    return with_interval(classification_scorer(p, labels), [str(n) for n in range(100)], draws=200)


@each_probe
def test_a_planted_class_is_found(kind):
    found = scores(kind, strength=6)
    assert found["acc"].value > 0.9 and found["auc"].lo > 0.9


@each_probe
def test_nothing_is_found_where_nothing_is(kind):
    found = scores(kind, strength=0)
    assert found["auc"].lo < 0.5 < found["auc"].hi


@each_probe
def test_a_planted_class_is_found_in_images(kind):
    """Faint stripes across or along: both classes have the same grey values."""
    scale = SIZES["nano"]
    model = build_model(scale.model, [Geometry(channels=1, size=scale.patch[2], patch=scale.patch[2])], seed=0)
    encoder = image_encoder(model, (32, 32), 1, "x")
    labels = torch.arange(90) % 2
    images = 0.6 * torch.rand(90, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images[labels == 0, ..., ::4] += 0.2
    images[labels == 1, :, ::4] += 0.2
    x = features(encoder, images.split(16))
    assert x.shape == (90, scale.model.width) and not x.requires_grad and not encoder.training
    p = probe(kind, (x[:50], labels[:50]), (x[50:60], labels[50:60]), x[60:], 2)
    assert (p.argmax(dim=1) == labels[60:]).float().mean() > 0.9


def test_the_linear_layer_is_that_of_scikit_learn():
    (x, labels), val, (asked, _) = planted(150, 2, 0), planted(60, 2, 1), planted(40, 2, 2)
    ours = probe("linear", (x, labels), val, asked, 3)
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    best = None
    for penalty in PENALTIES:
        theirs = LogisticRegression(C=1 / (2 * penalty * len(x)), tol=1e-8, max_iter=2000)
        theirs.fit(((x - mean) / spread).double().numpy(), labels.numpy())
        p = torch.tensor(theirs.predict_proba(((val[0] - mean) / spread).double().numpy()))
        loss = torch.nn.functional.nll_loss(p.log(), val[1])
        if best is None or loss < best[0]:
            best = loss, theirs
    expected = best[1].predict_proba(((asked - mean) / spread).double().numpy())
    torch.testing.assert_close(ours, torch.tensor(expected).float(), rtol=1e-3, atol=1e-3)


def test_the_neighbours_are_those_of_scikit_learn():
    (x, labels), val, (asked, _) = planted(150, 2, 0), planted(60, 2, 1), planted(40, 2, 2)
    ours = probe("knn", (x, labels), val, asked, 3)
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    theirs = KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", weights=lambda distance: 2.718281828459045 ** (-distance / TEMPERATURE)
    ).fit(((x - mean) / spread).numpy(), labels.numpy())
    expected = theirs.predict_proba(((asked - mean) / spread).numpy())
    torch.testing.assert_close(ours, torch.tensor(expected).float(), rtol=1e-3, atol=1e-4)


@each_probe
def test_few_cases_are_enough_and_too_few_are_refused(kind):
    x, labels = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    assert probe(kind, (x, labels), (x, labels), x, 2).shape == (4, 2)
    with pytest.raises(DataError, match="fewer than two classes"):
        probe(kind, (x, labels * 0), (x, labels), x, 2)
    with pytest.raises(DataError, match="no validation cases"):
        probe(kind, (x, labels), (x[:0], labels[:0]), x, 2)


@each_probe
def test_a_feature_that_never_changes_does_no_harm(kind):
    x, labels = planted(60, 6, 0)
    x = torch.cat([x, torch.ones(60, 1)], dim=1)
    assert probe(kind, (x, labels), (x, labels), x, 3).isfinite().all()
