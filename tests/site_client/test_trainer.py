"""The training loop: resumed runs end where uninterrupted ones do, and bad numbers are skipped, counted and bounded."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from invcoss_common.config import ReplayConfig, TrainConfig
from invcoss_common.errors import TrainingError, WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model, reconstruction_loss
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import random_mask
from invcoss_site.batches import TrainingBatches
from invcoss_site.replay import ReplayPool, rehearsal
from invcoss_site.trainer import Progress, learning_rate, make_optimiser, steps_for, train

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))
MRI = Geometry(channels=1, size=(4, 8, 8), patch=(4, 4, 4))
# Ten images in batches of four: steps and epochs fall apart. A checkpoint after every step.
CONFIG = TrainConfig(steps=8, batch_size=4, lr=1e-2, precision="fp32", checkpoint_every_s=1e-9)
IMAGES = {
    XRAY: np.random.default_rng(0).random((10, 1, 20, 20)).astype(np.float16),
    CT: np.random.default_rng(1).random((10, 1, *CT.size)).astype(np.float16),
}


class Killed(Exception):
    """Stands for a kill between two steps."""


def fresh_model(seed=0):
    return build_model(SHAPE, [XRAY, CT, MRI], seed)


def old_modalities():
    """Rehearsal of the other two families, as in a third stage."""
    random = np.random.default_rng(2)
    pools = [ReplayPool(random.integers(0, 256, (5, 1, *g.size), dtype=np.uint8), g) for g in (CT, MRI)]
    return rehearsal(fresh_model(5), pools, ReplayConfig(), batch_size=4, mask_ratio=0.75, seed=7)


def trained(geometry=XRAY, checkpoint=None, on_progress=None, rehearse=None, images=None, seed=7, flip=True, **changes):
    """A fresh model after training, and its progress."""
    model = fresh_model()
    progress = train(
        model,
        IMAGES[geometry] if images is None else images,
        geometry,
        CONFIG.model_copy(update=changes),
        seed=seed,
        flip=flip,
        rehearse=rehearse,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    return model, progress


def killed_after(step, **how):
    def watch(progress):
        if progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        trained(on_progress=watch, **how)


def same_weights(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def changed_weights(model):
    before = fresh_model().state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- resuming ---------------------------------------------------------------------------------------------------

KINDS = {
    "2d": dict,
    "3d": lambda: {"geometry": CT},
    "replay": lambda: {"rehearse": old_modalities()},
    "accumulated": lambda: {"accumulate": 2},
    "accumulated with replay": lambda: {"accumulate": 2, "rehearse": old_modalities()},
    "bf16": lambda: {"precision": "bf16"},
    "workers": lambda: {"workers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, kind):
    whole, expected = trained(**KINDS[kind]())
    checkpoint = tmp_path / "checkpoint"
    killed_after(3, checkpoint=checkpoint, **KINDS[kind]())
    killed_after(4, checkpoint=checkpoint, **KINDS[kind]())
    seen = []
    resumed, progress = trained(checkpoint=checkpoint, on_progress=lambda p: seen.append(p.step), **KINDS[kind]())
    assert seen == [5, 6, 7, 8]
    assert same_weights(resumed, whole)
    assert progress.losses == expected.losses and len(progress.losses) == 8
    assert (progress.step, progress.skipped, progress.images) == (8, 0, expected.images)


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path):
    how = {"accumulate": 2, "rehearse": old_modalities()}
    whole, expected = trained(**how)
    checkpoint, kept = tmp_path / "checkpoint", tmp_path / "kept"

    def watch(progress):
        if progress.step == 3:
            shutil.copy(checkpoint, kept)
        if progress.step == 6:
            raise Killed

    with pytest.raises(Killed):
        trained(checkpoint=checkpoint, on_progress=watch, **how)
    resumed, progress = trained(checkpoint=kept, **how)
    assert same_weights(resumed, whole)
    assert progress.losses == expected.losses


def test_a_checkpoint_waits_for_its_time_and_for_the_end(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    killed_after(7, checkpoint=checkpoint, checkpoint_every_s=1e6)
    assert not checkpoint.exists()
    model, _ = trained(checkpoint=checkpoint, checkpoint_every_s=1e6)
    assert checkpoint.exists()

    seen = []  # a finished training is read back without a step
    again, progress = trained(checkpoint=checkpoint, on_progress=seen.append)
    assert seen == [] and progress.step == 8 and same_weights(again, model)


def test_checkpoints_do_not_change_the_weights(tmp_path):
    assert same_weights(trained(checkpoint=tmp_path / "checkpoint")[0], trained()[0])


def test_skipped_steps_are_remembered_over_a_kill(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    how = {"rehearse": nan_at({1, 2, 5})}
    whole, expected = trained(**how)
    killed_after(4, checkpoint=checkpoint, **how)
    resumed, progress = trained(checkpoint=checkpoint, **how)
    assert same_weights(resumed, whole)
    assert progress.skipped == expected.skipped == 3 and progress.losses == expected.losses


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    trained(checkpoint=checkpoint)
    wider = build_model(SHAPE.model_copy(update={"decoder_width": 32}), [XRAY, CT, MRI], 0)
    with pytest.raises(WeightsError, match="decoder"):
        train(wider, IMAGES[XRAY], XRAY, CONFIG, seed=7, checkpoint=checkpoint)


# ---- seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [XRAY, CT], ids=["2d", "3d"])
def test_a_seed_fixes_the_weights(geometry):
    torch.manual_seed(1)
    first, progress = trained(geometry)
    torch.manual_seed(2)  # nothing is drawn from the global stream
    again, same_progress = trained(geometry)
    assert same_weights(first, again) and progress.losses == same_progress.losses
    assert not same_weights(first, trained(geometry, seed=8)[0])


def test_the_loss_falls():
    coarse = torch.rand(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear").numpy().astype(np.float16)
    model, progress = trained(images=smooth, steps=30, batch_size=16)
    assert np.mean(progress.losses[-5:]) < 0.75 * progress.losses[0]
    assert not model.training
    assert progress.images == 30 * 16 and progress.images_per_s > 0 and 0 <= progress.data_wait_share <= 1


def test_progress_before_the_first_step_divides_by_nothing():
    assert (Progress().images_per_s, Progress().data_wait_share) == (0, 0)


# ---- what is trained --------------------------------------------------------------------------------------------


def test_without_rehearsal_nothing_of_another_family_moves():
    alone, _ = trained()
    of_volumes = {name for name in alone.state_dict() if "3d_" in name}
    assert len(of_volumes) == 2 * 5, "tokeniser, mask token and head of both families"
    assert changed_weights(alone) == set(alone.state_dict()) - of_volumes
    together, _ = trained(rehearse=old_modalities())
    assert changed_weights(together) == set(together.state_dict())
    assert not same_weights(alone, together)


def test_every_part_of_an_accumulated_step_is_masked_anew():
    same = np.repeat(IMAGES[CT][:1], 10, axis=0)  # with one mask for both parts the second part would teach nothing
    once, twice = (trained(CT, images=same, flip=False, accumulate=parts, steps=1)[0] for parts in (1, 2))
    assert not same_weights(once, twice)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_of_a_step_is_the_mean_over_its_parts(parts):
    model, seen = fresh_model(), []

    def look(model, step):
        seen.append(model.blocks[0].attn.qkv.weight.grad.clone())
        return 0.0 * model.cls_token.sum()

    config = CONFIG.model_copy(update={"accumulate": parts, "steps": 1})
    train(copy.deepcopy(model), IMAGES[XRAY], XRAY, config, seed=7, rehearse=look)
    batches = TrainingBatches(IMAGES[XRAY], XRAY, batch_size=4, crop_scale=config.crop_scale, flip=True, seed=7)
    losses = []
    for part in range(parts):
        mask = random_mask(4, XRAY.tokens, config.mask_ratio, generator_for(7, "mask", 0, part))
        _, prediction = model(batches[part], XRAY, mask)
        losses.append(reconstruction_loss(prediction, batches[part], XRAY, mask))
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(seen, [model.blocks[0].attn.qkv.weight.grad])


def test_the_gradient_is_clipped(tmp_path):
    def norm_of_the_first_gradient(clip_norm):
        checkpoint = tmp_path / f"{clip_norm}"
        trained(checkpoint=checkpoint, clip_norm=clip_norm, steps=1)
        means = [tensor for name, tensor in load_file(checkpoint).items() if name.startswith("adam_mean/")]
        return torch.cat([mean.flatten() for mean in means]).norm().item() / (1 - CONFIG.betas[0])

    free = norm_of_the_first_gradient(1e6)
    assert free > 0.1
    assert norm_of_the_first_gradient(0.1) == pytest.approx(0.1, rel=1e-3)
    assert norm_of_the_first_gradient(2 * free) == pytest.approx(free, rel=1e-6)


def test_rehearsal_without_weight_is_no_rehearsal():
    def silent(model, step):
        return 0.0 * model.cls_token.sum()

    assert same_weights(trained(rehearse=silent)[0], trained()[0])


def test_weight_decay_is_for_matrices_only():
    model = fresh_model()
    decayed, plain = make_optimiser(model, CONFIG).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.9, 0.95)
    assert all(names[p].endswith("weight") and "norm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith("bias") or "norm" in names[p] or "token" in names[p] for p in plain["params"])
    assert {"cls_token", "mask_tokens.2d_4x4"} <= {names[p] for p in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_weight_decay_shrinks():
    def size(weight_decay):
        model, _ = trained(weight_decay=weight_decay, steps=4)
        return model.blocks[0].mlp.fc1.weight.norm()

    assert size(1.0) < size(0.0)


# ---- schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.5),  # two of ten steps warm up
        (1, 1.0),
        (2, 1.0),  # cosine over the other eight: (1 + cos(pi k / 8)) / 2
        (4, 0.8535534),
        (6, 0.5),
        (8, 0.1464466),
        (9, 0.0380602),
    ],
)
def test_learning_rate_by_hand(step, share):
    config = TrainConfig(steps=10, lr=0.01, warmup=0.2)
    assert learning_rate(step, 10, config) == pytest.approx(0.01 * share)


def test_learning_rate_at_the_edges():
    assert learning_rate(0, 1, TrainConfig(steps=1, lr=0.01)) == 0.01
    assert learning_rate(0, 50, TrainConfig(steps=50, lr=0.01, warmup=0.0)) == 0.01
    everything = TrainConfig(steps=4, lr=0.01, warmup=1.0)
    assert [learning_rate(step, 4, everything) for step in range(4)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0.0, 1e-3), (4, 1.0, 0.25e-3)])
def test_the_first_step_is_as_long_as_the_learning_rate_says(steps, warmup, expected):
    # Adam's first step moves every weight by the learning rate, whatever its gradient.
    moved = []
    model = fresh_model()
    start = model.blocks[0].mlp.fc1.weight.detach().clone()

    def watch(progress):
        if progress.step == 1:
            moved.append((model.blocks[0].mlp.fc1.weight.detach() - start).abs().median().item())

    config = CONFIG.model_copy(update={"steps": steps, "warmup": warmup, "lr": 1e-3, "weight_decay": 0.0})
    train(model, IMAGES[XRAY], XRAY, config, seed=7, on_progress=watch)
    assert moved == [pytest.approx(expected, rel=0.02)]


@pytest.mark.parametrize(
    ("length", "images", "steps"),
    [
        ({"steps": 7}, 1000, 7),
        ({"epochs": 1, "batch_size": 4}, 8, 2),
        ({"epochs": 3, "batch_size": 4}, 10, 8),  # 30 images in batches of 4: the last is filled up
        ({"epochs": 3, "batch_size": 4, "accumulate": 2}, 10, 4),
        ({"epochs": 1, "batch_size": 64}, 10, 1),
    ],
)
def test_steps_of_a_stage(length, images, steps):
    assert steps_for(TrainConfig(**length), images) == steps


def test_epochs_are_trained_to_their_end():
    _, progress = trained(steps=None, epochs=2)
    assert (progress.step, progress.steps, progress.images) == (5, 5, 20)


# ---- numbers that are none --------------------------------------------------------------------------------------


def nan_at(steps, value=math.nan):
    """A rehearsal whose loss is no number at these steps and nothing at the others."""

    def rehearse(model, step):
        return model.cls_token.sum() * (value if step in steps else 0.0)

    return rehearse


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_steps_are_skipped_and_counted(value):
    model, progress = trained(rehearse=nan_at({2, 3, 4}, value), max_bad_steps=3)
    assert (progress.step, progress.skipped, len(progress.losses)) == (8, 3, 5)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(map(math.isfinite, progress.losses))


def test_a_skipped_step_changes_nothing():
    model, progress = trained(rehearse=nan_at({0}), steps=1)
    assert progress.skipped == 1 and changed_weights(model) == set()


def test_one_bad_step_too_many_ends_the_training():
    seen = []
    with pytest.raises(TrainingError, match=r"for 4 steps in a row \(step 5\)") as caught:
        trained(rehearse=nan_at({2, 3, 4, 5}), max_bad_steps=3, on_progress=lambda p: seen.append(p.step))
    assert seen == [1, 2, 3, 4, 5]
    assert "train.lr" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_steps_are_counted_in_a_row():
    _, progress = trained(rehearse=nan_at({0, 1, 3, 4, 6, 7}), max_bad_steps=2)
    assert progress.skipped == 6 and progress.step == 8


def test_no_bad_step_may_be_allowed():
    with pytest.raises(TrainingError, match="for 1 steps in a row"):
        trained(rehearse=nan_at({3}), max_bad_steps=0)


def test_one_image_that_is_no_number_costs_one_step_an_epoch():
    images = IMAGES[XRAY].copy()
    images[4] = np.nan
    model, progress = trained(images=images, batch_size=1, steps=None, epochs=2, max_bad_steps=1)
    assert (progress.step, progress.skipped) == (20, 2)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_bad_part_of_an_accumulated_step_spoils_all_of_it():
    images = IMAGES[CT].copy()
    images[4] = np.nan
    _, progress = trained(CT, images=images, batch_size=1, accumulate=2, steps=5, max_bad_steps=1)
    assert (progress.skipped, len(progress.losses)) == (1, 4)


def test_images_that_are_no_numbers_end_the_training():
    with pytest.raises(TrainingError, match="for 3 steps in a row"):
        trained(images=np.full_like(IMAGES[XRAY], np.nan), max_bad_steps=2)


def test_a_failed_training_can_be_started_again_from_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(TrainingError):
        trained(checkpoint=checkpoint, rehearse=nan_at({3, 4, 5}), max_bad_steps=2)
    _, progress = trained(checkpoint=checkpoint, rehearse=nan_at(()), max_bad_steps=2)
    assert (progress.step, progress.skipped) == (8, 2)
