"""Masks come in the orientation of their image, and one that does not fit is refused."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import MODALITIES
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.masks import read_mask

VALUES = np.random.default_rng(0).normal(0, 300, (8, 9, 10)).astype(np.float32)
CLASSES = (VALUES > 0).astype(np.uint8) + (VALUES > 300)
RAS = np.diag([1.0, 2.0, 3.0, 1.0])
LAS = np.diag([-1.0, 2.0, 3.0, 1.0])


def volume(path, values, affine=RAS):
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def image(tmp_path):
    return read_samples([volume(tmp_path / "image.nii.gz", VALUES)], MODALITIES["mri"])[0]


@pytest.mark.parametrize("flipped", [False, True])
def test_a_mask_is_turned_as_its_image(tmp_path, flipped):
    found = image(tmp_path)
    mask = volume(tmp_path / "mask.nii.gz", CLASSES[::-1].copy() if flipped else CLASSES, LAS if flipped else RAS)
    classes = read_mask(found, mask, (0, 1, 2))
    assert np.array_equal(classes, (found.pixels > 0).astype(int) + (found.pixels > 300))


def test_the_mask_of_a_picture_is_its_values_or_indices(tmp_path):
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)).save(tmp_path / "image.png")
    (picture,) = read_samples([tmp_path / "image.png"], MODALITIES["xray"])
    classes = np.zeros((30, 40), np.uint8)
    classes[10:20] = 1
    Image.fromarray(classes * 255).save(tmp_path / "grey.png")
    assert np.array_equal(read_mask(picture, tmp_path / "grey.png", (0, 255))[0], classes * 255)
    indexed = Image.fromarray(classes)
    indexed.putpalette([0, 0, 0, 255, 90, 30])
    indexed.save(tmp_path / "indexed.png")
    assert np.array_equal(read_mask(picture, tmp_path / "indexed.png", (0, 1))[0], classes)
    Image.fromarray(np.dstack([classes] * 3)).save(tmp_path / "grey-as-colour.png")
    assert np.array_equal(read_mask(picture, tmp_path / "grey-as-colour.png", (0, 1))[0], classes)
    with pytest.raises(UnreadableFile, match="colours where one class"):
        Image.fromarray(np.dstack([classes, classes * 2, classes])).save(tmp_path / "colour.png")
        read_mask(picture, tmp_path / "colour.png", (0, 1))


@pytest.mark.parametrize(
    ("values", "affine", "reason"),
    [
        (CLASSES[:-1], RAS, r"shape \(7, 9, 10\) and its image .*image.nii.gz \(8, 9, 10\)"),
        (CLASSES, np.diag([1.0, 2.0, 4.0, 1.0]), "mask has spacing"),
        (np.where(VALUES.max() == VALUES, 77, CLASSES).astype(np.uint8), RAS, "class 77 is not one of 0, 1, 2"),
        (CLASSES * np.float32(0.5), RAS, "class 0.5 is not one of"),
        (CLASSES, np.array([[1.0, 0.3, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]), "axes lean"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, values, affine, reason):
    path = volume(tmp_path / "mask.nii.gz", values, affine)
    with pytest.raises(UnreadableFile, match=reason) as caught:
        read_mask(image(tmp_path), path, (0, 1, 2))
    assert caught.value.kind == "mask"
    assert "mask.nii.gz" in str(caught.value)
