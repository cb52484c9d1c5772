"""Rehearsal: its two losses by other means, mixing of pairs, and one earlier modality per step."""

import copy

import numpy as np
import pytest
import torch

from invcoss_common.config import ReplayConfig
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model, reconstruction_loss
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import random_mask
from invcoss_site.replay import LOSSES, ReplayPool, add_noise, distil_loss, mix_pairs, published_loss, rehearsal

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))

each_geometry = pytest.mark.parametrize("geometry", [XRAY, CT], ids=["2d", "3d"])


def model_of(seed):
    return build_model(SHAPE, [XRAY, CT], seed)


def example(geometry, count=4):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(count, geometry.channels, *geometry.size, generator=random)
    return images, random_mask(count, geometry.tokens, 0.75, random)


def pool_of(geometry, count=6):
    shape = (count, geometry.channels, *geometry.size)
    return ReplayPool(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), geometry)


def rehearse_with(teacher, pools, batch_size=8, seed=3, **config):
    return rehearsal(teacher, pools, ReplayConfig(**config), batch_size=batch_size, mask_ratio=0.75, seed=seed)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def in_numpy(model, images, geometry, mask):
    with torch.no_grad():
        latent, prediction = model(images, geometry, mask)
    return latent.double().numpy(), prediction.double().numpy()


def over_removed(error, mask):
    """Mean of patch errors (B, L) over removed patches, then over images."""
    return np.mean([row[hidden].mean() for row, hidden in zip(error, mask.removed.numpy(), strict=True)])


@each_geometry
def test_a_student_that_equals_its_teacher_has_no_distillation_loss(geometry):
    images, mask = example(geometry)
    assert distil_loss(model_of(0), model_of(0), images, geometry, mask).item() == 0
    assert distil_loss(model_of(0), model_of(1), images, geometry, mask).item() > 0.1


@each_geometry
def test_distillation_by_formula(geometry):
    student, teacher = model_of(0), model_of(1)
    teacher.norm.weight.data.mul_(3)  # features of a variance that is not 1
    images, mask = example(geometry)
    latent, prediction = in_numpy(student, images, geometry, mask)
    teacher_latent, teacher_prediction = in_numpy(teacher, images, geometry, mask)
    features = np.mean((latent - teacher_latent) ** 2) / np.var(teacher_latent)
    decoded = over_removed(((prediction - teacher_prediction) ** 2).mean(axis=-1), mask)
    loss = distil_loss(student, teacher, images, geometry, mask).item()
    assert loss == pytest.approx(features + decoded, rel=1e-5)


@each_geometry
def test_the_published_loss_by_formula(geometry):
    student, teacher = model_of(0), model_of(1)
    images, mask = example(geometry)
    latent, prediction = in_numpy(student, images, geometry, mask)
    teacher_latent, _ = in_numpy(teacher, images, geometry, mask)
    masked = reconstruction_loss(torch.from_numpy(prediction), images, geometry, mask).item()
    loss = published_loss(student, teacher, images, geometry, mask).item()
    assert loss == pytest.approx(masked + np.mean((latent - teacher_latent) ** 2), rel=1e-5)
    with torch.no_grad():
        assert published_loss(teacher, teacher, images, geometry, mask).item() == pytest.approx(
            reconstruction_loss(teacher(images, geometry, mask)[1], images, geometry, mask).item()
        )


