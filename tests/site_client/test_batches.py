"""Training batches: a pure function of their number, every image once an epoch, crops and flips only where asked."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invcoss_common.modality import Geometry
from invcoss_site.batches import TrainingBatches, batch_loader, random_crop, whole_images
from invcoss_site.sample_store import StoredImages, open_store

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
PATHOLOGY = Geometry(channels=3, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))
STORED = {XRAY: (1, 24, 24), PATHOLOGY: (3, 24, 24), CT: (1, 4, 8, 8)}

each_geometry = pytest.mark.parametrize("geometry", STORED, ids=["grey", "colour", "volume"])


def noise(geometry, count=7):
    return np.random.default_rng(0).random((count, *STORED[geometry])).astype(np.float16)


def batches_of(images, geometry, **changes):
    how = {"batch_size": 3, "crop_scale": 0.2, "flip": True, "seed": 1, **changes}
    return TrainingBatches(images, geometry, **how)


@each_geometry
def test_a_batch_follows_from_its_number_alone(geometry):
    images = noise(geometry)
    forward, backward = batches_of(images, geometry), batches_of(images, geometry)
    in_order = [forward[number] for number in range(12)]
    for number in reversed(range(12)):
        torch.rand(1)  # what else is drawn must not matter
        assert torch.equal(backward[number], in_order[number])
    assert all(batch.shape == (3, geometry.channels, *geometry.size) for batch in in_order)
    assert all(batch.dtype == torch.float32 and batch.min() >= 0 and batch.max() <= 1 for batch in in_order)
    assert len({batch.numpy().tobytes() for batch in in_order}) == 12


@each_geometry
def test_another_seed_gives_other_batches(geometry):
    for count in (7, 1):  # another order; of a single image, other crops and flips
        images = noise(geometry, count)
        one, other = (batches_of(images, geometry, batch_size=16, seed=seed) for seed in (1, 2))
        assert not torch.equal(one[0], other[0])


@each_geometry
@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (6, 3), (5, 8), (4, 1)])
def test_every_image_comes_once_an_epoch(geometry, count, batch_size):
    # Image i is i / 100 everywhere, so that it is known again however it was cropped.
    images = (np.arange(count) / 100).reshape(count, *[1] * len(STORED[geometry]))
    images = np.broadcast_to(images, (count, *STORED[geometry])).astype(np.float16)
    batches = batches_of(images, geometry, batch_size=batch_size)
    epochs = 4
    seen = [round(100 * float(image.mean())) for n in range(-(-epochs * count // batch_size)) for image in batches[n]]
    orders = [tuple(seen[epoch * count : (epoch + 1) * count]) for epoch in range(epochs)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(orders)) > 1, "in another order each time"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**40))
def test_a_crop_lies_within_the_image_and_covers_its_share(height, width, scale, seed):
    top, left, crop_height, crop_width = random_crop(height, width, scale, torch.Generator().manual_seed(seed))
    assert crop_height >= 1 and crop_width >= 1
    assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width
    rounding = 0.5 / height + 0.5 / width  # of either side to whole pixels
    assert crop_height * crop_width / (height * width) >= scale - rounding - 1e-9


def test_crops_use_the_whole_range_of_areas_aspects_and_places():
    random = torch.Generator().manual_seed(0)
    crops = np.array([random_crop(120, 240, 0.2, random) for _ in range(2000)])
    top, left, height, width = crops.T
    area, aspect = height * width / (120 * 240), (width / 240) / (height / 120)
    assert area.min() < 0.22 and area.max() > 0.98
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36
    assert top.min() == 0 and (top + height).max() == 120 and left.min() == 0 and (left + width).max() == 240


def test_a_crop_of_the_whole_area_is_the_whole_image():
    assert random_crop(40, 60, 1.0, torch.Generator().manual_seed(0)) == (0, 0, 40, 60)
    images = noise(XRAY)[:, :, :16, :16]
    batch = batches_of(images, XRAY, crop_scale=1.0, flip=False, batch_size=7)[0]
    assert {image.tobytes() for image in batch.numpy()} == {image.tobytes() for image in images.astype(np.float32)}


def ramps(geometry):
    """Images that grow from left to right, along their last axis only."""
    shape = STORED[geometry]
    return np.broadcast_to(np.linspace(0, 1, shape[-1]), (6, *shape)).astype(np.float16)


def mirrored(batches, count=20):
    """For each image whether it falls from left to right; that it only grows or falls is checked."""
    found = []
    for number in range(count):
        for image in batches[number]:
            steps = image.diff(dim=-1)
            assert (steps >= 0).all() or (steps <= 0).all()
            found.append(float(steps.sum()) < 0)
            assert float(image.diff(dim=-2).abs().max()) < 1e-6, "mirrored left-right, never upside down"
    return found


@each_geometry
def test_flip_off_means_no_flip(geometry):
    assert not any(mirrored(batches_of(ramps(geometry), geometry, flip=False)))


@each_geometry
def test_flip_mirrors_about_half_of_the_images(geometry):
    found = mirrored(batches_of(ramps(geometry), geometry))
    assert 0.3 < np.mean(found) < 0.7


def test_volumes_are_never_cropped():
    images = noise(CT)
    batch = batches_of(images, CT, flip=False, batch_size=7)[0]
    expected = {image.tobytes() for image in images.astype(np.float32)}
    assert {image.tobytes() for image in batch.numpy()} == expected


@pytest.fixture
def parts(tmp_path):
    """Eight windows of CT's size in one volume whose values say where they are; a far corner is empty."""
    volume = np.arange(0x2E00, 0x2E00 + 8 * 16 * 24, dtype=np.uint16).view(np.float16).reshape(1, 1, 8, 16, 24).copy()
    volume[..., 12:] = 0
    with open_store(tmp_path) as store:
        store.add("volume", volume, {})
        store.write()
        (shard,) = store.shards.iterdir()
    starts = [(0, 0, d, h, w) for d in (0, 4) for h in (0, 8) for w in (0, 4)]
    return StoredImages([shard], [(0, "volume")], np.array(starts, np.int32), 1, CT.size, are_parts=True), volume[0]


