"""Reads the segmentation mask of an image, in the image's own orientation, and refuses what does not fit it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from invcoss_site.ingest.image import FORMATS
from invcoss_site.ingest.nifti import read_nifti
from invcoss_site.ingest.sample import Pixels, Sample, check_not_empty, unreadable

Mask = npt.NDArray[np.int64]


def read_mask(image: Sample, path: Path, classes: Collection[int] | None) -> Mask:
    """The mask in `path` as classes (1, *spatial), where `image` has (C, *spatial). Raises UnreadableFile.

    It must have the image's shape, for a volume also its spacing, and no value but `classes`, if they are known. The
    values of an indexed picture are its indices.
    """
    check_not_empty(path)
    pixels = _volume(image, path) if image.spacing_mm else _picture(path)
    if pixels.shape[1:] != image.pixels.shape[1:]:
        shapes = [tuple(reversed(found.shape[1:])) for found in (pixels, image.pixels)]
        text = f"mask has shape {shapes[0]} and its image {image.path} {shapes[1]}; pair it with its own image"
        raise unreadable(path, "mask", text)
    strange = [
        value for value in np.unique(pixels).tolist() if (value % 1 if classes is None else value not in classes)
    ]
    if strange:
        known = "a whole number" if classes is None else f"one of {', '.join(str(one) for one in sorted(classes))}"
        raise unreadable(path, "mask", f"class {strange[0]:g} is not {known}; correct the mask")
    return np.asarray(pixels, dtype=np.int64)


def _volume(image: Sample, path: Path) -> Pixels:
    mask = read_nifti(path)
    if mask.warnings:
        raise unreadable(path, "mask", "its axes lean, and classes can't be resampled; export it on a straight grid")
    assert image.spacing_mm is not None and mask.spacing_mm is not None
    if mask.pixels.shape == image.pixels.shape and not np.allclose(mask.spacing_mm, image.spacing_mm, rtol=0.01):
        text = f"mask has spacing {mask.spacing_mm} and its image {image.spacing_mm}; pair it with its own image"
        raise unreadable(path, "mask", text)
    return mask.pixels


def _picture(path: Path) -> Pixels:
    try:
        with Image.open(path, formats=FORMATS) as file:
            pixels = np.asarray(file)
    except Exception:
        raise unreadable(path, "mask", "not a picture, or damaged; export it again") from None
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():  # grey saved as colour
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise unreadable(path, "mask", "colours where one class a pixel is expected; export it as an indexed picture")
    return pixels[None]
