"""Predictions lie on the image they are of, and a picture shows truth and prediction; nothing is ever half written."""

import csv

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from tests.site_client import published

from invcoss_site.downstream import predictions
from invcoss_site.downstream.predictions import cleaned, file_name, write_classes, write_masks, write_overlay
from invcoss_site.downstream.reading import read_case
from invcoss_site.downstream.sets import find_cases
from invcoss_site.downstream.sets.cases import Case, of_split
from invcoss_site.downstream.task import TASKS, Task

VOLUME = Task(name="own", kind="segment", input="mri", size=(8, 8, 8), classes=("front", "back"))
OBLIQUE = np.array([[-1.2, 0.3, 0.0, 9.0], [0.2, 0.8, 0.0, -4.0], [0.0, 0.0, 2.0, 3.0], [0, 0, 0, 1]])
OBLIQUE[:3, 1] -= OBLIQUE[:3, 0] * (OBLIQUE[:3, 0] @ OBLIQUE[:3, 1]) / (OBLIQUE[:3, 0] @ OBLIQUE[:3, 0])


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def volume_case(folder, affine, shape=(12, 14, 10)):
    mask = published.blob(shape)
    mask[3:6, 4:8, 5:7] = 2
    image = published.volume(folder / "image.nii.gz", published.pixels(1, shape).astype(np.int16), affine)
    path = published.volume(folder / "mask.nii.gz", mask, affine)
    return Case("a", "a", "test", (image,), mask=path), mask


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, 2.0, 3.0, 1.0]), OBLIQUE], ids=["ras", "las", "oblique"])
@pytest.mark.parametrize("turned", [(0, 1, 2), (2, 0, 1)])
def test_a_predicted_volume_lies_on_its_image(tmp_path, affine, turned):
    affine = affine.copy()
    affine[:, :3] = affine[:, list(turned)]
    case, mask = volume_case(tmp_path, affine)
    example = read_case(VOLUME, case)
    path = write_masks(tmp_path / "out", VOLUME, case, example, example.target.numpy() > 0.5)
    assert path == tmp_path / "out" / "a.nii.gz"
    written = nib.load(path)
    assert np.array_equal(np.asarray(written.dataobj), mask)
    assert np.allclose(written.affine, affine)
    assert names_in(tmp_path / "out") == ["a.nii.gz"]


def test_a_volume_predicted_at_another_spacing_is_brought_back(tmp_path):
    case, mask = volume_case(tmp_path, np.eye(4), (24, 28, 20))
    task = VOLUME.model_copy(update={"spacing_mm": (2.0, 1.5, 1.5)})
    example = read_case(task, case)
    written = nib.load(write_masks(tmp_path, task, case, example, example.target.numpy() > 0.5))
    assert written.shape == mask.shape
    assert float((np.asarray(written.dataobj) == mask).mean()) > 0.9


def test_a_prepared_volume_keeps_its_grid_and_overlaps_are_painted_in_order(tmp_path):
    published.lits_prepared(tmp_path)
    task = TASKS["lits"]
    case = find_cases(task, tmp_path)[0]
    example = read_case(task, case)
    written = nib.load(write_masks(tmp_path / "out", task, case, example, example.target.numpy() > 0.5))
    values = np.asarray(written.dataobj)
    assert values.shape == (10, 18, 20) and sorted(np.unique(values)) == [0, 1, 2] and int((values == 2).sum()) == 1
    assert "".join(nib.aff2axcodes(written.affine)) == "SPL"
    assert np.allclose(written.header.get_zooms(), (1.5, 0.8, 0.8))


def test_a_predicted_picture_has_the_size_of_its_image(tmp_path):
    published.glas(tmp_path)
    task = TASKS["glas"].model_copy(update={"size": (80, 120)})
    case = find_cases(task, tmp_path)[0]
    example = read_case(task, case)
    path = write_masks(tmp_path / "out", task, case, example, example.target.numpy() > 0.5)
    assert np.array_equal(pixels_of(path)[..., 0], published.blob((40, 60)) * 255)


