"""Files become images: sizes, cutting into sub-volumes, quarantine, what is kept of them and for how long."""

import os

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tests.site_client.dicoms import save_series
from tests.site_client.test_ingest_slide import drawn, write_slide

from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES, Geometry
from invcoss_site.home import load_home, write_home
from invcoss_site.ingest import read_samples
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare, sized, sub_volumes, without_background

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


def ready(folder, cache, modality="xray", geometry=PLANE, spacing_mm=None, index=INDEX, **others):
    row = MODALITIES[modality]
    return prepare(take_inventory(folder, row, index), row, geometry, spacing_mm, cache, **others)


def test_pictures_get_a_margin_for_cropping_and_held_out_ones_the_input_size(tmp_path):
    images = ready(folder_of_pictures(tmp_path / "data"), tmp_path / "cache")
    assert images.train.shape == (3, 1, 48, 48)
    assert images.heldout.shape == (1, 1, 32, 32)
    assert images.train.dtype == np.float16
    assert 0 <= np.asarray(images.train).min() < np.asarray(images.train).max() <= 1
    assert (images.train_cases, images.quarantined) == (3, ())


def test_a_picture_is_cropped_to_its_centre():
    values = np.zeros((1, 20, 60), np.float32)
    values[:, :, 20:40] = 1  # exactly the centre square
    square = sized(values, (10, 10))
    assert square.shape == (1, 10, 10)
    assert square.min() == 1


def test_sub_volumes_overlap_by_half_and_cover_a_volume():
    values = np.random.default_rng(0).random((1, 16, 16, 40), dtype=np.float32)
    # Depth 16 in windows of 8 at 0, 4, 8; width 40 in windows of 16 at 0, 8, 16, 24.
    assert sub_volumes(values, (8, 16, 16)) == [(d, 0, w) for d in (0, 4, 8) for w in (0, 8, 16, 24)]


def test_empty_sub_volumes_are_left_out_but_of_an_empty_volume_one_is_kept():
    values = np.zeros((1, 8, 16, 64), np.float32)
    values[..., :16] = np.random.default_rng(0).random((8, 16, 16))
    assert sub_volumes(values, (8, 16, 16)) == [(0, 0, 0), (0, 0, 8)]
    assert sub_volumes(np.zeros_like(values), (8, 16, 16)) == [(0, 0, 24)]


def test_the_background_around_a_volume_is_cropped_and_small_volumes_are_padded():
    values = np.full((1, 20, 40, 40), 0.01, np.float32)
    bright = np.random.default_rng(0).uniform(0.1, 1, (10, 20, 16)).astype(np.float32)
    values[0, 3:13, 5:25, 20:36] = bright
    assert np.array_equal(without_background(values, (8, 16, 16)), bright[None])
    padded = without_background(np.full((1, 4, 10, 10), 0.5, np.float32), (8, 16, 16))
    assert padded.shape == (1, 8, 16, 16)
    assert padded.sum() == pytest.approx(0.5 * 400)
    assert without_background(np.zeros((1, 8, 16, 20), np.float32), (8, 16, 16)).shape == (1, 8, 16, 20)


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
    assert np.array_equal(images.train[0][:, 4:], images.train[1][:, :4])
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


def readings(monkeypatch):
    """The names of the files that are read from now on."""
    names = []

    def read(files, modality, part):
        names.append(files[0].name)
        return read_samples(files, modality, part)

    monkeypatch.setattr("invcoss_site.prepare.read_samples", read)
    return names


def test_a_new_case_costs_that_case_and_a_moved_one_nothing(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "data")
    first = np.array(ready(data, tmp_path / "cache").train)
    picture(data / "new.png", 9)
    (data / "labels.csv").write_text((data / "labels.csv").read_text() + "\nnew.png,c9,train")
    names = readings(monkeypatch)
    more = ready(data, tmp_path / "cache")
    assert names == ["new.png"]
    assert more.train.shape == (4, 1, 48, 48)
    assert np.array_equal(more.train[:3], first)
    moved = ready(data.rename(tmp_path / "elsewhere"), tmp_path / "cache")
    assert names == ["new.png"] and moved.key == more.key


def test_a_damaged_file_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "data")
    (data / "1.png").write_bytes(b"no picture")
    (data / "2.png").write_bytes(b"no picture")  # the same content: each is still called by its own name
    with pytest.raises(DataError, match="1 training"):
        ready(data, tmp_path / "cache")
    names = readings(monkeypatch)
    picture(data / "2.png", 2)
    os.utime(data / "2.png", (1, 1))
    images = ready(data, tmp_path / "cache")
    assert names == ["2.png"]
    assert [one.path.name for one in images.quarantined] == ["1.png"]
    assert str(data / "1.png") in images.quarantined[0].reason


