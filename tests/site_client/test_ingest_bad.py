"""Damaged and odd files of every kind beside good ones, in one run: each gets its outcome by name.

Those of masks, texts and indexes, which are no images, are in test_ingest_masks, test_ingest_text and test_inventory.
"""

import nibabel as nib
import numpy as np
from PIL import Image
from tests.site_client.dicoms import dataset, save, save_series, slice_of
from tests.site_client.test_ingest import bad_pictures, bad_volumes, chest, nifti
from tests.site_client.test_ingest_dicom import bad_dicoms

from invcoss_common.modality import MODALITIES, Geometry
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare

PLANE = Geometry(channels=1, size=(32, 32), patch=(8, 8))
SLAB = Geometry(channels=1, size=(8, 16, 16), patch=(4, 8, 8))
RANDOM = np.random.default_rng(0)


def run(folder, modality, geometry):
    """What became of each file: its kind of refusal, its kinds of warning, or "used"; and how many were used."""
    row = MODALITIES[modality]
    inventory = take_inventory(folder, row)
    images = prepare(inventory, row, geometry, None, folder.parent / "cache")
    refused = {one.path.relative_to(folder).as_posix(): one.kind for one in images.quarantined}
    outcome = {item.path.relative_to(folder).as_posix(): "used" for item in inventory.items} | refused
    for one in images.warnings:
        name = one.path.relative_to(folder).as_posix()
        outcome[name] = f"{outcome.get(name, 'used')}, {one.kind}"
    for one in (*images.quarantined, *images.warnings):
        assert one.path.name in one.reason or f"{one.path.parent}: " in one.reason  # of a series, its folder
        assert "\n" not in one.reason
    return outcome, len(images.train) + len(images.heldout), images


def clutter(folder):
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    np.savez(folder / "pickled.npz", a=np.array([{"an": "object"}], dtype=object))


def test_pictures(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    expected = {
        "truncated.jpg": "truncated",
        "zero.png": "empty",
        "text.png": "not-this-format",
        "tiny.png": "too-small",
        "constant.png": "constant",
        "pages.tif": "dimensions",
        "bomb.png": "too-large",
    }
    assert bad_pictures(folder).keys() == expected.keys()
    (folder / "whole.jpg").unlink()
    expected |= {name: kind for name, (kind, _) in bad_dicoms(folder).items()} | {"good.dcm": "used"}
    clutter(folder)
    expected["pickled.npz"] = "not-this-format"
    film, colour = np.kron(chest(), np.ones((2, 2), np.uint8)), RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(film).save(folder / "film.png")
    Image.fromarray(255 - film).save(folder / "inverted.png")
    Image.fromarray(film.astype(np.uint16) * 16).save(folder / "deep.png")
    Image.fromarray(np.dstack([film, film, film, film])).save(folder / "rgba.png")
    Image.fromarray(colour).quantize(16).save(folder / "palette.png")
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(film[:30].repeat(8, axis=1)).save(folder / "long.png")
    Image.fromarray(film).save(folder / "odd name with spaces é.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(film).save(folder / "rotated.jpg", exif=exif)
    used = {"film.png", "deep.png", "rgba.png", "palette.png", "cmyk.jpg", "odd name with spaces é.png", "rotated.jpg"}
    expected |= dict.fromkeys(used, "used") | {"inverted.png": "used, inverted", "long.png": "used, shape"}
    outcome, count, images = run(folder, "xray", PLANE)
    assert outcome == expected
    assert count == sum(kind.startswith("used") for kind in expected.values())
    assert np.isfinite(images.train).all()


def test_grey_tiles_among_colour(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        tile = RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(tile).save(folder / f"{number}.png")
    Image.fromarray(tile[..., 0]).save(folder / "grey.png")
    outcome, _, images = run(folder, "pathology", Geometry(channels=3, size=(32, 32), patch=(8, 8)))
    assert outcome == {f"{n}.png": "used" for n in range(6)} | {"grey.png": "used, grey"}
    assert images.train.shape[1] == 3


def test_volumes(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    kinds = {
        "truncated.nii.gz": "truncated",
        "short.nii": "truncated",
        "png.nii.gz": "not-this-format",
        "text.nii.gz": "not-this-format",
        "packed.nii.gz": "not-this-format",
        "zero.nii.gz": "empty",
        "nan.nii.gz": "not-finite",
        "all-nan.nii.gz": "not-finite",
        "nothing.nii.gz": "constant",
        "four.nii.gz": "dimensions",
        "slice.nii.gz": "too-small",
        "huge-spacing.nii.gz": "spacing",
        "offset.nii.gz": "units",
        "no-affine.nii.gz": "no-geometry",
        "claims.nii.gz": "too-large",
    }
    assert bad_volumes(folder).keys() == kinds.keys()
    (folder / "picture.png").unlink()
    clutter(folder)
    air = RANDOM.normal(0, 400, (20, 20, 20)).clip(-1024, 1000).astype(np.int16)
    nifti(folder / "left.nii.gz", air[::-1].copy(), np.diag([-1.0, 1, 1, 1]))
    upside = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    nifti(folder / "odd name with spaces é.nii.gz", air, upside)
    nifti(folder / "inside.nii.gz", (air.clip(-90, 300)).astype(np.int16))
    scan = (air[:6] + 1024).astype(np.uint16)
    save_series(folder / "good", scan)
    save_series(folder / "gap", scan)[2].unlink()
    save_series(folder / "mixed", scan, series="1.1")
    for number in range(4):
        save(folder / "mixed" / f"b{number}.dcm", slice_of(scan[number, :10, :10], (0, 0, number), series="1.2"))
    save(folder / "no-geometry.dcm", dataset(scan[0], SeriesInstanceUID="1.5"))
    data = slice_of(scan[0], (0, 0, 0), series="1.6")
    del data.PixelData
    save(folder / "no-pixels.dcm", data)
    save(folder / "short.dcm", slice_of(scan[0], (0, 0, 0), PixelData=scan[0].tobytes()[:200]))
    (folder / "zero.dcm").write_bytes(b"")
    expected = kinds | {
        "good.nii.gz": "used",
        "good.nii": "used",
        "left.nii.gz": "used",
        "odd name with spaces é.nii.gz": "used",
        "inside.nii.gz": "used, units",
        "good/001.dcm": "used",
        "gap/001.dcm": "gap",
        "mixed/001.dcm": "used",
        "mixed/b0.dcm": "used",
        "no-geometry.dcm": "no-geometry",
        "no-pixels.dcm": "no-image",
        "short.dcm": "truncated",
        "zero.dcm": "empty",
        "pickled.npz": "not-this-format",
    }
    outcome, count, images = run(folder, "ct", SLAB)
    assert outcome == expected
    assert count == 8
    counts = {name: count for name, (count, _) in images.axes.items()}
    assert counts == {"RAS": 3, "LAS": 1, "IRA": 1, "LPS": 3}
    assert images.axes["IRA"][1].endswith("odd name with spaces é.nii.gz")
    assert nib.aff2axcodes(upside) == ("I", "R", "A")
