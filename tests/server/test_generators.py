"""The generators of inversion: scales, shapes, range, and gradients that reach the latents and every parameter."""

from itertools import pairwise

import pytest
import torch

from invcoss_common.modality import SIZES, Geometry
from invcoss_server.generators import GENERATORS, MemoryMap, latent_shape, scales_for

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

GREY = Geometry(channels=1, size=(32, 32), patch=(8, 8))
COLOUR = Geometry(channels=3, size=(24, 24), patch=(8, 8))
VOLUME = Geometry(channels=1, size=(8, 24, 24), patch=(4, 8, 8))
GEOMETRIES = {"grey": GREY, "colour": COLOUR, "volume": VOLUME}
LATENT_CHANNELS = 6

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
each_kind = pytest.mark.parametrize("kind", GENERATORS)


def made(kind, geometry, width=32):
    torch.manual_seed(0)
    generator = GENERATORS[kind](geometry, LATENT_CHANNELS, width)
    return generator, torch.randn(3, *latent_shape(kind, geometry, LATENT_CHANNELS))


@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((64, 64), [(8, 8), (16, 16), (32, 32), (64, 64)]),
        ((96, 96), [(6, 6), (12, 12), (24, 24), (48, 48), (96, 96)]),
        ((224, 224), [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]),
        ((16, 32, 32), [(4, 8, 8), (8, 16, 16), (16, 32, 32)]),
        ((16, 192, 192), [(4, 6, 6), (4, 12, 12), (4, 24, 24), (4, 48, 48), (8, 96, 96), (16, 192, 192)]),
        ((8, 8), [(8, 8)]),
        ((36, 36), [(9, 9), (18, 18), (36, 36)]),  # odd: can't be halved further
        ((15, 64), [(15, 4), (15, 8), (15, 16), (15, 32), (15, 64)]),
        ((256,), [(8,), (16,), (32,), (64,), (128,), (256,)]),
    ],
)
def test_scales(size, scales):
    assert scales_for(size) == scales


@pytest.mark.parametrize("size", [size for scale in SIZES.values() for size in scale.size.values()])
def test_every_size_on_the_dial_has_a_small_bottleneck(size):
    scales = scales_for(size)
    assert scales[-1] == size and max(scales[0]) <= 8
    for small, large in pairwise(scales):
        assert all(b in (a, 2 * a) for a, b in zip(small, large, strict=True))


@each_kind
@each_geometry
def test_images_have_the_geometry_and_lie_between_zero_and_one(kind, geometry):
    generator, latents = made(kind, geometry)
    images = generator(latents)
    assert images.shape == (3, geometry.channels, *geometry.size)
    assert 0 <= images.min() < images.max() <= 1
    assert not torch.equal(images[0], images[1]), "another latent is another image"
    assert torch.allclose(generator(latents[:1])[0], images[0], atol=1e-5), "and of its own alone"
    extreme = generator(1000 * latents)
    assert extreme.min() >= 0 and extreme.max() <= 1


@each_kind
@each_geometry
def test_the_gradient_reaches_latents_and_every_parameter(kind, geometry):
    generator, latents = made(kind, geometry)
    latents.requires_grad_()
    images = generator(latents)
    (images * torch.rand(images.shape)).sum().backward()
    assert (latents.grad.flatten(1).abs().sum(dim=1) > 0).all()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@each_geometry
def test_the_memory_of_every_scale_and_the_cache_branch_shape_the_image(geometry):
    generator, latents = made("invunet", geometry)
    names = [name for name, _ in generator.named_parameters()]
    assert any(name.startswith("cache_in") for name in names) and any(name.startswith("memory") for name in names)
    assert len(generator.memory) == len(generator.cache_steps) == len(scales_for(geometry.size)) - 1
    with torch.no_grad():
        before = generator(latents)
        for part in (generator.cache_in, *generator.memory):
            saved = [parameter.clone() for parameter in part.parameters()]
            for parameter in part.parameters():
                parameter.normal_()
            assert not torch.equal(generator(latents), before)
            for parameter, value in zip(part.parameters(), saved, strict=True):
                parameter.copy_(value)
        assert torch.equal(generator(latents), before)


def test_a_memory_map_of_a_volume_is_a_plane_plus_a_profile():
    memory = MemoryMap(4, (8, 24, 24))
    assert sum(p.numel() for p in memory.parameters()) == 4 * (24 * 24 + 8)
    values = memory()
    assert values.shape == (1, 4, 8, 24, 24)
    steps = values.diff(dim=2)  # from slice to slice the same step everywhere
    torch.testing.assert_close(steps, steps[..., :1, :1].expand_as(steps))
    assert MemoryMap(4, (24, 24))().shape == (1, 4, 24, 24)


@pytest.mark.parametrize("kind", ["invunet", "dcgan"])
@pytest.mark.parametrize("width", [8, 17, 50, 72, 100])
def test_any_width_that_a_plan_may_name_works(kind, width):
    generator, latents = made(kind, GREY, width)
    assert generator(latents).shape == (3, 1, 32, 32)


def test_direct_pixels_are_the_latents_themselves():
    generator, latents = made("pixels", COLOUR)
    assert latent_shape("pixels", COLOUR, LATENT_CHANNELS) == (3, 24, 24)
    assert not list(generator.parameters())
    assert torch.equal(generator(latents), torch.sigmoid(latents))


def test_the_latent_enters_at_the_bottleneck():
    for kind in ("invunet", "dcgan"):
        assert latent_shape(kind, VOLUME, 6) == (6, 4, 6, 6)
