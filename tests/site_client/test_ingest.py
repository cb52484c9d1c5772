"""Readers: good files of every kind become arrays in [0, 1]; odd and damaged ones are refused with path and reason."""

import gzip
import zlib

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import MODALITIES, Modality
from invcoss_site.ingest import read_samples, suffixes
from invcoss_site.ingest.sample import KINDS
from invcoss_site.ingest.values import model_values, resample

XRAY, PATHOLOGY, CT, MRI = (MODALITIES[name] for name in ("xray", "pathology", "ct", "mri"))
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 50), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8)


def read(path, modality=XRAY, spacing_mm=None):
    (sample,) = read_samples([path], modality)
    return model_values(sample, modality, spacing_mm)


def noted(path, modality=XRAY):
    (sample,) = read_samples([path], modality)
    for one in sample.warnings:
        assert str(path) in one.reason
    return [one.kind for one in sample.warnings]


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def nifti(path, values, affine=None, zooms=None):
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if zooms:
        image.header.set_zooms(zooms)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.JPG"])
def test_a_grey_picture_is_scaled_by_its_type(tmp_path, name):
    values = read(saved(tmp_path / name, GREY))
    assert values.shape == (1, 40, 50)
    assert values.dtype == np.float32
    if name != "a.JPG":
        np.testing.assert_allclose(values[0], GREY / 255, atol=1e-6)


def test_sixteen_bits_are_scaled_to_their_range_and_do_not_wrap(tmp_path):
    deep = np.linspace(0, 4095, 2000).reshape(40, 50).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        values = read(saved(tmp_path / name, deep))
        np.testing.assert_allclose(values[0], deep / 4095, atol=1e-6)


def test_a_white_is_zero_tiff_is_turned_round(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="miniswhite")
    np.testing.assert_allclose(read(tmp_path / "a.tif")[0], 1 - GREY / 255, atol=1e-6)


def test_alpha_palette_and_cmyk_become_the_channels_of_the_modality(tmp_path):
    alpha = np.dstack([COLOUR, GREY])
    assert read(saved(tmp_path / "rgba.png", alpha)).shape == (1, 40, 50)
    values = read(saved(tmp_path / "rgba2.png", alpha), PATHOLOGY)
    np.testing.assert_allclose(values, COLOUR.transpose(2, 0, 1) / 255, atol=1e-6)
    palette = Image.fromarray(COLOUR).quantize(16)
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(read(tmp_path / "palette.png", PATHOLOGY), expected, atol=1e-6)
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read(tmp_path / "cmyk.jpg", PATHOLOGY).shape == (3, 40, 50)


def test_a_grey_tile_is_repeated_where_colour_is_expected(tmp_path):
    values = read(saved(tmp_path / "a.png", GREY), PATHOLOGY)
    assert values.shape == (3, 40, 50)
    assert np.array_equal(values[0], values[2])
    saved(tmp_path / "rgb.png", np.dstack([GREY] * 3))
    saved(tmp_path / "colour.png", COLOUR)
    kinds = [noted(tmp_path / name, PATHOLOGY) for name in ("a.png", "rgb.png", "colour.png")]
    assert kinds == [["grey"], ["grey"], []]


