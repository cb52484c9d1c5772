"""The leak audit: copies are found however they are moved or lit, strangers pass, and the error rate is as stated."""

import json

import numpy as np
import pytest
import torch
from monai.networks.layers import GaussianFilter
from torch.nn import functional as F

from invcoss_common.errors import DataError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_site.audit import audit_against, audit_pool, calibrate, membership_auc, wilson
from invcoss_site.policy import AuditSettings

torch.set_num_threads(1)

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
FLAT = Geometry(channels=1, size=(32, 32), patch=(8, 8))
COLOUR = Geometry(channels=3, size=(32, 32), patch=(8, 8))
DEEP = Geometry(channels=1, size=(8, 16, 16), patch=(4, 8, 8))
QUICK = AuditSettings(scales=(0.93, 1.0, 1.07), extent_2d=24)
MODEL = build_model(SHAPE, [FLAT, DEEP], 0)


def strangers(count, geometry, seed):
    """Independent smooth random images (N, C, *size) uint8: no two have anything in common."""
    noise = torch.randn(count, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(seed))
    smooth = GaussianFilter(geometry.ndim, 2.0 if geometry.ndim == 2 else 1.2)(noise)
    return (255 * (0.5 + 0.2 * smooth / smooth.std()).clamp(0, 1)).round().to(torch.uint8).numpy()


def warped(images, scale=1.0, shift=0.0):
    """Images enlarged by `scale` and moved by `shift` pixels along the last axis."""
    axes = images.ndim - 2
    matrix = torch.cat([torch.eye(axes) / scale, torch.zeros(axes, 1)], dim=1)
    matrix[0, -1] = -2 * shift / images.shape[-1]
    values = torch.from_numpy(images).float()
    grid = F.affine_grid(matrix.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    moved = F.grid_sample(values, grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8).numpy()


def audited(pool, train, heldout, geometry=FLAT, settings=QUICK, model=MODEL):
    return audit_pool(pool, train, heldout, model, geometry, settings)


@pytest.fixture(scope="module")
def known():
    """A site of 60 training and 39 held-out images, and the former."""
    train = strangers(60, FLAT, 1)
    return train, calibrate(train, strangers(39, FLAT, 2), MODEL, FLAT, QUICK)


def test_planted_copies_are_found_and_nothing_else(known):
    train, site = known
    pool = strangers(12, FLAT, 3)
    pool[[2, 7]] = train[[5, 40]]
    audit = audit_against(pool, site)
    assert audit.copies == 2 and not audit.refused
    assert {i for i, bad in enumerate(audit.flagged) if bad} == {2, 7}
    assert [i for i, keep in enumerate(audit.kept) if not keep] == [2, 7]
    assert max(audit.items[2].score, audit.items[7].score) < 0.02


def test_noise_passes(known):
    noise = np.random.default_rng(4).integers(0, 256, (20, 1, 32, 32), dtype=np.uint8)
    audit = audit_against(noise, known[1])
    assert all(audit.kept) and audit.copies == 0 and audit.beyond.value == 0


def test_flat_images_pass(known):
    grey = np.full((3, 1, 32, 32), 120, np.uint8)
    assert all(audit_against(grey, known[1]).kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: warped(x, shift=2.0),
        lambda x: warped(x, shift=-1.4),
        lambda x: warped(x, scale=1.07),
        lambda x: warped(x, scale=0.93),
        lambda x: (40 + 0.6 * x).round().astype(np.uint8),
        lambda x: x[..., ::-1],
        lambda x: np.clip(x + np.random.default_rng(0).normal(0, 10, x.shape), 0, 255).astype(np.uint8),
        lambda x: GaussianFilter(2, 1.0)(torch.from_numpy(x).float()).round().to(torch.uint8).numpy(),
    ],
    ids=["shift", "part of a pixel", "larger", "smaller", "contrast", "mirrored", "noise", "blur"],
)
def test_changed_copies_are_found(known, change):
    train, site = known
    audit = audit_against(np.ascontiguousarray(change(train[:10])), site)
    assert all(audit.flagged)
    assert audit.refused and not any(audit.kept)  # a pool of copies only


def test_innocent_images_are_dropped_at_the_stated_rate():
    """Pool, training and held-out images of one distribution: 2 of 39 + 1 is the stated 5 %, here over 5 sites."""
    shares, deep = [], Geometry(channels=1, size=(16, 16), patch=(8, 8))
    for seed in range(5):
        audit = audited(*(strangers(n, deep, 100 * seed + n) for n in (120, 50, 39)), deep)
        assert audit.false_positive_rate == pytest.approx(0.05)
        shares.append(audit.beyond.value)
    assert 0.02 < np.mean(shares) < 0.09


def test_many_training_images_look_no_nearer_than_few_held_out_ones():
    audit = audited(strangers(60, FLAT, 11), strangers(300, FLAT, 12), strangers(20, FLAT, 13))
    assert audit.closer_by_chance == pytest.approx(300 / 320)
    assert audit.closer.low <= audit.closer_by_chance <= audit.closer.high
    assert 0.95 < audit.median_ratio < 1.05 and 0.95 < audit.null_median_ratio < 1.05


@pytest.mark.parametrize("geometry", [DEEP, COLOUR], ids=["3-D", "colour"])
def test_volumes_and_colour(geometry):
    train = strangers(30, geometry, 21)
    pool = strangers(8, geometry, 22)
    pool[3] = warped(train[9:10], shift=1.0)[0]
    audit = audited(pool, train, strangers(19, geometry, 23), geometry)
    assert audit.flagged[3] and sum(audit.flagged) <= 2


