"""The store of prepared images: what survives, what makes room for what, and rows of mapped files as of an array."""

import fcntl
import pickle

import numpy as np
import pytest

from invcoss_common.errors import DataError
from invcoss_site import sample_store
from invcoss_site.sample_store import StoredImages, open_store


def values(seed, count=1):
    return np.random.default_rng(seed).random((count, 1, 8, 8)).astype(np.float16)


SIZE = values(0).nbytes


def fill(folder, keys, limit=None, wanted=()):
    """One shard with a sample for each key, after those `wanted` were asked for."""
    with open_store(folder, limit) as store:
        for key in wanted:
            assert store.find(key)
        for key in keys:
            store.add(key, values(ord(key)), {"note": key})
        store.make_room(store.waiting_bytes, store.waiting_bytes, "the limit")
        store.write()


def known(folder):
    """The keys in the store whose values are as they were stored."""
    with open_store(folder) as store:
        found = [store.find(key) for key in "abcdefghijklmnop"]
        for entry in found:
            if entry:
                images = StoredImages([store.shards / entry.shard], [(0, entry.key)], np.zeros((1, 4), int), 1, (8, 8))
                assert np.array_equal(images[0], values(ord(entry.key))[0])
                assert entry.shape == (1, 1, 8, 8) and entry.notes == {"note": entry.key}
        return "".join(entry.key for entry in found if entry)


def held(folder):
    return sum(path.stat().st_size for path in (folder / "shards").iterdir())


def test_samples_are_found_again_with_their_notes(tmp_path):
    fill(tmp_path, "abc")
    fill(tmp_path, "d")
    assert known(tmp_path) == "abcd"
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_a_sample_may_have_notes_only(tmp_path):
    with open_store(tmp_path) as store:
        store.add("bad", None, {"why": "truncated"})
        store.write()
    with open_store(tmp_path) as store:
        entry = store.find("none", "bad")
        assert entry and (entry.shard, entry.shape, entry.notes) == ("", (), {"why": "truncated"})
    assert not list((tmp_path / "shards").iterdir())


def test_samples_of_a_shard_that_is_gone_are_forgotten(tmp_path):
    fill(tmp_path, "ab")
    (lost,) = (tmp_path / "shards").iterdir()
    fill(tmp_path, "c")
    lost.unlink()
    assert known(tmp_path) == "c"


def test_what_was_unused_longest_makes_room_first(tmp_path):
    for keys in ("ab", "cd", "ef"):
        fill(tmp_path, keys)
    limit = held(tmp_path) + 10
    fill(tmp_path, "gh", limit, wanted="ab")
    assert known(tmp_path) == "abefgh"
    assert held(tmp_path) <= limit


def test_a_shard_with_some_wanted_samples_is_written_again_without_the_others(tmp_path):
    fill(tmp_path, "abcd")
    fill(tmp_path, "efgh")
    limit = held(tmp_path)
    fill(tmp_path, "ij", limit, wanted="ae")
    assert set(known(tmp_path)) >= set("aeij")
    assert held(tmp_path) <= limit


def test_shards_that_are_mostly_wanted_are_written_again_last(tmp_path):
    fill(tmp_path, "abcd")
    fill(tmp_path, "efgh")
    fill(tmp_path, "i", held(tmp_path), wanted="abce")
    assert known(tmp_path) == "abcdei", "of the older shard three of four are wanted"


def test_what_can_not_fit_is_refused_and_what_is_wanted_stays(tmp_path):
    fill(tmp_path, "ab")
    with pytest.raises(DataError, match=r"need about .* raise the limit"):
        fill(tmp_path, "cdefg", held(tmp_path) + SIZE, wanted="ab")
    assert known(tmp_path) == "ab"


def test_a_full_disk_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_store, "KEEP_FREE_BYTES", 2**62)
    with pytest.raises(DataError, match="free space on the disk of"):
        fill(tmp_path, "a")


def test_only_one_process_has_the_store(tmp_path):
    with open_store(tmp_path), (tmp_path / "lock").open("r+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def volumes(tmp_path):
    """Two volumes of 6 x 10 x 12 in one shard, used as parts of 4 x 8 x 8, and the volumes themselves."""
    arrays = {
        name: np.random.default_rng(i).random((1, 1, 6, 10, 12)).astype(np.float16) for i, name in enumerate("vw")
    }
    with open_store(tmp_path) as store:
        for name, array in arrays.items():
            store.add(name, array, {})
        store.write()
        (shard,) = store.shards.iterdir()
    places = np.array([(0, 0, 0, 0, 0), (0, 0, 2, 2, 4), (1, 0, 1, 1, 2)], np.int32)
    return StoredImages([shard], [(0, "v"), (0, "w")], places, 1, (4, 8, 8), are_parts=True), arrays["v"], arrays["w"]


def test_rows_are_those_of_an_array(volumes):
    images, v, w = volumes
    expected = np.stack([v[0, :, :4, :8, :8], v[0, :, 2:, 2:, 4:], w[0, :, 1:5, 1:9, 2:10]])
    assert images.shape == expected.shape and len(images) == 3 and images.dtype == np.float16
    for rows in (0, -1, np.int64(1), slice(1, None), slice(None, None, -1), [2, 0], np.array([1, 1])):
        assert np.array_equal(images[rows], expected[rows]), rows
    assert np.array_equal(np.asarray(images), expected)
    assert np.asarray(images, np.float32).dtype == np.float32
    assert len(list(images)) == 3
    with pytest.raises(IndexError):
        images[3]


def test_another_process_maps_the_same_files(volumes):
    images, _, _ = volumes
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert np.array_equal(again, images) and again.are_parts


def test_a_damaged_shard_is_an_error_that_says_what_to_delete(volumes, tmp_path):
    images, _, _ = volumes
    (shard,) = (tmp_path / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{tmp_path}.*is made again"):
        pickle.loads(pickle.dumps(images))


def test_images_stay_when_their_shard_is_removed(volumes, tmp_path):
    images, v, _ = volumes
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    assert np.array_equal(images[0], v[0, :, :4, :8, :8])


def test_a_part_moves_within_its_volume_only(volumes):
    images, _, w = volumes
    assert np.array_equal(images.around(2, (0, 0, 0)), images[2])
    assert np.array_equal(images.around(2, (1, 0.5, -0.5)), w[0, :, 2:6, 2:10, 1:9])
    assert np.array_equal(images.around(0, (-1, -1, -1)), images[0])
    assert np.array_equal(images.around(1, (1, 1, 1)), images[1])
