"""Patches, masks and positions: nothing is lost, nothing is drawn twice, and small examples worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invcoss_common.modality import Geometry
from invcoss_common.tokens import patchify, random_mask, sincos_positions, unpatchify

quick = settings(max_examples=40, deadline=None)


def cpu_generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def geometries(draw):
    axes = draw(st.integers(1, 3))
    patch = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    grid = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    return Geometry(channels=draw(st.sampled_from([1, 3])), size=size, patch=patch)


@quick
@given(geometries(), st.integers(1, 3))
def test_unpatchify_undoes_patchify(geometry, batch):
    images = torch.rand(batch, geometry.channels, *geometry.size, generator=cpu_generator(0))
    patches = patchify(images, geometry.patch)
    assert patches.shape == (batch, geometry.tokens, geometry.channels * math.prod(geometry.patch))
    assert torch.equal(unpatchify(patches, geometry), images)


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((4,), (2,), [[0, 1], [2, 3]]),
        ((4, 4), (2, 2), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        ((2, 4), (1, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ((2, 2, 2), (1, 2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 2, 2), (2, 1, 1), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_patches_are_cut_in_row_major_order(size, patch, expected):
    image = torch.arange(math.prod(size)).reshape(1, 1, *size)
    assert patchify(image, patch)[0].tolist() == expected


def test_channels_come_last_within_a_patch():
    image = torch.tensor([[[[0, 1], [2, 3]], [[10, 11], [12, 13]], [[20, 21], [22, 23]]]])  # 3 channels, 2 x 2
    assert patchify(image, (1, 2))[0].tolist() == [[0, 10, 20, 1, 11, 21], [2, 12, 22, 3, 13, 23]]


@quick
@given(st.integers(1, 4), st.integers(2, 70), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_a_mask_hides_the_rest_of_what_it_keeps(batch, tokens, ratio, seed):
    mask = random_mask(batch, tokens, ratio, cpu_generator(seed))
    visible = mask.keep.shape[1]
    assert 1 <= visible <= tokens - 1
    assert visible == min(max(round(tokens * (1 - ratio)), 1), tokens - 1)
    assert mask.removed.shape == mask.restore.shape == (batch, tokens)
    for kept, removed, restore in zip(mask.keep, mask.removed, mask.restore, strict=True):
        assert sorted(kept.tolist()) == (~removed).nonzero().flatten().tolist()
        assert sorted(restore.tolist()) == list(range(tokens))


@quick
@given(st.integers(2, 40), st.floats(0.1, 0.9), st.integers(0, 2**40))
def test_restore_puts_visible_tokens_back_in_their_places(tokens, ratio, seed):
    values = torch.arange(2 * tokens).reshape(2, tokens)
    mask = random_mask(2, tokens, ratio, cpu_generator(seed))
    visible_first = torch.full_like(values, -1)
    visible_first[:, : mask.keep.shape[1]] = values.gather(1, mask.keep)
    assert torch.equal(visible_first.gather(1, mask.restore), values.masked_fill(mask.removed, -1))


def test_a_mask_follows_from_its_seed_and_differs_between_images():
    a, b, c = (random_mask(8, 64, 0.75, cpu_generator(seed)) for seed in (5, 5, 6))
    assert a.keep.shape == (8, 16)
    assert torch.equal(a.keep, b.keep) and torch.equal(a.restore, b.restore) and torch.equal(a.removed, b.removed)
    assert not torch.equal(a.removed, c.removed)
    assert len({tuple(row.tolist()) for row in a.removed}) == 8


def test_every_patch_is_removed_equally_often():
    share = random_mask(4000, 16, 0.75, cpu_generator(0)).removed.float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.04  # 6 standard deviations of a mean over 4000


def test_rows_of_a_mask_are_the_masks_of_those_images():
    mask = random_mask(5, 12, 0.5, cpu_generator(1))
    part = mask.rows(2, 4)
    assert torch.equal(part.keep, mask.keep[2:4])
    assert torch.equal(part.restore, mask.restore[2:4])
    assert torch.equal(part.removed, mask.removed[2:4])


@pytest.mark.parametrize("grid", [(64,), (8, 8), (4, 6, 6)])
def test_every_position_is_different(grid):
    positions = sincos_positions(grid, 24)
    assert positions.shape == (math.prod(grid), 24) and positions.dtype == torch.float32
    distances = torch.cdist(positions, positions) + torch.eye(len(positions))
    assert distances.min() > 1e-2


def test_positions_by_hand():
    # Width 4 on one axis has two frequencies, 1 and 10000^(-1/2) = 0.01: sine of both, then cosine of both.
    line = sincos_positions((2,), 4)
    assert line[0].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(line[1], torch.tensor([0.8414710, 0.0099998, 0.5403023, 0.9999500]))
    # Width 4 on two axes leaves each the frequency 1: sine and cosine of the row, then of the column.
    plane = sincos_positions((2, 3), 4)
    torch.testing.assert_close(plane[3], torch.tensor([0.8414710, 0.5403023, 0.0, 1.0]))  # row 1, column 0
    torch.testing.assert_close(plane[2], torch.tensor([0.0, 1.0, 0.9092974, -0.4161468]))  # row 0, column 2


@pytest.mark.parametrize(("grid", "width", "used"), [((3,), 5, 4), ((3, 3), 7, 4), ((2, 2, 2), 16, 12)])
def test_a_width_that_does_not_divide_is_filled_up_with_zeros(grid, width, used):
    positions = sincos_positions(grid, width)
    assert positions.shape == (math.prod(grid), width)
    assert (positions[:, used:] == 0).all() and (positions[-1, :used] != 0).all()
