"""Inversion end to end at a tiny size: the same seed gives the same pool, whatever kills it on the way."""

import shutil

import numpy as np
import pytest
import torch

from invcoss_common.config import InversionConfig
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_common.statistics import record_statistics
from invcoss_server.generators import GENERATORS
from invcoss_server.inversion import invert

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
PATHOLOGY = Geometry(channels=3, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 16, 16), patch=(2, 8, 8))
# Nine images in groups of four: the last group takes the remainder of one. A checkpoint after every step.
CONFIG = InversionConfig(
    pool_size=9,
    images_per_generator=4,
    steps=6,
    batch_size=3,
    width=16,
    latent_channels=4,
    checkpoint_every_s=1e-9,
)


class Killed(Exception):
    """Stands for a kill between two steps."""


def inverted(folder, geometry=XRAY, seed=0, on_progress=None, **changes):
    torch.manual_seed(sum(map(ord, folder.name)))  # a pool must not depend on what was drawn before
    model = build_model(SHAPE, [geometry], seed=0)
    coarse = torch.rand(24, geometry.channels, *[4] * geometry.ndim, generator=torch.Generator().manual_seed(0))
    real = torch.nn.functional.interpolate(coarse, size=geometry.size)
    statistics = record_statistics(model, [real], geometry, 0.75, seed=0)
    config = CONFIG.model_copy(update=changes)
    return invert(
        model, statistics, geometry, config, mask_ratio=0.75, seed=seed, folder=folder, on_progress=on_progress
    )


def steps_until_killed(folder, kill_at, **how):
    """The numbers of the steps done until a kill after step `kill_at`."""
    steps = []

    def watch(progress):
        steps.append(progress.step)
        if progress.step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        inverted(folder, on_progress=watch, **how)
    return steps


def steps_to_the_end(folder, **how):
    steps = []
    pool = inverted(folder, on_progress=lambda progress: steps.append(progress.step), **how)
    return steps, pool


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("geometry", [XRAY, PATHOLOGY, CT], ids=["grey", "colour", "volume"])
def test_a_pool_has_the_size_and_type_that_sites_expect(tmp_path, kind, geometry):
    pool = inverted(tmp_path, geometry, generator=kind)
    assert pool.shape == (9, geometry.channels, *geometry.size) and pool.dtype == np.uint8
    assert all(image.max() > image.min() for image in pool)
    assert len({image.tobytes() for image in pool}) == 9


@pytest.mark.parametrize("geometry", [XRAY, CT], ids=["2d", "3d"])
def test_a_seed_fixes_the_pool(tmp_path, geometry):
    first, again, other = (
        inverted(tmp_path / name, geometry, seed) for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_checkpoints_and_progress_do_not_change_the_pool(tmp_path):
    steps, watched = steps_to_the_end(tmp_path / "often")
    assert steps == list(range(1, 13)), "two groups of six steps"
    assert np.array_equal(watched, inverted(tmp_path / "never", checkpoint_every_s=1e6))


@pytest.mark.parametrize(
    ("geometry", "kind"),
    [(XRAY, "invunet"), (CT, "invunet"), (PATHOLOGY, "dcgan"), (CT, "pixels")],
    ids=["2d invunet", "3d invunet", "2d dcgan", "3d pixels"],
)
def test_a_killed_inversion_goes_on_to_the_same_pool(tmp_path, geometry, kind):
    how = {"geometry": geometry, "generator": kind}
    whole = inverted(tmp_path / "whole", **how)
    folder = tmp_path / "killed"
    assert steps_until_killed(folder, 4, **how) == [1, 2, 3, 4]
    assert steps_until_killed(folder, 5, **how) == [5]
    assert steps_until_killed(folder, 9, **how) == [6, 7, 8, 9], "the first group ends at 6"
    steps, resumed = steps_to_the_end(folder, **how)
    assert steps == [10, 11, 12]
    assert np.array_equal(resumed, whole)
    for group in ("group-0000.safetensors", "group-0001.safetensors"):  # the slots in them are floats
        assert (folder / group).read_bytes() == (tmp_path / "whole" / group).read_bytes()


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path):
    whole = inverted(tmp_path / "whole")
    folder, kept = tmp_path / "killed", tmp_path / "kept"

    def watch(progress):
        if progress.step == 8:
            shutil.copy(folder / "group-0001.checkpoint", kept)
        if progress.step == 11:
            raise Killed

    with pytest.raises(Killed):
        inverted(folder, on_progress=watch)
    shutil.copy(kept, folder / "group-0001.checkpoint")
    steps, resumed = steps_to_the_end(folder)
    assert steps == [9, 10, 11, 12]
    assert np.array_equal(resumed, whole)


