"""Reads a 2-D picture (PNG, JPEG or TIFF) with Pillow, refusing what is damaged rather than padding it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest.values import Values, unit_range

FORMATS = ("PNG", "JPEG", "TIFF")
MIN_SIDE = 16  # pixels
_WHITE_IS_ZERO = 0  # value of the TIFF tag PhotometricInterpretation


def read_picture(path: Path, modality: Modality, spacing_mm: tuple[float, float, float] | None) -> Values:
    """Picture as float32 (C, H, W) in [0, 1]; colour, palette and alpha become the modality's channels.

    `spacing_mm` is for volumes; pixels have no size here. Raises UnreadableFile.
    """
    assert spacing_mm is None, "the plan refuses spacing_mm for 2-D modalities"
    pixels = _decode(path, modality.channels)
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise UnreadableFile(f"{path}: {width} x {height} pixels is too small, a side needs {MIN_SIDE}; remove it")
    values = unit_range(path, pixels, modality)
    if values.ndim == 2:
        return np.repeat(values[None], modality.channels, axis=0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _decode(path: Path, channels: int) -> npt.NDArray[np.generic]:
    """Pixels (H, W) of a grey or deep picture, or (H, W, 3), in the file's number type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                white_is_zero = False
                if isinstance(file, TiffImageFile):
                    if file.n_frames > 1:
                        raise UnreadableFile(f"{path}: {file.n_frames} pages in one file; save one picture a file")
                    white_is_zero = file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
                image = ImageOps.exif_transpose(file)
    except UnreadableFile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UnreadableFile(f"{path}: claims more than {limit} million pixels; cut it into tiles") from None
    except UnidentifiedImageError:
        raise UnreadableFile(f"{path}: not a PNG, JPEG or TIFF picture, whatever its name says; remove it") from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise UnreadableFile(f"{path}: incomplete or damaged picture ({error}); copy it again") from None
    if image.mode.startswith(("I", "F")):  # more than 8 bits; Pillow leaves these as they are stored
        deep = np.asarray(image)
        return deep.max() - deep if white_is_zero else deep
    return np.asarray(image.convert("RGB" if channels == 3 else "L"))