def chest(height=96, width=96):
    """A film: dark beside the body and in the lungs, bright elsewhere."""
    film = np.full((height, width), 150, np.uint8)
    film[: height // 6, : width // 6] = film[: height // 6, -width // 6 :] = 5
    film[height // 4 : 3 * height // 4, width // 6 : 2 * width // 5] = 50
    film[height // 4 : 3 * height // 4, 3 * width // 5 : 5 * width // 6] = 50
    return film


def test_a_film_with_black_and_white_exchanged_is_warned_of(tmp_path):
    assert noted(saved(tmp_path / "a.png", chest())) == []
    assert noted(saved(tmp_path / "b.png", 255 - chest())) == ["inverted"]


def test_a_very_long_picture_is_warned_of(tmp_path):
    assert noted(saved(tmp_path / "a.png", np.tile(GREY, (1, 3)))) == ["shape"]


def test_the_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(GREY)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(read(tmp_path / "a.png")[0], np.rot90(GREY, -1) / 255, atol=1e-6)


def test_an_awkward_name_works(tmp_path):
    assert read(saved(tmp_path / "odd name é.png", GREY)).shape == (1, 40, 50)


def test_a_volume_is_turned_by_its_affine(tmp_path):
    values = RANDOM.integers(1, 1000, (6, 7, 8)).astype(np.int16)
    straight = read(nifti(tmp_path / "ras.nii.gz", values), MRI)
    assert straight.shape == (1, 8, 7, 6)
    flipped = read(nifti(tmp_path / "las.nii.gz", values[::-1].copy(), np.diag([-1.0, 1, 1, 1])), MRI)
    assert np.array_equal(straight, flipped)
    permuted = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # file axes are y, z, x
    turned = read(nifti(tmp_path / "perm.nii.gz", values.transpose(1, 2, 0).copy(), permuted), MRI)
    assert np.array_equal(straight, turned)
    axes = [read_samples([tmp_path / name], MRI)[0].axes for name in ("ras.nii.gz", "las.nii.gz", "perm.nii.gz")]
    assert axes == ["RAS", "LAS", "ASR"]


def test_a_sheared_affine_is_straightened(tmp_path):
    values = np.repeat(np.arange(12, dtype=np.float32)[None, :, None], 8, axis=0).repeat(10, axis=2)  # y tells itself
    sheared = np.array(
        [[1.0, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )  # each slice half a mm further back
    (sample,) = read_samples([nifti(tmp_path / "a.nii", values, sheared)], MRI)
    assert [one.kind for one in sample.warnings] == ["tilt"]
    assert sample.pixels.shape == (1, 10, 17, 8)
    world = np.arange(17)[::-1]  # mm to the front, of each row
    expected = [np.clip(world - 0.5 * z, 0, 11) for z in range(10)]
    np.testing.assert_allclose(sample.pixels[0, :, :, 4], expected, atol=1e-4)


def test_ct_without_air_is_warned_of(tmp_path):
    inside = np.linspace(-100, 300, 512).reshape(8, 8, 8)
    assert noted(nifti(tmp_path / "a.nii", inside), CT) == ["units"]
    inside[0] = -900
    assert noted(nifti(tmp_path / "b.nii", inside), CT) == []


def test_ct_windows_hounsfield_units(tmp_path):
    values = np.full((8, 8, 8), -2000.0, np.float32)
    values[0, 0, :3] = (0, 500, 3000)
    result = np.sort(read(nifti(tmp_path / "a.nii", values), CT).ravel())
    np.testing.assert_allclose([result[0], result[-3], result[-2], result[-1]], [0, 0.5, 0.75, 1], atol=1e-6)


def test_mri_is_scaled_by_percentiles_of_what_is_not_zero(tmp_path):
    values = np.zeros((20, 20, 20), np.float32)
    values[5:15, 5:15, 5:15] = np.linspace(100, 1100, 1000).reshape(10, 10, 10)
    result = read(nifti(tmp_path / "a.nii.gz", values), MRI)
    low, high = np.percentile(np.linspace(100, 1100, 1000), (0.2, 99.8))
    assert result.max() == 1
    middle = np.sort(result[result > 0])[500 - 5]
    assert middle == pytest.approx((600 - low) / (high - low), abs=0.02)


def test_a_trailing_axis_of_one_is_dropped_and_spacing_resamples(tmp_path):
    values = RANDOM.random((16, 16, 8, 1)).astype(np.float32)
    path = nifti(tmp_path / "a.nii.gz", values, np.diag([2.0, 2, 5, 1]))
    assert read(path, MRI).shape == (1, 8, 16, 16)
    assert read(path, MRI, (10.0, 4.0, 4.0)).shape == (1, 4, 8, 8)


def test_resampling_keeps_the_mean_and_does_not_alias():
    stripes = np.zeros((1, 8, 64, 64), np.float32)
    stripes[..., ::2] = 1
    small = resample(stripes, (4, 16, 16))
    np.testing.assert_allclose(small, 0.5, atol=0.13)
    assert small.mean() == pytest.approx(0.5, abs=0.01)


def bad_pictures(folder):
    whole = saved(folder / "whole.jpg", np.kron(GREY, np.ones((4, 4), np.uint8))).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"hello, world!")
    saved(folder / "tiny.png", GREY[:8, :8])
    saved(folder / "constant.png", np.zeros((40, 40), np.uint8))
    frames = [Image.fromarray(GREY)] * 2
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    png = saved(folder / "bomb.png", GREY).read_bytes()
    header = png[12:16] + (60000).to_bytes(4, "big") * 2 + png[24:29]
    (folder / "bomb.png").write_bytes(png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:])
    return {
        "truncated.jpg": "incomplete or damaged",
        "zero.png": "empty",
        "text.png": r"not a PNG, JPEG or TIFF picture \(looks like text\)",
        "tiny.png": "8 x 8 pixels is too small",
        "constant.png": "constant image",
        "pages.tif": "2 pages",
        "bomb.png": "claims more than .* million pixels",
    }


def bad_volumes(folder):
    noise = RANDOM.normal(0, 300, (20, 20, 20))
    good = nifti(folder / "good.nii.gz", noise.astype(np.float32)).read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) * 6 // 10])
    plain = nifti(folder / "good.nii", noise.astype(np.float32)).read_bytes()
    (folder / "short.nii").write_bytes(plain[: 352 + 9000])
    saved(folder / "picture.png", GREY)
    (folder / "png.nii.gz").write_bytes((folder / "picture.png").read_bytes())
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"hello"))
    (folder / "packed.nii.gz").write_bytes(b"\x1f\x8b\x08" + b"\xee" * 500)
    (folder / "zero.nii.gz").write_bytes(b"")
    holes = noise.astype(np.float32)
    holes[0, 0, :5] = np.nan
    nifti(folder / "nan.nii.gz", holes)
    nifti(folder / "all-nan.nii.gz", holes * np.nan)
    nifti(folder / "nothing.nii.gz", np.zeros((20, 20, 20), np.int16))
    nifti(folder / "four.nii.gz", RANDOM.random((10, 10, 10, 4)).astype(np.float32))
    nifti(folder / "slice.nii.gz", RANDOM.random((20, 20, 1)).astype(np.float32))
    nifti(folder / "huge-spacing.nii.gz", noise.astype(np.float32), np.diag([1000.0, 1000, 1000, 1]))
    nifti(folder / "offset.nii.gz", (noise.clip(-1000) + 1024).clip(0).astype(np.uint16))
    unset = nib.Nifti1Image(noise.astype(np.float32), None)
    unset.header["sform_code"] = unset.header["qform_code"] = 0
    nib.save(unset, folder / "no-affine.nii.gz")
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"] = [3, 30000, 30000, 30000, 1, 1, 1, 1]
    header["sform_code"], header["srow_x"], header["srow_y"], header["srow_z"] = (
        1,
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
    )
    header["vox_offset"] = 352
    (folder / "claims.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1004))
    return {
        "truncated.nii.gz": "incomplete or damaged",
        "short.nii": "expected 32,000 bytes of voxels, found 9,000",
        "png.nii.gz": r"not a NIfTI file \(looks like PNG\)",
        "text.nii.gz": r"not a NIfTI file \(looks like packed text\)",
        "packed.nii.gz": r"not a NIfTI file \(looks like gzip\)",
        "zero.nii.gz": "empty",
        "nan.nii.gz": "5 of 8000 values",
        "all-nan.nii.gz": "no usable voxel",
        "nothing.nii.gz": "constant",
        "four.nii.gz": "4-D",
        "slice.nii.gz": "too thin",
        "huge-spacing.nii.gz": "not plausible",
        "offset.nii.gz": "no value below 0",
        "no-affine.nii.gz": "no orientation",
        "claims.nii.gz": "header claims",
    }


@pytest.mark.parametrize(("make", "modality"), [(bad_pictures, XRAY), (bad_volumes, CT)])
def test_what_must_not_be_trained_on_is_refused_by_name_and_reason(tmp_path, make, modality):
    for name, reason in make(tmp_path).items():
        with pytest.raises(UnreadableFile, match=reason) as caught:
            read(tmp_path / name, modality)
        assert caught.value.kind in KINDS
        text = str(caught.value)
        assert name in text
        assert "\n" not in text, name


def test_a_modality_without_a_reader_says_so():
    with pytest.raises(DataError, match="no reader for 1-D"):
        suffixes(Modality(ndim=1, normalisation="range"))
