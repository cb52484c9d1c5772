"""Files become arrays: sizes, cutting into sub-volumes, quarantine, the cache and its limits."""

import os

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tests.site_client.dicoms import save_series
from tests.site_client.test_ingest_slide import drawn, write_slide

from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES, Geometry
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare, sized

PLANE = Geometry(channels=1, size=(32, 32), patch=(8, 8))
VOLUME = Geometry(channels=1, size=(8, 16, 16), patch=(4, 8, 8))
INDEX = ("labels.csv",)


def picture(path, seed=0, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)).save(path)


def folder_of_pictures(folder, train=3, test=1):
    lines = ["file,case,split"]
    for number in range(train + test):
        picture(folder / f"{number}.png", number)
        lines.append(f"{number}.png,c{number},{'train' if number < train else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def ready(folder, cache, modality="xray", geometry=PLANE, spacing_mm=None, index=INDEX):
    row = MODALITIES[modality]
    return prepare(take_inventory(folder, row, index), row, geometry, spacing_mm, cache)


def test_pictures_get_a_margin_for_cropping_and_held_out_ones_the_input_size(tmp_path):
    images = ready(folder_of_pictures(tmp_path / "data"), tmp_path / "cache")
    assert images.train.shape == (3, 1, 48, 48)
    assert images.heldout.shape == (1, 1, 32, 32)
    assert images.train.dtype == np.float16
    assert float(images.train.min()) >= 0
    assert float(images.train.max()) <= 1
    assert (images.train_cases, images.quarantined) == (3, ())


def test_a_picture_is_cropped_to_its_centre():
    values = np.zeros((1, 20, 60), np.float32)
    values[:, :, 20:40] = 1  # exactly the centre square
    (square,) = sized(values, (10, 10), cut=False)
    assert square.shape == (1, 10, 10)
    assert square.min() == 1


def test_a_volume_is_cut_into_overlapping_sub_volumes_that_cover_it():
    values = np.random.default_rng(0).random((1, 16, 16, 40), dtype=np.float32)
    parts = sized(values, (8, 16, 16), cut=True)
    assert {part.shape for part in parts} == {(1, 8, 16, 16)}
    # Depth 16 in windows of 8 at 0, 4, 8; width 40 in windows of 16 at 0, 8, 16, 24.
    assert len(parts) == 3 * 4
    for depth, width in ((0, 0), (4, 8), (8, 24)):
        expected = values[:, depth : depth + 8, :, width : width + 16]
        assert any(np.array_equal(part, expected) for part in parts)


def test_empty_sub_volumes_are_left_out_and_small_volumes_padded():
    values = np.zeros((1, 8, 16, 64), np.float32)
    values[..., :16] = np.random.default_rng(0).random((8, 16, 16))
    assert len(sized(values, (8, 16, 16), cut=True)) == 2  # windows at 0 and, half empty, at 8
    (padded,) = sized(np.full((1, 4, 10, 10), 0.5, np.float32), (8, 16, 16), cut=True)
    assert padded.shape == (1, 8, 16, 16)
    assert padded.sum() == pytest.approx(0.5 * 400)


def test_volumes_are_resampled_to_the_spacing_of_the_stage(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).normal(0, 300, (32, 32, 16)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 4.0, 1.0])), data / f"{number}.nii.gz")
    (data / "labels.csv").write_text("file,split\n0.nii.gz,train\n1.nii.gz,train\n2.nii.gz,test\n")
    # 64 x 64 x 64 mm at 4 mm is 16 voxels a side: depth windows of 8 at 0, 4, 8.
    images = ready(data, tmp_path / "cache", "ct", VOLUME, (4.0, 4.0, 4.0))
    assert images.train.shape == (6, 1, 8, 16, 16)
    whole = ready(data, tmp_path / "cache", "ct", VOLUME)
    assert whole.train.shape == (2, 1, 8, 16, 16)


def test_a_damaged_file_costs_that_file_and_is_named(tmp_path):
    data = folder_of_pictures(tmp_path / "data", train=4)
    (data / "1.png").write_bytes((data / "1.png").read_bytes()[:400])
    images = ready(data, tmp_path / "cache")
    assert len(images.train) == 3
    (rejected,) = images.quarantined
    assert rejected.path.name == "1.png"
    assert "damaged" in rejected.reason
    again = ready(data, tmp_path / "cache")
    assert again.quarantined == images.quarantined, "also when it comes from the cache"


