"""Pools as files: the same bytes as in memory, and no more of them read than is looked at."""

import numpy as np
import pytest

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_hex
from invcoss_server.pool import first_images, pool_to_bytes, write_pool

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
