"""Every term of the inversion loss against numbers worked out by hand and against its formula in numpy."""

import itertools

import numpy as np
import pytest
import torch

from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import TARGET_VARIANCE_FLOOR, build_model, reconstruction_loss
from invcoss_common.statistics import NormStatistics, norm_inputs, record_statistics
from invcoss_common.tokens import Mask, random_mask
from invcoss_server.inversion import VARIANCE_FLOOR, image_loss, norm_loss, repulsive_loss

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
PATHOLOGY = Geometry(channels=3, size=(8, 12), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))

each_geometry = pytest.mark.parametrize("geometry", [XRAY, PATHOLOGY, CT], ids=["grey", "colour", "volume"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stored(mean, variance):
    return NormStatistics(torch.tensor(mean), torch.tensor(variance), torch.tensor(1.0), torch.tensor(200))


# ---- task -------------------------------------------------------------------------------------------------------


def test_task_by_hand():
    # Patches are the rows of a 2 x 2 image, each pixel thrice for the three channels of the tokeniser. The second row,
    # 0.2 and 0.6, has mean 0.4 and variance 0.04: its target is -t and t with t^2 = 0.04 / 0.0401 = 0.9975062.
    rows = Geometry(channels=1, size=(2, 2), patch=(1, 2))
    images = torch.tensor([[[[0.0, 1.0], [0.2, 0.6]]]])
    mask = Mask(torch.tensor([[0]]), torch.tensor([[0, 1]]), torch.tensor([[False, True]]))

    def loss(second_row):
        prediction = torch.stack([torch.full((6,), 99.0), torch.tensor(second_row).repeat_interleave(3)])
        return reconstruction_loss(prediction[None], images, rows, mask).item()

    assert loss([0.0, 0.0]) == pytest.approx(0.9975062)
    assert loss([1.0, 1.0]) == pytest.approx(1 + 0.9975062)  # (1 - t)^2 and (1 + t)^2, on average
    assert loss([-1.0, 1.0]) == pytest.approx(1.5571e-6, rel=1e-2)  # (1 - t)^2


@each_geometry
def test_task_by_formula(geometry):
    images = torch.rand(3, geometry.channels, *geometry.size, generator=seeded())
    mask = random_mask(3, geometry.tokens, 0.75, seeded(1))
    prediction = torch.randn(3, geometry.tokens, geometry.patch_values, generator=seeded(2))
    errors = []
    for image, predicted, removed in zip(images.double().numpy(), prediction.numpy(), mask.removed, strict=True):
        image = np.concatenate([image] * (geometry.input_channels // len(image)))
        hidden = []
        for token, place in enumerate(itertools.product(*map(range, geometry.grid))):
            part = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, geometry.patch, strict=True))
            patch = np.moveaxis(image[(slice(None), *part)], 0, -1).ravel()
            target = (patch - patch.mean()) / np.sqrt(patch.var() + TARGET_VARIANCE_FLOOR)
            if removed[token]:
                hidden.append(np.mean((predicted[token] - target) ** 2))
        errors.append(np.mean(hidden))
    assert reconstruction_loss(prediction, images, geometry, mask).item() == pytest.approx(np.mean(errors), rel=1e-4)


# ---- norm -------------------------------------------------------------------------------------------------------


def test_norm_by_hand():
    # First layer: mean (2, 4), variance (1, 4) against mean (1, 4), variance (1, 2).
    #   channel 0: (2 - 1)^2 / 1.00001 = 0.99999       channel 1: (4 - 2)^2 / 2.00001^2 = 0.99999
    # Second layer: mean (1, 1), variance (1, 1) against mean (1, 3), variance (1, 1).
    #   channel 0: 0                                   channel 1: (1 - 3)^2 / 1.00001 = 3.99996
    first = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])  # one image, two tokens, two channels
    second = torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]]])  # two images, one token
    statistics = stored([[1.0, 4.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 1.0]])
    assert norm_loss([first], statistics).item() == pytest.approx(0.99999, rel=1e-6)
    assert norm_loss([first, second], statistics).item() == pytest.approx((0.99999 + 1.99998) / 2, rel=1e-6)


@pytest.mark.parametrize("tokens", [5, 33], ids=["2d", "3d"])
def test_norm_by_formula(tokens):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(5, 4, tokens, 8)).astype(np.float32)  # layers, images, tokens, channels
    mean, variance = random.normal(size=(5, 8)).astype(np.float32), random.uniform(0.1, 3, (5, 8)).astype(np.float32)
    flat = inputs.astype(np.float64).reshape(5, -1, 8)
    floor = variance + VARIANCE_FLOOR
    terms = (flat.mean(1) - mean) ** 2 / floor + (flat.var(1) - variance) ** 2 / floor**2
    loss = norm_loss([torch.from_numpy(layer) for layer in inputs], stored(mean, variance))
    assert loss.item() == pytest.approx(terms.mean(), rel=1e-4)


@each_geometry
def test_images_that_made_the_statistics_have_no_norm_loss(geometry):
    model = build_model(SHAPE, [geometry], seed=0)
    images = torch.rand(16, geometry.channels, *geometry.size, generator=seeded())
    statistics = record_statistics(model, [images], geometry, 0.75, seed=9, draws=1)
    with torch.no_grad(), norm_inputs(model) as inputs:
        model(images, geometry, random_mask(16, geometry.tokens, 0.75, seeded(9)))
        assert norm_loss(inputs, statistics).item() < 1e-6
        inputs.clear()
        model(0.5 * images, geometry, random_mask(16, geometry.tokens, 0.75, seeded(9)))
        assert norm_loss(inputs, statistics).item() > 0.05