def test_the_cache_is_used_until_a_file_changes(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "data")
    first = np.array(ready(data, tmp_path / "cache").train)
    monkeypatch.setattr("invcoss_site.prepare.read_samples", None)  # a call would fail
    assert np.array_equal(ready(data, tmp_path / "cache").train, first)
    monkeypatch.undo()
    picture(data / "0.png", seed=77)
    os.utime(data / "0.png", (1, 1))
    assert not np.array_equal(ready(data, tmp_path / "cache").train, first)


def test_a_cache_that_was_not_finished_is_made_again(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    first = np.array(ready(data, tmp_path / "cache").train)
    (cache,) = (tmp_path / "cache").iterdir()
    (cache / "done.json").unlink()
    (cache / "train.f16").write_bytes(b"half")
    assert np.array_equal(ready(data, tmp_path / "cache").train, first)


def test_every_training_image_has_its_case_by_number(tmp_path):
    data = tmp_path / "data"
    lines = ["file,case,split"]
    for number, case in enumerate(["ann", "bob", "eve", "bob", "joe", "ann"]):
        picture(data / f"{number}.png", number)
        lines.append(f"{number}.png,{case},{'test' if case == 'eve' else 'train'}")
    (data / "labels.csv").write_text("\n".join(lines))
    (data / "4.png").write_bytes(b"no picture")
    images = ready(data, tmp_path / "cache")
    assert images.case_of.tolist() == [0, 1, 1, 0], "in the order of the images; joe has none"
    assert images.train_cases == 2
    again = ready(data, tmp_path / "cache")
    assert again.case_of.tolist() == [0, 1, 1, 0] and again.key == images.key
    picture(data / "0.png", 9)
    os.utime(data / "0.png", (1, 1))
    assert ready(data, tmp_path / "cache").key != images.key


def test_sub_volumes_of_a_case_have_one_number(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).normal(0, 300, (32, 32, 16)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 4.0, 1.0])), data / f"{number}.nii.gz")
    (data / "labels.csv").write_text("file,split\n0.nii.gz,train\n1.nii.gz,train\n2.nii.gz,test\n")
    images = ready(data, tmp_path / "cache", "ct", VOLUME, (4.0, 4.0, 4.0))
    assert images.case_of.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("train", "test"), [(1, 0), (1, 1), (2, 0)])
def test_too_few_images_are_a_data_error_that_says_what_is_needed(tmp_path, train, test):
    data = folder_of_pictures(tmp_path / "data", train, test)
    with pytest.raises(DataError, match="at least 2 and 1") as caught:
        ready(data, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_folder_with_one_image_and_no_index(tmp_path):
    picture(tmp_path / "data" / "only.png")
    with pytest.raises(DataError, match="at least 2 and 1"):
        ready(tmp_path / "data", tmp_path / "cache", index=())


def test_a_series_of_slices_is_one_image_and_its_oddities_are_kept(tmp_path):
    volume = np.random.default_rng(0).integers(0, 2000, (6, 16, 16)).astype(np.uint16)
    for number in range(4):
        save_series(tmp_path / "data" / str(number), volume, series=f"1.{number}", PatientID=f"p{number}")
    extra = tmp_path / "data" / "3"
    (extra / "copy.dcm").write_bytes((extra / "002.dcm").read_bytes())
    (tmp_path / "data" / "2" / "003.dcm").unlink()
    (tmp_path / "data" / "labels.csv").write_text("file,split\n0,train\n1,train\n2,train\n3,test\n")
    first = ready(tmp_path / "data", tmp_path / "cache", "ct", VOLUME)
    again = ready(tmp_path / "data", tmp_path / "cache", "ct", VOLUME)
    for images in (first, again):
        assert images.train.shape == (2, 1, 8, 16, 16)
        assert [(one.path.parent.name, one.kind) for one in images.quarantined] == [("2", "gap")]
        assert [(one.path.parent.name, one.kind) for one in images.warnings] == [("3", "duplicates")]
        assert {name: count for name, (count, _) in images.axes.items()} == {"LPS": 3}
    (extra / "copy.dcm").unlink()
    assert ready(tmp_path / "data", tmp_path / "cache", "ct", VOLUME).warnings == (), "every slice counts for the cache"


def test_the_tiles_of_a_slide_are_images_of_one_case(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in "abc":
        write_slide(data / f"{name}.tif", drawn())
    (data / "labels.csv").write_text("file,split\na.tif,train\nb.tif,train\nc.tif,test\n")
    images = ready(data, tmp_path / "cache", "pathology", Geometry(channels=3, size=(32, 32), patch=(8, 8)))
    assert (len(images.train), len(images.heldout), images.train_cases) == (20, 10, 2)
    assert images.case_of.tolist() == [0] * 10 + [1] * 10
