"""Which decoder takes which compression of DICOM pixels, whatever else is installed, so that every site reads alike.

RLE, JPEG and JPEG 2000 are decoded by pydicom and Pillow; lossless JPEG, 12-bit JPEG and JPEG-LS, grey only, by
imagecodecs, through a plug-in for pydicom.
"""

from __future__ import annotations

from collections.abc import Callable

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

_JPEG = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_END_OF_IMAGE = b"\xff\xd9"

DECODER_DEPENDENCIES = dict.fromkeys((*_JPEG, *_JPEG_LS), ("imagecodecs",))  # pydicom looks for both names
PLUGINS: dict[str, str] = {
    RLELossless: "pydicom",
    **dict.fromkeys((JPEGBaseline8Bit, JPEG2000Lossless, JPEG2000), "pillow"),
    **dict.fromkeys(DECODER_DEPENDENCIES, "imagecodecs"),
}


def is_available(uid: str) -> bool:
    return uid in DECODER_DEPENDENCIES


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """The pixels of one frame; pydicom calls it."""
    if runner.samples_per_pixel != 1:
        raise NotImplementedError("colour")
    decode: Callable[..., npt.NDArray[np.generic]] = imagecodecs.jpegls_decode
    if runner.transfer_syntax in _JPEG:
        decode = imagecodecs.jpeg8_decode
        if _END_OF_IMAGE not in source[-4:]:  # what is missing would be filled up with grey
            raise ValueError("the frame has no end")
    # With `out`, a frame that claims another size than its header is refused before anything is allocated for it.
    wide = runner.bits_stored > 8
    out = np.empty((runner.rows, runner.columns), np.uint16 if wide else np.uint8)
    return decode(source, out=out).astype(runner.pixel_dtype).tobytes()


for _syntax in DECODER_DEPENDENCIES:
    get_decoder(_syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))