def places_in(volume, batch):
    """Where the images of a batch begin in the volume, by their values, which come once each."""
    return [tuple(np.argwhere(volume[0] == image[0, 0, 0, 0].half().item())[0]) for image in batch]


def test_sub_volumes_are_drawn_around_their_place_by_number(parts):
    images, volume = parts
    batches = batches_of(images, CT, flip=False, batch_size=8)
    drawn = [place for number in range(6) for place in places_in(volume, batches[number])]
    assert torch.equal(batches_of(pickle.loads(pickle.dumps(images)), CT, flip=False, batch_size=8)[3], batches[3])
    assert {places[0] for places in drawn} == {0, 1, 3, 4}, "a quarter of 4 around 0 and 4, within the volume"
    assert {places[1] for places in drawn} == {0, 1, 2, 6, 7, 8}
    assert {places[2] for places in drawn} == {0, 1, 2, 3, 4, 5, 6}
    for image, (d, h, w) in zip(batches[2], places_in(volume, batches[2]), strict=True):
        assert np.array_equal(image.half(), volume[:, d : d + 4, h : h + 8, w : w + 8])


def test_a_sub_volume_is_not_moved_into_the_background(tmp_path):
    volume = np.zeros((1, 1, 4, 8, 24), np.float16)
    volume[..., :9] = np.random.default_rng(0).random((4, 8, 9))
    volume[..., 9:] = 0.5
    with open_store(tmp_path) as store:
        store.add("volume", volume, {})
        store.write()
        (shard,) = store.shards.iterdir()
    images = StoredImages([shard], [(0, "volume")], np.array([(0, 0, 0, 0, 8)], np.int32), 1, CT.size, are_parts=True)
    for number in range(8):
        assert all(float(image.std()) >= 0.02 for image in batches_of(images, CT, batch_size=4)[number])


def test_whole_images_keep_to_the_grid(parts):
    images, _ = parts
    assert np.array_equal(torch.cat(list(whole_images(images, CT, 3))).half(), images)


@each_geometry
def test_whole_images_come_in_order_at_the_input_size(geometry):
    images = noise(geometry)
    parts = list(whole_images(images, geometry, batch_size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    together = torch.cat(parts)
    assert together.shape == (7, geometry.channels, *geometry.size) and together.dtype == torch.float32
    means = images.astype(np.float32).reshape(7, -1).mean(axis=1)
    np.testing.assert_allclose(together.flatten(1).mean(dim=1), means, atol=0.02)
    at_size = noise(geometry)[..., : geometry.size[-2], : geometry.size[-1]]
    same = torch.cat(list(whole_images(at_size, geometry, batch_size=4)))
    assert torch.equal(same, torch.from_numpy(at_size.astype(np.float32)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_anywhere_and_keeps_the_order(workers):
    batches = batches_of(noise(XRAY), XRAY)
    loaded = list(batch_loader(batches, 2, 6, workers))
    assert len(loaded) == 4
    assert all(torch.equal(batch, batches[number]) for number, batch in enumerate(loaded, start=2))


def test_batches_can_be_sent_to_a_worker_process():
    # Where processes are not forked, a loader's workers receive the batches as a pickle.
    batches = batches_of(noise(XRAY), XRAY)
    assert torch.equal(pickle.loads(pickle.dumps(batches))[3], batches[3])