def test_an_inversion_killed_before_its_first_checkpoint_starts_again(tmp_path):
    how = {"checkpoint_every_s": 1e6}
    whole = inverted(tmp_path / "whole", **how)
    steps_until_killed(tmp_path / "killed", 9, **how)
    steps, resumed = steps_to_the_end(tmp_path / "killed", **how)
    assert steps == [7, 8, 9, 10, 11, 12], "the finished group is kept"
    assert np.array_equal(resumed, whole)


def test_a_finished_inversion_is_read_back_without_a_step(tmp_path):
    pool = inverted(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["group-0000.safetensors", "group-0001.safetensors"]
    steps, again = steps_to_the_end(tmp_path)
    assert steps == [] and np.array_equal(again, pool)


@pytest.mark.parametrize(
    ("pool_size", "group", "groups"), [(9, 4, 2), (8, 4, 2), (10, 4, 3), (3, 2, 1), (5, 64, 1), (2, 2, 1)]
)
def test_a_remainder_of_one_joins_the_group_before_it(tmp_path, pool_size, group, groups):
    steps, pool = steps_to_the_end(tmp_path, pool_size=pool_size, images_per_generator=group, steps=2)
    assert len(pool) == pool_size
    assert len(steps) == 2 * groups


def test_every_group_starts_from_latents_of_its_own(tmp_path):
    pool = inverted(tmp_path, pool_size=8, steps=1, repulsive_weight=0.0)
    assert not np.array_equal(pool[:4], pool[4:])


def test_the_loss_falls(tmp_path):
    losses = []

    def watch(progress):
        terms = (progress.task, progress.norm, progress.image, progress.repulsive)
        weights = (CONFIG.task_weight, CONFIG.norm_weight, CONFIG.image_weight, CONFIG.repulsive_weight)
        losses.append(np.dot(terms, weights))

    inverted(tmp_path, on_progress=watch, steps=40, pool_size=8, images_per_generator=8, batch_size=8)
    assert np.mean(losses[-10:]) < 0.85 * losses[0]
    assert np.mean(losses[-10:]) < np.mean(losses[10:20])


def test_each_weight_pulls_its_own_term_down(tmp_path):
    # Direct pixels: with nothing shared between images each term can be followed for itself.
    unweighted = {"task_weight": 0.0, "norm_weight": 0.0, "image_weight": 0.0, "repulsive_weight": 0.0}
    one_group = {"generator": "pixels", "steps": 30, "pool_size": 6, "images_per_generator": 6, "batch_size": 6}

    def last_steps(name, weights):
        seen = []
        inverted(tmp_path / name, on_progress=seen.append, **one_group, **weights)
        return seen[-5:]

    still = last_steps("none", unweighted)
    for term in ("task", "norm", "image", "repulsive"):
        pulled = last_steps(term, {**unweighted, f"{term}_weight": 1.0})
        assert np.mean([getattr(p, term) for p in pulled]) < 0.8 * np.mean([getattr(p, term) for p in still]), term


def test_the_model_comes_back_as_it_was(tmp_path):
    model = build_model(SHAPE, [XRAY], seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = record_statistics(model, [torch.rand(8, 1, 16, 16)], XRAY, 0.75, seed=0)
    invert(model, statistics, XRAY, CONFIG, mask_ratio=0.75, seed=0, folder=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(norm._forward_pre_hooks for norm in model.encoder_norms())
