"""Phantom folders: native formats, deterministic, every label visible."""

import csv
import hashlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from invcoss_common.errors import PlanError
from invcoss_common.modality import MODALITIES
from invcoss_common.phantoms import write_phantoms


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows(folder):
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("modality", MODALITIES)
def test_same_seed_same_bytes_and_more_cases_change_nothing_before_them(tmp_path, modality):
    for name, cases, seed in (("a", 4, 7), ("b", 5, 7), ("c", 4, 8)):
        write_phantoms(tmp_path / name, modality, cases, seed)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    images = [name for name in a if name != "labels.csv"]
    assert len(images) == 4
    assert all(a[name] == b[name] != c[name] for name in images)
    assert len({a[name] for name in images}) == 4


@pytest.mark.parametrize("modality", MODALITIES)
def test_index_lists_every_file_with_a_label_and_both_splits(tmp_path, modality):
    write_phantoms(tmp_path, modality, 20, 0)
    index = rows(tmp_path)
    assert {row["file"] for row in index} == {p.name for p in tmp_path.iterdir()} - {"labels.csv"}
    assert len({row["case"] for row in index}) == 20
    test = [row for row in index if row["split"] == "test"]
    assert len(test) == 4
    assert {row["label"] for row in test} == {row["label"] for row in index}, "a probe needs every class on both sides"


def test_pictures_are_what_the_table_says(tmp_path):
    for modality in ("xray", "pathology"):
        write_phantoms(tmp_path / modality, modality, 1, 3)
    with Image.open(tmp_path / "xray" / "xray-0000.png") as film:
        assert film.mode == "L"
    with Image.open(tmp_path / "pathology" / "pathology-0000.png") as image:
        tile = np.asarray(image).astype(float)
    assert tile.shape == (160, 160, 3)
    red, green, blue = tile.mean((0, 1))
    assert red > green + 30 and blue > green + 30, "stained pink and purple"


def test_volumes_have_a_ras_affine_in_mm_and_ct_is_in_hounsfield_units(tmp_path):
    write_phantoms(tmp_path, "ct", 1, 3)
    volume = nib.load(tmp_path / "ct-0000.nii.gz")
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.header.get_xyzt_units()[0] == "mm"
    hu = np.asarray(volume.dataobj)
    assert hu.dtype == np.int16
    assert np.median(hu[:, 0]) < -950, "air around the body"
    middle, slabs = hu.shape[0] // 2, hu.shape[2] // 2
    assert (hu[:, :, slabs] < -700).sum() > 500 and (hu[middle - 5 : middle + 5] > 300).sum() > 100, "lungs and spine"


def test_mri_files_are_on_different_intensity_scales(tmp_path):
    write_phantoms(tmp_path, "mri", 4, 3)
    tops = [np.percentile(np.asarray(nib.load(p).dataobj), 99) for p in sorted(tmp_path.glob("*.nii.gz"))]
    assert max(tops) > 2 * min(tops)


def test_labels_change_the_picture_where_they_should(tmp_path):
    write_phantoms(tmp_path, "xray", 80, 0)
    by_label = {}
    for row in rows(tmp_path):
        with Image.open(tmp_path / row["file"]) as image:
            film = np.asarray(image).astype(float)
        by_label.setdefault(row["label"], []).append(film)
    heart = {label: np.mean([f[100:115, 95:125] for f in films]) for label, films in by_label.items()}
    bases = {label: np.mean([f[95:105, 25:40] for f in films]) for label, films in by_label.items()}
    assert heart["cardiomegaly"] > heart["normal"] + 15
    assert bases["effusion"] > bases["normal"] + 15


def test_a_modality_without_a_phantom_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="no phantom for modality 'fundus', only for ct, mri, pathology, xray"):
        write_phantoms(tmp_path, "fundus", 4, 0)