def test_classes_are_written_as_a_table(tmp_path):
    published.chestxr(tmp_path)
    task = TASKS["chestxr"]
    cases = of_split(find_cases(task, tmp_path), "test")
    probabilities = torch.eye(3)[[case.label for case in cases]] * 0.5 + 1 / 6
    write_classes(tmp_path / "out" / "classes.csv", task, cases, probabilities)
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == [case.id for case in cases]
    assert all(row["label"] == row["predicted"] == row["id"].split("/")[1] for row in rows)
    assert {row["p_covid"] for row in rows} == {"0.666667", "0.166667"}


def test_file_names_are_safe_and_apart():
    names = [
        file_name(Case(name, "p", "test", ()))
        for name in ("plain", "../../etc/passwd", "a/b.png", "a_b", "a b.nii.gz", "é" * 300)
    ]
    assert names[0] == "plain" and names[3] == "a_b" and len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") or len(name) > 120 or " " in name for name in names)


def test_liver_and_tumour_are_cleaned_as_published():
    organ, tumour = np.zeros((2, 20, 20, 20), bool)
    organ[2:14, 2:14, 2:14] = True
    organ[17:19, 17:19, 17:19] = True  # a smaller piece
    tumour[4:8, 4:8, 4:8] = True  # 64 voxels
    tumour[10:13, 10:13, 10:13] = True  # 27, too few
    tumour[16:, :10, :10] = True  # outside
    clean_organ, clean_tumour = cleaned(TASKS["lits"], np.stack([organ, tumour]))
    assert int(clean_organ.sum()) == 12**3 and int(clean_tumour.sum()) == 64
    both = np.stack([organ, tumour])
    assert cleaned(TASKS["vs"], both) is both
    assert not cleaned(TASKS["lits"], np.zeros_like(both)).any()


@pytest.mark.parametrize("ndim", [2, 3])
def test_an_overlay_shows_image_truth_and_prediction(tmp_path, ndim):
    if ndim == 3:
        task, (case, _) = VOLUME, volume_case(tmp_path, np.eye(4))
    else:
        published.qata(tmp_path)
        task = TASKS["qatav2"].model_copy(update={"size": (64, 64)})
        case = find_cases(task, tmp_path)[0]
    example = read_case(task, case)
    truth = example.target.numpy() > 0.5
    shifted = np.roll(truth, 3, axis=-1)
    pictures = {}
    for name, masks in {"none": np.zeros_like(truth), "right": truth, "shifted": shifted}.items():
        write_overlay(tmp_path / f"{name}.png", task, case, example, masks)
        pictures[name] = pixels_of(tmp_path / f"{name}.png")
    height, width, _ = pictures["right"].shape
    assert 200 < height < 900 and 300 < width < 1500
    changed = (np.abs(pictures["none"] - pictures["shifted"]).sum(axis=2) > 60).mean()
    assert 0.002 < changed < 0.2  # an outline, not the image
    wanted = np.array([int(predictions.TRUTH[i : i + 2], 16) for i in (1, 3, 5)] if ndim == 2 else (0x39, 0xD3, 0x53))
    assert (np.abs(pictures["none"] - wanted).sum(axis=2) < 40).sum() > 50


def test_an_overlay_of_nothing_is_made_too(tmp_path):
    case, _ = volume_case(tmp_path, np.eye(4))
    example = read_case(VOLUME, case)
    empty = type(example)(example.image * 0, example.target * 0, example.spacing_mm)
    write_overlay(tmp_path / "a.png", VOLUME, case, empty, np.zeros(example.target.shape, bool))
    assert pixels_of(tmp_path / "a.png").shape[1] > 300


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    case, _ = volume_case(tmp_path, np.eye(4))
    example = read_case(VOLUME, case)

    def breaks(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(predictions.nib, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        write_masks(tmp_path / "out", VOLUME, case, example, example.target.numpy() > 0.5)
    assert names_in(tmp_path / "out") == []
