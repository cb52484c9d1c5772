"""DP-SGD against slow references: gradients one by one, Opacus's clipping, the sampling rate, the size of the noise."""

import math

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from scipy import stats

from invcoss_common.config import DpConfig, ReplayConfig, TrainConfig
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model, reconstruction_loss
from invcoss_common.statistics import record_statistics
from invcoss_common.tokens import random_mask
from invcoss_site import dp_statistics
from invcoss_site.batches import TrainingBatches, whole_images
from invcoss_site.dp import (
    PoissonBatches,
    Private,
    Stream,
    clipped_sum,
    image_gradients,
    leave_private_gradient,
    used_parameters,
    visit_key,
)
from invcoss_site.dp_statistics import private_statistics, smooth_images
from invcoss_site.replay import ReplayPool, rehearsal
from invcoss_site.trainer import train

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))
KEY = bytes(range(32))
TRAIN = TrainConfig(steps=4, batch_size=4, precision="fp32", checkpoint_every_s=1e-9)
# Seven cases of one to three images.
CASE_OF = np.array([3, 0, 0, 1, 2, 4, 4, 4, 5, 6, 3], dtype=np.int32)
IMAGES = np.random.default_rng(0).random((len(CASE_OF), 1, 20, 20)).astype(np.float16)

each_geometry = pytest.mark.parametrize("geometry", [XRAY, CT], ids=["2d", "3d"])


def private(key=KEY, case_of=CASE_OF, **config):
    return Private(DpConfig(**config), case_of, key)


def model_of(*geometries):
    return build_model(SHAPE, geometries, seed=0)


def batch_of(geometry, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, *geometry.size, generator=generator)
    return images, random_mask(count, geometry.tokens, 0.75, generator)


def one_by_one(model, images, geometry, mask):
    """Gradients as anybody would take them: an image at a time, by an ordinary backward pass."""
    rows = []
    for row in range(len(images)):
        model.zero_grad(set_to_none=True)
        alone = mask.rows(row, row + 1)
        _, prediction = model(images[row : row + 1], geometry, alone)
        reconstruction_loss(prediction, images[row : row + 1], geometry, alone).backward()
        rows.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    model.zero_grad(set_to_none=True)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batches_of(private, train=TRAIN, images=IMAGES):
    how = {"batch_size": train.batch_size, "crop_scale": 0.2, "flip": True, "seed": 0}
    return PoissonBatches(TrainingBatches(images, XRAY, **how), private, train)


# ---- gradients --------------------------------------------------------------------------------------------------


@each_geometry
def test_the_gradient_of_each_image_is_that_of_the_image_alone(geometry):
    model = model_of(XRAY, CT)
    images, mask = batch_of(geometry)
    found = image_gradients(model, images, geometry, mask)  # before any other pass, so that nothing is cached yet
    expected = one_by_one(model, images, geometry, mask)
    assert set(found) == set(expected), "every parameter that gets a gradient, and no other"
    assert {"cls_token", f"mask_tokens.{geometry.family}"} <= set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
        assert found[name].flatten(1).norm(dim=1).min() > 0, name


