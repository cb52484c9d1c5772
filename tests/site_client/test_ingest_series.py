"""DICOM volumes: slices of any order and compression become what NIfTI would be; what does not fit is refused."""

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from tests.site_client.dicoms import PATIENT, dataset, enhanced, save, save_series, slice_of

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import MODALITIES
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.nifti import read_nifti
from invcoss_site.ingest.series import find_series, header_of, read_series
from invcoss_site.ingest.values import model_values

CT = MODALITIES["ct"]
YY, XX = np.mgrid[:18, :20]
# Without any symmetry: a wrong turn, flip or order changes it.
VOLUME = np.stack(
    [(900 + 60 * z + 20 * XX + 9 * YY + 5 * ((XX * YY + z) % 7)).astype(np.uint16) for z in range(6)]
)  # slices, rows, columns


def series_in(folder):
    return find_series(header_of(path) for path in folder.rglob("*.dcm"))


def twin(path, volume, affine):
    """The NIfTI file that has the same voxels: x along a row, y down a column."""
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0).astype(np.int16), affine), path)
    return read_nifti(path)


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_a_series_is_its_nifti_twin_whatever_its_compression(tmp_path, syntax):
    files = save_series(tmp_path, VOLUME, syntax=syntax, spacing=(0.5, 0.75), bits_stored=12)
    sample = read_series(files[::-1])
    expected = twin(tmp_path / "twin.nii.gz", VOLUME.astype(int) - 1024, np.diag([-0.75, -0.5, 2.0, 1.0]))
    assert np.array_equal(sample.pixels, expected.pixels)
    assert sample.spacing_mm == pytest.approx((2.0, 0.5, 0.75))
    assert (sample.axes, expected.axes, sample.warnings) == ("LPS", "LPS", ())
    assert sample.pixels.shape == (1, 6, 18, 20)


def test_coronal_slices_are_turned_by_their_orientation(tmp_path):
    orientation = (1, 0, 0, 0, 0, -1)  # rows to the left, columns to the feet; the normal is to the back
    files = save_series(tmp_path, VOLUME, orientation=orientation, step=(0, 3, 0))
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, -3, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    sample = read_series(files)
    assert np.array_equal(sample.pixels, twin(tmp_path / "a.nii", VOLUME.astype(int) - 1024, affine).pixels)
    assert sample.axes == "LIP"
    assert sample.spacing_mm == (1, 3, 1)


def test_each_slice_has_its_own_rescale_slope(tmp_path):
    for number, pixels in enumerate(VOLUME):
        data = slice_of(pixels, (0, 0, number))
        data.RescaleSlope, data.RescaleIntercept = number + 1, 0
        save(tmp_path / f"{number}.dcm", data)
    (files,) = series_in(tmp_path)
    values = read_series(files).pixels[0]
    np.testing.assert_allclose([values[n].max() for n in range(6)], [(n + 1) * VOLUME[n].max() for n in range(6)])


def test_an_enhanced_file_of_many_frames_is_one_volume(tmp_path):
    slopes = [1, 2, 3, 4, 5, 6]
    save(tmp_path / "a.dcm", enhanced(VOLUME, slopes=slopes))
    (files,) = series_in(tmp_path)
    sample = read_series(files)
    scaled = np.stack([plane.astype(int) * slope for plane, slope in zip(VOLUME, slopes, strict=True)])
    expected = twin(tmp_path / "a.nii", scaled[::-1], np.diag([-1.5, -1, 2, 1]))  # frames ran to the feet
    assert np.array_equal(sample.pixels, expected.pixels)
    assert sample.spacing_mm == (2, 1, 1.5)


def test_a_tilted_gantry_is_straightened_and_said(tmp_path):
    tilt = np.deg2rad(15)
    down = np.array([0, np.cos(tilt), -np.sin(tilt)])  # of a column; the table still moves along the body
    # Each pixel tells how far down its column's direction it is, in tenths of a mm.
    for number in range(12):
        position = np.array([0, 0, 3.0 * number])
        depth = (position @ down + np.arange(40)) * 10 + 1000
        pixels = np.repeat(depth.round().astype(np.uint16)[:, None], 16, axis=1)
        save(tmp_path / f"{number:02}.dcm", slice_of(pixels, position.round(4).tolist(), orientation=(1, 0, 0, *down)))
    (files,) = series_in(tmp_path)
    sample = read_series(files)
    (warned,) = sample.warnings
    assert warned.kind == "tilt"
    assert "15.0 degrees" in warned.reason
    depth, height, width = sample.spacing_mm
    assert (depth, height, width) == pytest.approx((3 * np.cos(tilt), 1, 1), abs=1e-3)
    assert sample.pixels.shape == (1, 12, 49, 16)  # 8.5 mm of shift are added, none of a slice is cut off
    # On a straight grid a row is equally deep in all slices; beside its own data a slice is continued by its edge.
    first = [3.0 * number * -np.sin(tilt) for number in range(12)]
    deep = [np.clip(first[11] + np.arange(49), start, start + 39) for start in first]
    np.testing.assert_allclose(sample.pixels[0, :, :, 8], 10 * np.array(deep) + 1000 - 1024, atol=1)


