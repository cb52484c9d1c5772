"""Whole-slide images: tiles of tissue at a stated resolution, without reading the slide as a whole."""

import numpy as np
import pytest
import tifffile

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import MODALITIES
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.slide import TILE, is_slide, otsu, read_slide, tissue_mask

PATHOLOGY = MODALITIES["pathology"]
WHITE, PINK, PURPLE = (243, 242, 244), (225, 140, 180), (120, 60, 150)
SIDE = 2560  # pixels of the slide; at 0.25 um, so 5 x 5 tiles of 256 at 0.5 um


def drawn():
    """White glass; tissue in the two left fifths: pink, with a purple upper left tile."""
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = WHITE
    picture[:, : 2 * SIDE // 5] = PINK
    picture[: SIDE // 5, : SIDE // 5] = PURPLE
    noise = np.random.default_rng(0).integers(-6, 7, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def write_slide(path, picture, um=0.25, levels=3, compression=None):
    per_cm = None if um is None else (10_000 / um, 10_000 / um)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": compression}
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            shrunk = picture[:: 4**level, :: 4**level]
            scale = {"resolution": (per_cm[0] / 4**level,) * 2, "resolutionunit": 3} if per_cm else {}
            further = {"subifds": levels - 1} if level == 0 else {"subfiletype": 1}
            file.write(shrunk, **options, **scale, **further)
    return path


def test_tiles_of_tissue_come_at_the_stated_resolution(tmp_path):
    samples = read_slide(write_slide(tmp_path / "a.tif", drawn()))
    assert len(samples) == 10, "two of five columns of five tiles"
    assert {sample.pixels.shape for sample in samples} == {(3, TILE, TILE)}
    means = np.array([sample.pixels.mean(axis=(1, 2)) for sample in samples])
    np.testing.assert_allclose(means[0], PURPLE, atol=2)
    np.testing.assert_allclose(means[1:], [PINK] * 9, atol=2)
    coarser = read_slide(tmp_path / "a.tif", um_per_pixel=1.0)
    assert len(coarser) == 2, "2 x 2 tiles, of which the left ones are mostly tissue"


def test_a_feature_has_its_stated_size(tmp_path):
    picture = drawn()
    picture[:512, :512] = PINK
    picture[:, 100:140] = PURPLE  # 40 pixels of 0.25 um are 20 of 0.5 um
    first = read_slide(write_slide(tmp_path / "a.tif", picture))[0].pixels
    dark = first[1].mean(axis=0) < (PINK[1] + PURPLE[1]) / 2
    assert (np.flatnonzero(dark).min(), np.flatnonzero(dark).max()) == (50, 69)


def test_a_slide_is_found_by_its_tiles_and_levels_and_is_many_samples(tmp_path):
    write_slide(tmp_path / "a.tif", drawn(), compression="jpeg")
    tifffile.imwrite(tmp_path / "plain.tif", drawn()[:300, :300])
    (tmp_path / "text.tif").write_text("hello")
    assert [is_slide(tmp_path / name) for name in ("a.tif", "plain.tif", "text.tif")] == [True, False, False]
    assert len(read_samples([tmp_path / "a.tif"], PATHOLOGY)) == 10
    assert len(read_samples([tmp_path / "plain.tif"], PATHOLOGY)) == 1


def test_the_number_of_tiles_is_limited_and_they_are_spread(tmp_path):
    picture = drawn()
    picture[-512:, :1024] = PURPLE
    samples = read_slide(write_slide(tmp_path / "a.tif", picture), most=3)
    assert [round(float(sample.pixels[1].mean())) // 10 for sample in samples] == [6, 14, 6]


def test_otsu_parts_two_heaps():
    counts = np.zeros(256, int)
    counts[10:20], counts[150:160] = 100, 10
    assert 19 <= otsu(counts) < 150
    assert tissue_mask(drawn()[::8, ::8]).mean() == pytest.approx(0.4, abs=0.01)


def test_what_can_not_be_tiled_is_refused_with_the_reason(tmp_path, monkeypatch):
    whole = write_slide(tmp_path / "whole.svs", drawn()).read_bytes()
    write_slide(tmp_path / "no-size.svs", drawn(), um=None)
    write_slide(tmp_path / "coarse.svs", drawn(), um=2.0)
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.svs").write_text("hello")
    (tmp_path / "empty.svs").write_bytes(b"")
    # Enough colour somewhere for a threshold, and nowhere a tile of it.
    specks = np.full_like(drawn(), 240)
    specks[::64, ::64] = PURPLE
    write_slide(tmp_path / "glass.svs", specks)
    reasons = {
        "no-size.svs": ("spacing", "size of its pixels is not known"),
        "coarse.svs": ("spacing", "2 um a pixel is too coarse"),
        "cut.svs": ("truncated", "file is incomplete"),
        "text.svs": ("not-this-format", "looks like text"),
        "empty.svs": ("empty", "file is empty"),
        "glass.svs": ("no-image", "no tissue"),
    }
    for name, (kind, reason) in reasons.items():
        with pytest.raises(UnreadableFile, match=reason) as caught:
            read_samples([tmp_path / name], PATHOLOGY)
        assert (caught.value.kind, name in str(caught.value)) == (kind, True), name
    monkeypatch.setitem(__import__("sys").modules, "tiffslide", None)
    with pytest.raises(UnreadableFile, match=r"invcoss\[wsi\]"):
        read_slide(tmp_path / "whole.svs")