def test_rows_are_clipped_as_opacus_does():
    model = model_of(XRAY)
    images, mask = batch_of(XRAY)
    gradients = image_gradients(model, images, XRAY, mask)
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()]).norm(dim=0)
    largest = float(norms.median())  # some are above it, some below
    optimiser = DPOptimizer(
        torch.optim.SGD(list(used_parameters(model, XRAY).values()), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=largest,
        expected_batch_size=5,
    )
    for name, parameter in used_parameters(model, XRAY).items():
        parameter.grad_sample = gradients[name]
    optimiser.clip_and_accumulate()
    for name, total in clipped_sum(gradients, largest).items():
        torch.testing.assert_close(total, used_parameters(model, XRAY)[name].summed_grad)


def test_no_row_adds_more_than_the_bound_and_broken_ones_nothing():
    rows = torch.tensor([[3.0, 4.0], [0.03, 0.04], [math.nan, 1.0], [math.inf, 1.0], [1e30, 1e30]])
    bias = torch.tensor([[0.0], [0.0], [1.0], [1.0], [0.0]])
    for row in range(len(rows)):
        alone = clipped_sum({"weight": rows[row : row + 1], "bias": bias[row : row + 1]}, 0.5)
        norm = torch.cat([alone["weight"], alone["bias"]]).norm()
        assert norm <= 0.5 if row < 2 else norm == 0, row
    total = clipped_sum({"weight": rows, "bias": bias}, 0.5)
    torch.testing.assert_close(total["weight"], torch.tensor([0.33, 0.44]), rtol=1e-5, atol=0)
    assert torch.equal(total["bias"], torch.zeros(1))
    assert clipped_sum({"weight": torch.zeros(0, 2)}, 0.5)["weight"].tolist() == [0, 0]


def test_without_clipping_and_noise_it_is_the_mean_gradient():
    model = model_of(XRAY, CT)
    images, mask = batch_of(XRAY, 7)
    quiet = private(noise_multiplier=1e-12, clip_norm=1e3)
    train = TRAIN.model_copy(update={"batch_size": 3, "accumulate": 5})  # 15 of 7 cases: all of them, three at a time
    leave_private_gradient(model, images, mask, XRAY, quiet, train, 0)
    found = {name: value.grad for name, value in model.named_parameters()}
    for name, rows in one_by_one(model, images, XRAY, mask).items():
        torch.testing.assert_close(found[name], rows.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert found["tokenisers.3d_2x4x4.weight"] is None, "no noise on what these images can't change"


@pytest.mark.parametrize(("cases", "divisor"), [(7, 4.0), (3, 3.0)])
def test_noise_has_the_size_that_was_asked_for(cases, divisor):
    model = model_of(XRAY)
    noisy = private(case_of=np.arange(cases, dtype=np.int32), noise_multiplier=1.5, clip_norm=0.3)

    def noise(step):
        none, mask = torch.zeros(0, 1, 16, 16), random_mask(0, XRAY.tokens, 0.75, torch.Generator())
        leave_private_gradient(model, none, mask, XRAY, noisy, TRAIN, step)
        return torch.cat([value.grad.flatten() for value in model.parameters()]).double() * divisor / (1.5 * 0.3)

    first = noise(0)
    assert len(first) > 15_000
    assert stats.kstest(first.numpy(), "norm").pvalue > 1e-4
    assert abs(float(first.std()) - 1) < 4 / math.sqrt(2 * len(first))
    assert torch.equal(noise(0), first), "a step that is done again has the same noise"
    assert abs(float(torch.corrcoef(torch.stack([first, noise(1)]))[0, 1])) < 4 / math.sqrt(len(first))


# ---- random numbers ---------------------------------------------------------------------------------------------


def test_streams_are_normal_and_unlike_each_other():
    draws = torch.stack([private().stream("noise", step).normal(20_000) for step in range(5)])
    draws = torch.cat([draws, private().stream("sample").normal(1, 20_000), Stream(KEY).normal(1, 20_000)])
    for row in draws:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4
    assert (torch.corrcoef(draws) - torch.eye(len(draws))).abs().max() < 4.5 / math.sqrt(20_000)


def test_a_stream_goes_on_where_it_was():
    stream = Stream(KEY)
    parts = torch.cat([stream.words(3), stream.words(0), stream.words(2, 2).flatten()])
    assert torch.equal(parts, Stream(KEY).words(7))
    assert int(parts.min()) >= 0 and int(parts.max()) < 2**52


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 255])
def test_every_bit_of_a_key_counts(bit):
    # Not so with torch's own: two seeds that differ above bit 31 give the same numbers on a CPU.
    other = (int.from_bytes(KEY, "little") ^ (1 << bit)).to_bytes(32, "little")
    same = private().stream("noise").words(1000) == private(other).stream("noise").words(1000)
    assert not same.any()


def test_each_visit_has_a_key_of_its_own_that_stays(tmp_path):
    key = visit_key(tmp_path / "a", "hand-off", "images")
    assert visit_key(tmp_path / "a", "hand-off", "images") == key
    others = [visit_key(tmp_path / "a", "hand-off", "other"), visit_key(tmp_path / "a", "other", "images")]
    others.append(visit_key(tmp_path / "b", "hand-off", "images"))  # another secret
    assert len({key, *others}) == 4
    (secret,) = (tmp_path / "a").iterdir()
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32
    names = {private(one).name for one in (key, *others)}
    assert len(names) == 4 and not any(key.hex() in name for name in names)