def test_series_that_share_a_folder_are_kept_apart(tmp_path):
    save_series(tmp_path / "mixed", VOLUME, series="1.1")
    for file in (tmp_path / "mixed").iterdir():
        file.rename(file.with_name(f"a{file.name}"))
    save_series(tmp_path / "mixed", VOLUME[:5], series="1.1", spacing=(2.0, 2.0))  # same series, other pixels
    for file in (tmp_path / "mixed").glob("0*"):
        file.rename(file.with_name(f"b{file.name}"))
    save_series(tmp_path / "mixed", VOLUME[:4], series="1.2")
    save(tmp_path / "mixed" / "zz.dcm", enhanced(VOLUME))
    save_series(tmp_path / "copy", VOLUME, series="1.1")
    found = series_in(tmp_path)
    assert sorted(len(files) for files in found) == [1, 4, 5, 6, 6]
    assert all(len({file.parent for file in files}) == 1 for files in found)
    assert sorted(read_series(files).pixels.shape[1] for files in found) == [4, 5, 6, 6, 6]


def test_a_little_jitter_of_orientation_and_position_is_borne(tmp_path):
    for number, pixels in enumerate(VOLUME):
        orientation = (1, 1e-5 * number, 0, 0, 1, -1e-5 * number)
        save(
            tmp_path / f"{number}.dcm",
            slice_of(pixels, (0, 0, number * 2 + 0.01 * (number % 2)), orientation=orientation),
        )
    (files,) = series_in(tmp_path)
    assert read_series(files).spacing_mm == pytest.approx((2, 1, 1), rel=0.01)


def test_copies_of_a_slice_are_left_out_and_said(tmp_path):
    files = save_series(tmp_path, VOLUME)
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(files[2].read_bytes())
    sample = read_series([*files, copy])
    assert sample.pixels.shape == (1, 6, 18, 20)
    assert [(warned.kind, "copy.dcm" in warned.reason) for warned in sample.warnings] == [("duplicates", True)]


def gap(folder):
    save_series(folder, VOLUME)[3].unlink()
    return "gap", "uneven slice spacing, 4 mm between 00[35].dcm and 00[35].dcm and 2 mm elsewhere"


def two_images_at_one_position(folder):
    save_series(folder, VOLUME)
    save(folder / "echo.dcm", slice_of(VOLUME[0] + np.uint16(5), (0, 0, 4)))
    return "duplicates", "different images at one position, .* and .*echo.dcm|echo.dcm and"


def no_geometry(folder):
    files = save_series(folder, VOLUME)
    data = dataset(VOLUME[0], SeriesInstanceUID="1.2.3.4")
    for file in files:
        file.unlink()
    save(folder / "a.dcm", data)
    return "no-geometry", "no geometry"


def beside_the_line(folder):
    for number, pixels in enumerate(VOLUME):
        save(folder / f"{number}.dcm", slice_of(pixels, (3.0 * (number == 3), 0, number)))
    return "no-geometry", "3.dcm is beside its place"


def few(folder):
    save_series(folder, VOLUME[:2])
    return "too-small", "2 slices"


def colour(folder):
    save_series(folder, np.repeat(VOLUME[..., None], 3, axis=3).astype(np.uint8))
    return "dimensions", "grey slices are expected"


def thick(folder):
    save_series(folder, VOLUME, step=(0, 0, 200.0))
    return "spacing", "200 mm are not plausible"


def frames_without_places(folder):
    data = enhanced(VOLUME)
    del data.PerFrameFunctionalGroupsSequence
    save(folder / "a.dcm", data)
    return "no-geometry", "no geometry"


def damaged_slice(folder):
    files = save_series(folder, VOLUME, syntax=JPEGLosslessSV1, bits_stored=12)
    content = bytearray(files[2].read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start + 2 : start + 40] = b"\xee" * 38
    files[2].write_bytes(content)
    return "damaged", "003.dcm.*JPEG Lossless.* are damaged"


@pytest.mark.parametrize(
    "make",
    [
        gap,
        two_images_at_one_position,
        no_geometry,
        beside_the_line,
        few,
        colour,
        thick,
        frames_without_places,
        damaged_slice,
    ],
)
def test_what_is_no_whole_volume_is_refused_with_the_reason(tmp_path, make):
    kind, reason = make(tmp_path)
    (files,) = series_in(tmp_path)
    with pytest.raises(UnreadableFile, match=reason) as caught:
        read_series(files)
    assert caught.value.kind == kind
    assert str(tmp_path) in str(caught.value)
    assert PATIENT not in str(caught.value)


def test_a_series_becomes_what_the_model_takes(tmp_path):
    files = save_series(tmp_path, VOLUME)
    (sample,) = read_samples(files, CT)
    values = model_values(sample, CT, (4.0, 2.0, 2.0))
    assert values.shape == (1, 3, 9, 10)
    np.testing.assert_allclose(values.mean(), (VOLUME.astype(float) - 1024 + 1000).mean() / 2000, atol=0.01)
