"""Pools as files: the same bytes as in memory, no more of them read than is looked at, and any rows left out."""

import numpy as np
import pytest
from safetensors.numpy import save

from invcoss_common import pools
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_hex
from invcoss_common.errors import ProtocolError
from invcoss_common.pools import (
    artefact_of,
    first_images,
    mapped_images,
    pool_from_bytes,
    pool_shape,
    pool_to_bytes,
    without_rows,
    write_pool,
)

POOL = np.random.default_rng(0).integers(0, 256, (5, 1, 4, 6), dtype=np.uint8)


@pytest.mark.parametrize("images", [POOL, POOL[:, :, ::-1]])
def test_a_file_has_the_bytes_that_memory_would_have(tmp_path, images):
    write_pool(tmp_path / "pool", images)
    assert (tmp_path / "pool").read_bytes() == pool_to_bytes(images)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_the_first_images_of_a_file(tmp_path, count):
    write_pool(tmp_path / "pool", POOL)
    images, held = first_images(tmp_path / "pool", count)
    assert held == 5
    np.testing.assert_array_equal(images, POOL[:count])


def test_a_store_adopts_a_file_as_if_it_were_put(tmp_path):
    store, data = ArtefactStore(tmp_path / "store"), pool_to_bytes(POOL)
    for _ in range(2):  # the same again is harmless
        (tmp_path / "draft").write_bytes(data)
        artefact = store.adopt(tmp_path / "draft")
        assert (artefact.sha256, artefact.size_bytes) == (sha256_hex(data), len(data))
        assert store.path(artefact).read_bytes() == data
        assert not (tmp_path / "draft").exists()
    assert store.put(data) == artefact


@pytest.mark.parametrize("shape", [(5, 1, 4, 6), (12, 3, 8, 8), (3, 1, 2, 4, 4), (7, 1, 9)])
@pytest.mark.parametrize("dropped", [(), (0,), (2,), (0, 1), (1, 2)])
def test_a_pool_without_rows_has_the_bytes_that_it_would_have_if_they_had_never_been(tmp_path, shape, dropped):
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    write_pool(tmp_path / "pool", images)
    left = pool_to_bytes(np.delete(images, dropped, axis=0))
    assert b"".join(without_rows(tmp_path / "pool", dropped)) == left
    named = artefact_of(without_rows(tmp_path / "pool", dropped))
    assert (named.sha256, named.size_bytes) == (sha256_hex(left), len(left))


@pytest.mark.parametrize("dropped", [(3,), (0, 9, 18, 19), tuple(range(1, 20))])
def test_a_pool_is_never_whole_in_memory(tmp_path, monkeypatch, dropped):
    monkeypatch.setattr(pools, "PIECE_BYTES", 1000)
    images = np.random.default_rng(2).integers(0, 256, (20, 1, 64, 64), dtype=np.uint8)
    write_pool(tmp_path / "pool", images)
    pieces = list(without_rows(tmp_path / "pool", dropped))
    assert max(map(len, pieces)) <= 1000
    assert pool_from_bytes(b"".join(pieces)).tolist() == np.delete(images, dropped, axis=0).tolist()


@pytest.mark.parametrize("dropped", [(5,), (-1,), (1, 0), (2, 2), (0, 1, 2, 3, 4, 5)])
def test_rows_that_are_not_there_or_not_in_order_can_not_be_left_out(tmp_path, dropped):
    write_pool(tmp_path / "pool", POOL)
    with pytest.raises(ProtocolError, match="no such rows"):
        list(without_rows(tmp_path / "pool", dropped))


def test_a_mapped_pool_and_its_shape(tmp_path):
    write_pool(tmp_path / "pool", POOL)
    assert pool_shape(tmp_path / "pool") == POOL.shape
    np.testing.assert_array_equal(mapped_images(tmp_path / "pool"), POOL)


NOT_POOLS = {
    "nothing": b"",
    "garbage": b"x" * 100,
    "cut": pool_to_bytes(POOL)[:-1],
    "longer": pool_to_bytes(POOL) + b"0",
    "another name": save({"image": POOL}),
    "another tensor": save({"images": POOL, "more": POOL}),
    "floats": save({"images": POOL.astype(np.float32)}),
}


@pytest.mark.parametrize("what", NOT_POOLS)
def test_what_is_not_a_pool(tmp_path, what):
    (tmp_path / "pool").write_bytes(NOT_POOLS[what])
    with pytest.raises(ProtocolError, match="not a pool"):
        pool_shape(tmp_path / "pool")
    with pytest.raises(ProtocolError, match="not a pool"):
        list(without_rows(tmp_path / "pool", ()))