# ---- sampling ---------------------------------------------------------------------------------------------------


def marked():
    """Images that are all one shade, by which each is known; no two of a case have the same."""
    return np.stack([np.full((1, 20, 20), (row + 1) / 20) for row in range(len(CASE_OF))]).astype(np.float16)


def test_cases_are_drawn_independently_at_the_stated_rate_one_image_of_each():
    steps, sampled = 1500, private()
    assert sampled.cases == 7
    rate = sampled.sample_rate(TRAIN.model_copy(update={"batch_size": 1, "accumulate": 2}))
    assert rate == 2 / 7
    batches = batches_of(sampled, TRAIN.model_copy(update={"batch_size": 1, "accumulate": 2}), marked())
    drawn = np.zeros((steps, len(CASE_OF)), dtype=int)
    for step in range(steps):
        images, mask = batches[step]
        assert images.shape[1:] == (1, 16, 16) and mask.keep.shape == (len(images), 4)
        for image in images:
            drawn[step, round(float(image.mean()) * 20) - 1] += 1
    cases = np.stack([drawn[:, np.equal(CASE_OF, case)].sum(axis=1) for case in range(7)], axis=1)
    assert cases.max() == 1, "one image of a case in a step at most"
    spread = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(cases.mean(axis=0) - rate).max() < 4 * spread
    sizes = cases.sum(axis=1)
    assert sizes.min() == 0 and abs(sizes.var() - 7 * rate * (1 - rate)) < 0.15  # binomial: cases don't heed each other
    shares = drawn[:, np.equal(CASE_OF, 4)].sum(axis=0) / cases[:, 4].sum()
    assert np.abs(shares - 1 / 3).max() < 0.1, "any image of the case"


def test_a_case_is_cropped_and_masked_the_same_whoever_else_is_in_the_step():
    whole, part = (batches_of(private(), TRAIN.model_copy(update={"batch_size": size})) for size in (7, 3))
    seen = 0
    for step in range(6):
        (all_images, all_masks), (some_images, some_masks) = whole[step], part[step]
        assert len(all_images) == 7 > len(some_images)
        for image, keep in zip(some_images, some_masks.keep, strict=True):
            where = [row for row in range(7) if torch.equal(all_images[row], image)]
            assert len(where) == 1 and torch.equal(all_masks.keep[where[0]], keep)
            seen += 1
    assert seen > 3


def test_no_more_than_all_cases_are_in_a_step():
    assert private().sample_rate(TRAIN.model_copy(update={"batch_size": 64})) == 1.0
    images, mask = batches_of(private(), TRAIN.model_copy(update={"batch_size": 64}))[3]
    assert len(images) == len(mask.keep) == 7


# ---- training ---------------------------------------------------------------------------------------------------


def trained(how=None, checkpoint=None, watch=None, rehearse=None):
    model, given = model_of(XRAY, CT), {"checkpoint": checkpoint, "on_progress": watch, "rehearse": rehearse}
    return model, train(model, IMAGES, XRAY, TRAIN, seed=1, private=how or private(), **given)