def test_distillation_never_asks_for_the_pixels():
    # Of two students with the teacher's latents, the one that draws what the teacher draws is better, whatever it is.
    images, mask = example(XRAY)
    teacher = model_of(0)
    teacher.heads["2d_4x4"].bias.data.fill_(50.0)  # a teacher that is far off
    assert distil_loss(copy.deepcopy(teacher), teacher, images, XRAY, mask).item() == 0
    assert distil_loss(model_of(0), teacher, images, XRAY, mask).item() == pytest.approx(2500, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@each_geometry
def test_only_the_student_is_taught(loss, geometry):
    images, mask = example(geometry)
    student, teacher = model_of(0), model_of(1)
    LOSSES[loss](student, teacher, images, geometry, mask).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    family = geometry.family
    for name in ("blocks.0.attn.qkv.weight", f"tokenisers.{family}.weight", f"heads.{family}.weight", "cls_token"):
        assert student.get_parameter(name).grad.abs().sum() > 0, name


def test_mixing_by_hand():
    # Three flat images: x' = a x_i + (1 - a) x_j with the partner j and the share a of each image drawn in this order.
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    random = torch.Generator().manual_seed(2)
    partner, share = torch.randperm(3, generator=random).tolist(), torch.rand(3, generator=random).tolist()
    assert partner != [0, 1, 2]
    mixed = mix_pairs(images, torch.Generator().manual_seed(2))
    for i, (j, a) in enumerate(zip(partner, share, strict=True)):
        torch.testing.assert_close(mixed[i], torch.full((1, 2, 2), a * i / 2 + (1 - a) * j / 2))


@each_geometry
def test_mixed_images_stay_between_their_pair(geometry):
    images, _ = example(geometry, 16)
    mixed = mix_pairs(images, torch.Generator().manual_seed(0))
    assert mixed.shape == images.shape
    assert (mixed >= images.min(dim=0).values - 1e-6).all() and (mixed <= images.max(dim=0).values + 1e-6).all()
    assert (mixed != images).flatten(1).any(dim=1).float().mean() > 0.8
    same = images[:1].expand_as(images)
    torch.testing.assert_close(mix_pairs(same, torch.Generator().manual_seed(0)), same)


@pytest.mark.parametrize("geometry", [XRAY, CT])
def test_noise_has_a_spread_of_its_own_per_image_up_to_the_largest(geometry):
    images = torch.full((400, 1, *geometry.size), 0.5)
    noisy = add_noise(images, 0.1, torch.Generator().manual_seed(0))
    spread = noisy.flatten(1).std(dim=1)
    assert spread.max() < 0.14  # 0.1, and the error of an estimate from few pixels
    assert spread.min() < 0.01
    assert spread.mean() == pytest.approx(0.05, abs=0.01)
    assert (noisy - 0.5).mean().abs() < 0.002
    assert torch.equal(noisy, add_noise(images, 0.1, torch.Generator().manual_seed(0)))
    bright = add_noise(torch.ones(9, 1, *geometry.size), 1.0, torch.Generator().manual_seed(0))
    assert bright.max() == 1
    assert bright.min() >= 0


def test_the_teacher_is_frozen_and_never_changes():
    student, teacher = model_of(0), model_of(0)
    before = weights_of(teacher)
    rehearse = rehearse_with(teacher, [pool_of(XRAY), pool_of(CT)])
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(6):
        optimiser.zero_grad()
        (rehearse(student, step) + student.cls_token.square().sum()).backward()
        optimiser.step()
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not torch.equal(student.cls_token, teacher.cls_token)


def test_one_step_rehearses_one_modality_and_all_are_drawn():
    rehearse = rehearse_with(model_of(1), [pool_of(XRAY), pool_of(CT)])
    counts = {XRAY.family: 0, CT.family: 0}
    for step in range(40):
        student = model_of(0)
        rehearse(student, step).backward()
        touched = [family for family in counts if student.tokenisers[family].weight.grad is not None]
        assert len(touched) == 1
        counts[touched[0]] += 1
    assert min(counts.values()) >= 10, "each about as often as the other"


@pytest.mark.parametrize("mixup", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_can_be_computed_again_from_seed_and_number(loss, mixup):
    pools = [pool_of(XRAY), pool_of(CT)]
    student, teacher = model_of(0), model_of(1)
    rehearse = rehearse_with(teacher, pools, loss=loss, mixup=mixup, weight=2.0, batch_share=0.5)
    for step in range(4):
        random = generator_for(3, "replay", step)
        pool = pools[int(torch.randint(2, (), generator=random))]
        rows = torch.randint(6, (4,), generator=random)  # half of the training batch of 8
        images = torch.from_numpy(pool.images.astype(np.float32) / 255)[rows]
        if mixup:
            images = mix_pairs(images, random)
        if loss == "distil":  # under `published` pixels are a target, and noise must not be one
            images = add_noise(images, ReplayConfig().noise, random)
        mask = random_mask(4, pool.geometry.tokens, 0.75, random)
        with torch.no_grad():
            expected = 2.0 * LOSSES[loss](student, teacher, images, pool.geometry, mask)
            assert rehearse(student, step).item() == pytest.approx(expected.item(), rel=1e-6)
            assert torch.equal(rehearse(student, step), rehearse(student, step))
    losses = {rehearse(student, step).item() for step in range(8)}
    assert len(losses) == 8, "every step draws anew"


def test_a_weight_of_zero_silences_rehearsal():
    assert rehearse_with(model_of(1), [pool_of(XRAY)], weight=0.0)(model_of(0), 0).item() == 0


def test_at_least_one_pair_is_rehearsed():
    assert rehearse_with(model_of(1), [pool_of(XRAY, 1)], batch_size=1)(model_of(0), 0).item() > 0
