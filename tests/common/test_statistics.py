"""Normalisation statistics: exact against a direct computation, and refused when they don't fit the model."""

import numpy as np
import pytest
import torch

from invcoss_common.errors import WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model, reconstruction_loss
from invcoss_common.statistics import (
    norm_inputs,
    record_statistics,
    statistics_from_bytes,
    statistics_to_bytes,
)
from invcoss_common.tokens import random_mask
from invcoss_common.weights import tensors_to_bytes

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))

each_geometry = pytest.mark.parametrize("geometry", [XRAY, CT], ids=["2d", "3d"])


def images_of(geometry, count=10):
    return torch.rand(count, 1, *geometry.size, generator=torch.Generator().manual_seed(0))


def recorded(batch_size, draws=2, geometry=XRAY, seed=3):
    images = images_of(geometry)
    model = build_model(SHAPE, [geometry], seed=0)
    return record_statistics(model, images.split(batch_size), geometry, 0.75, seed=seed, draws=draws)


@each_geometry
def test_equal_to_mean_and_variance_of_all_features_in_float64(geometry):
    model = build_model(SHAPE, [geometry], seed=0)
    norms = [model.blocks[0].norm1, model.blocks[0].norm2, model.blocks[1].norm1, model.blocks[1].norm2, model.norm]
    seen = {norm: [] for norm in norms}
    handles = [norm.register_forward_hook(lambda norm, given, _: seen[norm].append(given[0])) for norm in norms]
    random = torch.Generator().manual_seed(3)
    losses = []
    with torch.no_grad():
        for batch in images_of(geometry).split(4):  # 4, 4 and 2 images, each with two masks
            for _ in range(2):
                mask = random_mask(len(batch), geometry.tokens, 0.75, random)
                _, prediction = model(batch, geometry, mask)
                losses += [float(reconstruction_loss(prediction, batch, geometry, mask))] * len(batch)
    for handle in handles:
        handle.remove()

    statistics = record_statistics(model, images_of(geometry).split(4), geometry, 0.75, seed=3)
    for layer, norm in enumerate(norms):
        features = np.concatenate([part.numpy().astype(np.float64).reshape(-1, 32) for part in seen[norm]])
        visible = round(geometry.tokens * 0.25)
        assert len(features) == 10 * 2 * (1 + visible), "class token and visible tokens of every image and mask"
        np.testing.assert_allclose(statistics.mean[layer], features.mean(axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(statistics.variance[layer], features.var(axis=0), rtol=1e-6, atol=1e-9)
    assert float(statistics.task_loss) == pytest.approx(np.mean(losses), rel=1e-6)
    assert int(statistics.images) == 10


def test_batches_do_not_matter_with_one_mask_per_image():
    # Masks come from one stream, image after image, so with one draw every image gets the same mask in any batch.
    whole, small = recorded(10, draws=1), recorded(3, draws=1)
    for name in vars(whole):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_batches_hardly_matter_with_more_masks():
    # With two draws the stream is shared out batch by batch: other batches mean other masks, but the same quantity.
    whole, small = recorded(10, draws=64), recorded(3, draws=64)
    assert not torch.equal(whole.mean, small.mean)
    spread = whole.variance.sqrt()
    assert ((whole.mean - small.mean).abs() / spread).max() < 0.2
    assert (small.variance / whole.variance).log().abs().max() < 0.2


def test_a_seed_fixes_them():
    assert statistics_to_bytes(recorded(4)) == statistics_to_bytes(recorded(4))
    assert statistics_to_bytes(recorded(4)) != statistics_to_bytes(recorded(4, seed=4))


def test_the_model_is_left_as_it_was():
    model = build_model(SHAPE, [XRAY], seed=0)
    record_statistics(model, [images_of(XRAY)], XRAY, 0.75, seed=0)
    assert not any(norm._forward_pre_hooks for norm in model.encoder_norms())
    with pytest.raises(KeyboardInterrupt), norm_inputs(model) as collected:
        model.encode(images_of(XRAY), XRAY)
        assert len(collected) == 5
        raise KeyboardInterrupt
    assert not any(norm._forward_pre_hooks for norm in model.encoder_norms())


def test_bytes_and_back():
    statistics = recorded(5)
    back = statistics_from_bytes(statistics_to_bytes(statistics), SHAPE)
    for name, tensor in vars(statistics).items():
        assert torch.equal(getattr(back, name), tensor) and getattr(back, name).dtype == tensor.dtype


REFUSED = {
    "missing": (lambda t: t.pop("variance"), "'variance' is missing"),
    "extra": (lambda t: t.update(thumbnail=torch.zeros(8, 8)), "'thumbnail'"),
    "one layer too many": (lambda t: t.update(mean=torch.zeros(6, 32)), "'mean'"),
    "one value for an image": (lambda t: t.update(task_loss=torch.zeros(10)), "'task_loss'"),
    "too fine": (lambda t: t.update(mean=t["mean"].double()), "'mean'"),
    "nan": (lambda t: t["mean"][0].fill_(torch.nan), "'mean'"),
    "infinite": (lambda t: t["variance"][4].fill_(torch.inf), "'variance'"),
    "nan loss": (lambda t: t["task_loss"].fill_(torch.nan), "'task_loss'"),
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_does_not_fit_the_model_is_refused(spoil):
    change, named = REFUSED[spoil]
    tensors = {name: tensor.clone() for name, tensor in vars(recorded(5)).items()}
    change(tensors)
    with pytest.raises(WeightsError, match=named) as caught:
        statistics_from_bytes(tensors_to_bytes(tensors), SHAPE)
    assert "\n" not in str(caught.value)


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(WeightsError, match=r"the model needs \(3, 32\)"):
        statistics_from_bytes(statistics_to_bytes(recorded(5)), SHAPE.model_copy(update={"depth": 1}))