def test_larger_float_images_of_the_site_are_brought_to_the_pools_size():
    train = strangers(30, Geometry(channels=1, size=(48, 48), patch=(8, 8)), 31)
    pool = strangers(4, FLAT, 32)
    pool[0] = F.interpolate(torch.from_numpy(train[:1]).float(), size=(32, 32), mode="bilinear", antialias=True)[0]
    audit = audited(pool, (train / 255).astype(np.float16), strangers(19, FLAT, 33) / np.float32(255))
    assert audit.flagged[0] and audit.copies == 1


def test_the_same_input_gives_the_same_audit_in_any_chunks():
    arguments = strangers(7, FLAT, 41), strangers(20, FLAT, 42), strangers(19, FLAT, 43)
    once, again = audited(*arguments), audited(*arguments)
    assert once == again
    chunked = audited(*arguments, settings=QUICK.model_copy(update={"batch": 3}))
    assert chunked.kept == once.kept
    assert [i.score for i in chunked.items] == pytest.approx([i.score for i in once.items], abs=1e-3)


def test_progress_counts_every_image_once():
    seen = []
    audit_pool(
        *(strangers(n, FLAT, n) for n in (5, 6, 19)),
        MODEL,
        FLAT,
        QUICK.model_copy(update={"batch": 4}),
        lambda done, of: seen.append((done, of)),
    )
    steps = 5 + 6 + 2 * 19
    assert seen[-1] == (steps, steps) and seen == sorted(set(seen)) and all(of == steps for _, of in seen)


def test_the_summary_is_json_and_tells_no_single_images_scores(known):
    summary = audit_against(strangers(4, FLAT, 51), known[1]).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert "items" not in summary and len(summary["kept"]) == 4 and summary["heldout_images"] == 39


@pytest.mark.parametrize(("heldout", "rate"), [(1, 1 / 2), (2, 1 / 3), (18, 1 / 19), (19, 1 / 20), (39, 2 / 40)])
def test_the_fewer_images_are_held_out_the_stricter_the_threshold(heldout, rate):
    train, unseen = strangers(20, FLAT, 2), strangers(39, FLAT, 3)
    known = calibrate(train, unseen[:heldout], MODEL, FLAT, QUICK)
    assert known.false_positive_rate == pytest.approx(rate)
    scores = sorted(item.score for item in known.null)
    assert known.threshold == scores[1 if heldout == 39 else 0]  # the nearest held-out image, of 39 the second
    pool = strangers(6, FLAT, 4)
    pool[1] = train[7]
    audit = audit_against(pool, known)
    assert audit.flagged[1] and audit.copies == 1 and not audit.refused
    assert audit.refuse_share == pytest.approx(max(0.1, 2 * rate))
    assert all(np.isfinite([audit.threshold, audit.median_ratio, audit.null_median_ratio]))


def test_innocent_images_are_dropped_at_the_rate_that_is_told_for_few_held_out_ones():
    """With 3 held-out images a quarter, here over 8 sites, and such pools are not refused for it."""
    audits, small = [], Geometry(channels=1, size=(16, 16), patch=(8, 8))
    for seed in range(8):
        audits.append(audited(*(strangers(n, small, 100 * seed + n) for n in (40, 20, 3)), small))
    assert {audit.false_positive_rate for audit in audits} == {0.25}
    assert 0.1 < np.mean([audit.beyond.value for audit in audits]) < 0.4
    assert sum(audit.refused for audit in audits) <= 1


def test_a_pool_of_which_nothing_is_left_is_refused():
    train = strangers(20, FLAT, 5)
    audit = audited(train[:3], train, strangers(2, FLAT, 6))
    assert audit.beyond.low < audit.refuse_share and audit.copies == 3
    assert audit.refused and not any(audit.kept)


def test_too_few_images_are_an_error_that_says_how_many_are_needed(known):
    with pytest.raises(DataError, match=r"0 held-out and 5 training .* needs 1 and 2"):
        audited(strangers(2, FLAT, 1), strangers(5, FLAT, 2), strangers(1, FLAT, 3)[:0])
    with pytest.raises(DataError, match="1 training"):
        audited(strangers(2, FLAT, 1), strangers(1, FLAT, 2), strangers(3, FLAT, 3))
    with pytest.raises(DataError, match="no image"):
        audit_against(strangers(1, FLAT, 1)[:0], known[1])
    with pytest.raises(DataError, match="a held-out image"):
        membership(strangers(5, FLAT, 1), strangers(1, FLAT, 2)[:0])


def test_membership_by_one_held_out_image_tells_nothing_for_sure():
    auc = membership(strangers(5, FLAT, 1), strangers(1, FLAT, 2)).auc
    assert 0 <= auc.value <= 1 and (auc.low, auc.high) == (0, 1)


def membership(train, heldout):
    return membership_auc(MODEL, train, heldout, FLAT, mask_ratio=0.75, draws=2, batch_size=16, seed=0)


def test_membership_of_a_model_that_never_saw_either_is_chance():
    auc = membership(strangers(80, FLAT, 61), strangers(60, FLAT, 62)).auc
    assert auc.low < 0.5 < auc.high and 0.05 < auc.high - auc.low < 0.3


def test_membership_sees_a_difference_in_loss():
    """An untrained model predicts about nothing: flat images, whose targets are small, are the easier ones."""
    flat = np.full((30, 1, 32, 32), 99, np.uint8)
    auc = membership(flat, strangers(30, FLAT, 71)).auc
    assert auc.value > 0.95 and auc.high <= 1


def test_wilsons_interval():
    """Against the values of Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    some, none = wilson(81, 263, 0.95), wilson(0, 20, 0.95)
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=5e-5)