def test_norm_is_relative_to_the_stored_spread():
    # Ten times the features and a hundred times the variances are the same images seen on another scale.
    features = torch.randn(4, 6, 8, generator=seeded())
    mean, variance = torch.randn(1, 8, generator=seeded(1)), torch.rand(1, 8, generator=seeded(2)) + 0.5
    loss = norm_loss([features], stored(mean.tolist(), variance.tolist()))
    scaled = norm_loss([10 * features], stored((10 * mean).tolist(), (100 * variance).tolist()))
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-3)


# ---- image ------------------------------------------------------------------------------------------------------


def test_image_by_hand():
    picture = torch.tensor([[0.0, 0.4], [1.0, 0.8]])  # down the columns |1.0|, |0.4|; along the rows |0.4|, |-0.2|
    assert image_loss(picture[None, None]).item() == pytest.approx(0.7 + 0.3)
    volume = torch.stack([picture, torch.zeros(2, 2)])  # through the slices 0, 0.4, 1.0, 0.8
    assert image_loss(volume[None, None]).item() == pytest.approx(0.55 + 0.7 / 2 + 0.3 / 2)


@pytest.mark.parametrize("shape", [(3, 1, 6, 5), (2, 3, 4, 7), (2, 1, 4, 6, 5)], ids=["grey", "colour", "volume"])
def test_image_by_formula(shape):
    images = np.random.default_rng(0).random(shape)
    expected = sum(np.mean(np.abs(np.diff(images, axis=axis))) for axis in range(2, len(shape)))
    assert image_loss(torch.from_numpy(images)).item() == pytest.approx(expected)


def test_a_flat_image_has_no_total_variation():
    assert image_loss(torch.full((2, 1, 4, 4, 4), 0.3)).item() == 0


# ---- repulsive --------------------------------------------------------------------------------------------------

SLOTS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
FEATURES = torch.tensor([[3.0, 4.0], [1.0, 0.0]])  # directions (0.6, 0.8) and (1, 0)


def test_repulsive_by_hand():
    # Squared cosines: image 0 with slots 0, 1, 2 0.36, 0.64, 1; image 1 with them 1, 0, 0.36. Images 0 and 1 own slots
    # 2 and 0, so four pairs count.
    everything = torch.tensor([True, True, True])
    own = torch.tensor([2, 0])
    assert repulsive_loss(FEATURES, SLOTS, own, everything).item() == pytest.approx((0.36 + 0.64 + 0 + 0.36) / 4)
    without_1 = torch.tensor([True, False, True])
    assert repulsive_loss(FEATURES, SLOTS, own, without_1).item() == pytest.approx((0.36 + 0.36) / 2)


def test_own_and_empty_slots_do_not_repel():
    own, alone = torch.tensor([2, 0]), torch.tensor([False, False, True])
    assert repulsive_loss(FEATURES[:1], SLOTS, own[:1], alone).item() == 0, "the only full slot is its own"
    assert repulsive_loss(FEATURES, SLOTS, own, torch.zeros(3, dtype=torch.bool)).item() == 0, "nothing is full"
    loss = repulsive_loss(FEATURES, SLOTS, own, alone).item()
    spoiled = SLOTS.clone()
    spoiled[:2] = 7.0  # empty, whatever they hold
    assert repulsive_loss(FEATURES, spoiled, own, alone).item() == loss == pytest.approx(0.36)


@pytest.mark.parametrize(("batch", "slots", "width"), [(4, 9, 16), (3, 20, 32)])
def test_repulsive_by_formula(batch, slots, width):
    random = np.random.default_rng(1)
    features, pool = random.normal(size=(batch, width)), random.normal(size=(slots, width))
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    own, filled = random.permutation(slots)[:batch], random.random(slots) < 0.7
    squares = [
        (features[i] @ pool[j] / np.linalg.norm(features[i])) ** 2
        for i in range(batch)
        for j in range(slots)
        if filled[j] and j != own[i]
    ]
    loss = repulsive_loss(*(torch.from_numpy(part) for part in (features, pool, own, filled)))
    assert loss.item() == pytest.approx(np.mean(squares))


def test_repulsion_turns_features_away_from_the_pool():
    features = FEATURES.clone().requires_grad_()
    before = repulsive_loss(features, SLOTS, torch.tensor([2, 0]), torch.ones(3, dtype=torch.bool))
    before.backward()
    moved = (features - 0.1 * features.grad).detach()
    assert repulsive_loss(moved, SLOTS, torch.tensor([2, 0]), torch.ones(3, dtype=torch.bool)) < before


# ---- all of them ------------------------------------------------------------------------------------------------


@each_geometry
def test_the_gradient_of_every_term_reaches_every_image(geometry):
    model = build_model(SHAPE, [geometry], seed=0).requires_grad_(False)
    real = torch.rand(8, geometry.channels, *geometry.size, generator=seeded(1))
    statistics = record_statistics(model, [real], geometry, 0.75, seed=0)
    images = torch.rand(3, geometry.channels, *geometry.size, generator=seeded(2)).requires_grad_()
    mask = random_mask(3, geometry.tokens, 0.75, seeded(3))
    with norm_inputs(model) as inputs:
        latent, prediction = model(images, geometry, mask)
    slots = torch.nn.functional.normalize(torch.randn(5, 32, generator=seeded(4)), dim=1)
    terms = {
        "task": reconstruction_loss(prediction, images, geometry, mask),
        "norm": norm_loss(inputs, statistics),
        "image": image_loss(images),
        "repulsive": repulsive_loss(latent[:, 1:].mean(1), slots, torch.arange(3), torch.ones(5, dtype=torch.bool)),
    }
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
        assert torch.isfinite(gradient).all(), name
        assert (gradient.flatten(1).abs().sum(dim=1) > 0).all(), name
