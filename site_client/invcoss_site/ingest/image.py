"""Reads a 2-D picture (PNG, JPEG or TIFF) with Pillow, refusing what is damaged rather than padding it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from invcoss_common.errors import UnreadableFile
from invcoss_site.ingest.sample import Pixels, Sample, looks_like, unreadable, warning

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # of a site's own images, BMP is not taken; a published set has it
MIN_SIDE = 16  # pixels
MAX_PIXELS = 1 << 26  # larger than any film
LONGEST = 3  # sides of a picture over which little of it is in the square that is used
_WHITE_IS_ZERO = 0  # value of the TIFF tag PhotometricInterpretation

warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd tags; damaged pixels raise
warnings.simplefilter("error", Image.DecompressionBombWarning)  # here, because threads share the filters


def most_pixels(channels: int) -> int:
    """Of a picture: it is read as a whole, and in colour takes more memory."""
    return MAX_PIXELS if channels == 1 else MAX_PIXELS // 2


def read_picture(path: Path, channels: int) -> Sample:
    """Picture as a sample (C, H, W); colour, palette and alpha become `channels`. Raises UnreadableFile."""
    return picture(path, _decode(path, channels), channels)


def picture(path: Path, pixels: Pixels, channels: int, full_range: tuple[float, float] | None = None) -> Sample:
    """The sample of decoded pixels, grey (H, W) or (H, W, 3), in `channels`. Raises UnreadableFile if too small."""
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        text = f"{width} x {height} pixels is too small, a side needs {MIN_SIDE}; remove it"
        raise unreadable(path, "too-small", text)
    odd = []
    if max(height, width) > LONGEST * min(height, width):
        odd.append(warning(path, "shape", f"{width} x {height} pixels: only the square in its middle is used"))
    if channels == 3 and (pixels.ndim == 2 or all(np.array_equal(pixels[..., 0], pixels[..., n]) for n in (1, 2))):
        odd.append(warning(path, "grey", "grey where colour is expected: repeated to three channels"))
    if pixels.dtype == np.uint8:
        full_range = full_range or (0.0, 255.0)
    planes = np.repeat(pixels[None], channels, axis=0) if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Sample(path, np.ascontiguousarray(planes), full_range, warnings=tuple(odd))


def _decode(path: Path, channels: int) -> Pixels:
    """Pixels (H, W) of a grey or deep picture, or (H, W, 3), in the file's number type."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > most_pixels(channels):
                raise Image.DecompressionBombError
            white_is_zero = False
            if isinstance(file, TiffImageFile):
                if file.n_frames > 1:
                    text = f"{file.n_frames} pages in one file; save one picture a file"
                    raise unreadable(path, "dimensions", text)
                white_is_zero = file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
            ImageOps.exif_transpose(file, in_place=True)  # loads it, and copies only what is turned
            if file.mode.startswith(("I", "F")):  # more than 8 bits; Pillow leaves these as they are stored
                deep = np.asarray(file)
                return deep.max() - deep if white_is_zero else deep
            return np.asarray(file.convert("RGB" if channels == 3 else "L"))
    except UnreadableFile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        text = f"claims more than {most_pixels(channels) // 10**6} million pixels; cut it into tiles"
        raise unreadable(path, "too-large", text) from None
    except UnidentifiedImageError:
        if "TIFF" in (like := looks_like(path)):
            text = "a kind of TIFF that is not read; save it as 8-bit PNG"
            raise unreadable(path, "not-supported", text) from None
        text = f"not a PNG, JPEG or TIFF picture{like}, whatever its name says; remove it"
        raise unreadable(path, "not-this-format", text) from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise unreadable(path, "truncated", f"incomplete or damaged picture ({error}); copy it again") from None