def test_a_killed_training_goes_on_to_the_same_weights_and_no_loss_is_known(tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 2:
            raise Killed

    whole, progress = trained()
    assert progress.losses == [] and progress.skipped == 0 and progress.images == 16
    with pytest.raises(Killed):
        trained(checkpoint=tmp_path / "checkpoint", watch=kill)
    seen = []
    resumed, _ = trained(checkpoint=tmp_path / "checkpoint", watch=lambda progress: seen.append(progress.step))
    assert seen == [3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other, _ = trained(private(bytes(32)))
    assert not torch.equal(other.cls_token, whole.cls_token), "another secret is another noise"


def test_what_was_learned_before_is_rehearsed_beside_it():
    pools = [ReplayPool(np.random.default_rng(2).integers(0, 256, (5, 1, *CT.size), dtype=np.uint8), CT)]
    rehearse = rehearsal(model_of(XRAY, CT), pools, ReplayConfig(), batch_size=4, mask_ratio=0.75, seed=7)
    before, name = model_of(XRAY, CT), "tokenisers.3d_2x4x4.weight"
    alone, beside = trained()[0], trained(rehearse=rehearse)[0]
    assert torch.equal(alone.state_dict()[name], before.state_dict()[name])
    assert not torch.equal(beside.state_dict()[name], before.state_dict()[name])


# ---- statistics -------------------------------------------------------------------------------------------------


def statistics_of(how, images=IMAGES, model=None, batch_size=3):
    model = model or model_of(XRAY)
    return private_statistics(model, images, XRAY, 0.75, how, batch_size, lambda done, of: None)


def test_without_noise_they_are_the_statistics():
    case_of = np.arange(256, dtype=np.int32)
    images = (0.2 + 0.6 * smooth_images(XRAY, 256)).numpy().astype(np.float16)  # not the reference's own
    found = statistics_of(private(case_of=case_of, statistics_noise=1e-9), images, batch_size=64)
    expected = record_statistics(model_of(XRAY), whole_images(images, XRAY, 64), XRAY, 0.75, seed=1, draws=8)
    spread = expected.variance.sqrt()
    assert ((found.mean - expected.mean) / spread).square().mean().sqrt() < 0.05
    assert (found.variance / expected.variance).log().square().mean().sqrt() < 0.15
    assert abs(float(found.task_loss - expected.task_loss)) < 0.05
    assert int(found.images) == 256


def test_one_case_changes_their_sum_by_no_more_than_the_bound(monkeypatch):
    sums = []
    plain = dp_statistics.clipped_sum
    monkeypatch.setattr(dp_statistics, "clipped_sum", lambda *a: sums.append(plain(*a)[""]) or {"": sums[-1]})

    def total(images, case_of):
        sums.clear()
        statistics_of(private(case_of=case_of), images)
        return torch.stack(sums).sum(dim=0)

    extreme = IMAGES.copy()
    extreme[CASE_OF == 6] = np.indices((20, 20)).sum(axis=0) % 2 * 1000.0  # far beyond any image
    without, with_it = total(extreme[CASE_OF < 6], CASE_OF[CASE_OF < 6]), total(extreme, CASE_OF)
    change = float((with_it - without).norm())
    assert 0.99 * dp_statistics.LARGEST < change <= dp_statistics.LARGEST
    extreme[CASE_OF == 6] = np.nan
    assert torch.allclose(total(extreme, CASE_OF), without), "a broken case adds nothing"


def test_their_noise_is_as_stated_and_can_make_no_variance_negative(monkeypatch):
    monkeypatch.setattr(dp_statistics, "_shrunk", lambda values, noise: values)
    statistics = [statistics_of(private(bytes([n] * 32), statistics_noise=1e3)) for n in range(8)]
    quiet = statistics_of(private(statistics_noise=1e-9))
    errors = torch.tensor([float(one.task_loss) for one in statistics])
    assert errors.max() > 0 and errors.min() == 0, "a loss isn't negative either"
    means = torch.stack([one.mean - quiet.mean for one in statistics]).double()
    size = means.square().mean(dim=0).sqrt()  # by channel; spread of the reference times sqrt(K D) times noise / cases
    variance = torch.stack([one.variance for one in statistics])
    least = variance.amin(dim=0).double() / dp_statistics.LEAST_VARIANCE  # the floor: the reference's own variance
    expected = least.sqrt() * math.sqrt(quiet.mean.numel()) * 1e3 * dp_statistics.LARGEST / 7
    assert abs(float((size / expected).square().mean()) - 1) < 0.15
    assert float(variance.min()) > 0


def test_shrinking_leaves_strong_values_and_drops_noise():
    noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ((10 + noise) / dp_statistics._shrunk(10 + noise, 1.0)).max() < 1.02
    assert dp_statistics._shrunk(noise, 1.0).abs().max() < 0.4


@each_geometry
def test_made_up_images_are_of_the_range_of_real_ones(geometry):
    images = smooth_images(geometry, 4)
    assert images.shape == (4, 1, *geometry.size) and images.dtype == torch.float32
    assert torch.equal(images.flatten(1).amin(dim=1), torch.zeros(4))
    assert torch.equal(images.flatten(1).amax(dim=1), torch.ones(4))
    assert torch.equal(smooth_images(geometry, 4), images)