def test_what_was_stored_before_a_kill_is_not_read_again(tmp_path, monkeypatch):
    data, shards = folder_of_pictures(tmp_path / "data", train=6), tmp_path / "cache" / "images" / "shards"
    expected = np.array(ready(data, tmp_path / "another").train)
    monkeypatch.setattr("invcoss_site.prepare.SHARD_BYTES", 1)  # a shard each
    names = readings(monkeypatch)

    def die(done, of):
        if names and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ready(data, tmp_path / "cache", on_file=die)
    (shards / "unnamed.safetensors").write_bytes(b"written, but not in the database yet")
    (shards / ".draft").write_bytes(b"half")
    assert len(list(shards.iterdir())) == 5
    names.clear()
    images = ready(data, tmp_path / "cache")
    assert sorted(names) == ["3.png", "4.png", "5.png", "6.png"]
    assert np.array_equal(images.train, expected)
    assert len(list(shards.iterdir())) == 7


def test_a_file_that_changes_while_it_is_read_is_left_out_this_time(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "data")

    def slow(files, modality, part):
        if files[0].name == "1.png":
            os.utime(files[0], (1, 1))
        return read_samples(files, modality, part)

    monkeypatch.setattr("invcoss_site.prepare.read_samples", slow)
    images = ready(data, tmp_path / "cache")
    assert len(images.train) == 2
    assert [one.path.name for one in images.quarantined] == ["1.png"]
    assert "wait until it is copied" in images.quarantined[0].reason
    monkeypatch.undo()
    assert len(ready(data, tmp_path / "cache").train) == 3


def test_arrays_of_an_earlier_version_are_removed_and_secrets_are_not(tmp_path):
    for name in ("0123", "dp/hop"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "cache" / "0123" / "train.f16").write_bytes(b"old")
    (tmp_path / "cache" / "dp" / "hop" / "dp-secret").write_bytes(b"key")
    ready(folder_of_pictures(tmp_path / "data"), tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["dp", "images"]
    assert (tmp_path / "cache" / "dp" / "hop" / "dp-secret").exists()


def test_nobody_else_can_read_the_cache(tmp_path):
    ready(folder_of_pictures(tmp_path / "data"), tmp_path / "cache")
    images = tmp_path / "cache" / "images"
    for path in (images, *images.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_what_does_not_fit_is_refused_before_it_is_written_with_the_setting_to_change(tmp_path):
    data = folder_of_pictures(tmp_path / "data", train=30)
    with pytest.raises(DataError, match=r"need about .* GB.*raise cache_gb in site.toml"):
        ready(data, tmp_path / "cache", limit_bytes=30 * 48 * 48 * 2)
    assert not list((tmp_path / "cache" / "images" / "shards").iterdir())
    assert len(ready(data, tmp_path / "cache", limit_bytes=40 * 48 * 48 * 2).train) == 30


def test_what_is_there_can_be_used_though_the_disk_is_full(tmp_path, monkeypatch):
    data = folder_of_pictures(tmp_path / "data")
    ready(data, tmp_path / "cache")
    monkeypatch.setattr("invcoss_site.sample_store.KEEP_FREE_BYTES", 2**62)
    assert len(ready(data, tmp_path / "cache").train) == 3
    picture(data / "0.png", 9)
    os.utime(data / "0.png", (1, 1))
    with pytest.raises(DataError, match="free space on the disk of"):
        ready(data, tmp_path / "cache")


def test_a_site_may_limit_its_cache(tmp_path):
    home = write_home(tmp_path, "north", tmp_path)
    assert home.cache_gb is None
    settings = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(f"{settings}cache_gb = 1.5\n")
    assert load_home(tmp_path).cache_gb == 1.5
    (tmp_path / "site.toml").write_text(f"{settings}cache_gb = 0\n")
    with pytest.raises(DataError, match=r"site.toml: cache_gb: "):
        load_home(tmp_path)


def test_sub_volumes_of_one_volume_are_stored_once(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).normal(0, 300, (48, 48, 48)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.0, 1.0])), data / f"{number}.nii.gz")
    (data / "labels.csv").write_text("file,split\n0.nii.gz,train\n1.nii.gz,train\n2.nii.gz,test\n")
    images = ready(data, tmp_path / "cache", "ct", VOLUME, (1.0, 1.0, 1.0))
    assert len(images.train) == 2 * 11 * 5 * 5 and len(images.heldout) == 11 * 5 * 5
    (shard,) = (tmp_path / "cache" / "images" / "shards").iterdir()
    assert 3 * 48**3 * 2 < shard.stat().st_size < 3 * 48**3 * 2 + 1000


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
