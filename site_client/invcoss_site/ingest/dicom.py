"""Reads DICOM files with pydicom: headers with their checks, pixels, and 2-D images (CR, DX, MG and the like).

No value of a header that could identify anybody is ever part of a text.
"""

from __future__ import annotations

import logging
import os
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_partial
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, SegmentationStorage

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest.codecs import PLUGINS
from invcoss_site.ingest.image import most_pixels, picture
from invcoss_site.ingest.sample import LARGE, Pixels, Sample, looks_like, unreadable, warning
from invcoss_site.ingest.values import MAX_VOXELS, Values

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # odd values of tags that nobody asks for
warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")  # what matters is checked here
logging.getLogger("pydicom").setLevel(logging.ERROR)  # likewise

_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_TAGS: list[BaseTag | int] = [
    Tag(name)
    for name in (
        "SOPClassUID",
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "InstanceNumber",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "BitsAllocated",
    )
]
_FRAME_TAGS = [Tag("SharedFunctionalGroupsSequence"), Tag("PerFrameFunctionalGroupsSequence")]
_LONG_HEADER = ("OB", "OW", "OF", "OD")  # of an element in explicit VR: 12 bytes, others 8
_UNKNOWN = 0xFFFFFFFF  # length of compressed pixels, which have an end mark instead
_END_MARK = b"\xfe\xff\xdd\xe0"


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do; many have no or an odd suffix."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path, frames: bool = False) -> FileDataset:
    """What `_TAGS` name, with `frames` also each frame's place. The file has pixels, as many as its header says.

    Raises UnreadableFile.
    """
    lengths: list[tuple[str, int]] = []

    def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag not in _PIXELS:
            return False
        lengths.append((vr or "", length))
        return True

    try:
        with path.open("rb") as file:
            if not _inflates(file):
                text = "its data set unpacks to more than any scan; export it without compression"
                raise unreadable(path, "too-large", text)
            header = read_partial(file, at_pixels, specific_tags=[*_TAGS, *(_FRAME_TAGS if frames else ())])
            start = file.tell()
            size_bytes = os.fstat(file.fileno()).st_size
            file.seek(max(0, size_bytes - 64))
            ends = _END_MARK in file.read()
        for _ in header:  # elements are converted, and damaged ones found, when they are asked for
            pass
        for tag in ("Rows", "Columns"):
            setattr(header, tag, int(header.get(tag) or 0))
        kind = header.file_meta.get("MediaStorageSOPClassUID", header.get("SOPClassUID", UID("")))
        syntax = header.file_meta.TransferSyntaxUID
        explicit = not syntax.is_implicit_VR
        expected = _bytes_of_pixels(header)
    except UnreadableFile:
        raise
    except InvalidDicomError:
        text = f"not a DICOM file{looks_like(path)}; remove it"
        raise unreadable(path, "not-this-format", text) from None
    except Exception:  # pydicom raises anything on damaged bytes
        raise unreadable(path, "damaged", "damaged DICOM header; export it again") from None
    if not expected and not lengths and "Image" in kind.name and kind != SegmentationStorage:
        raise unreadable(path, "truncated", "file is incomplete, it ends within its header; copy it again")
    if not expected or not lengths or kind == SegmentationStorage:
        raise unreadable(path, "no-image", f"no image in this file ({kind.name or 'unknown kind'}); remove it")
    if header.Rows * header.Columns * frame_count(header) > MAX_VOXELS:
        shown = f"{header.Columns} x {header.Rows} x {frame_count(header)}"
        raise unreadable(path, "too-large", f"header claims {shown} pixels, more than any scan; export it again")
    vr, length = lengths[0]
    if length != _UNKNOWN and syntax != DeflatedExplicitVRLittleEndian:
        found = min(length, size_bytes - start - (12 if explicit and vr in _LONG_HEADER else 8))
        if found < expected:
            text = f"file is incomplete, {found:,} bytes of pixels of {expected:,}; copy or export it again"
            raise unreadable(path, "truncated", text)
    if length == _UNKNOWN and not ends:  # cut off, or with more after its pixels
        _whole(path)
    return header


def _inflates(file: BinaryIO) -> bool:
    """Whether a file, open at its beginning, is not deflated as a whole, or unpacks to a size that a scan can have.

    pydicom unpacks it whole, whatever comes of it. The file is left at its beginning.
    """
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    found = 0
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        while not unpacker.eof and found <= LARGE and (data := unpacker.unconsumed_tail or file.read(1 << 16)):
            found += len(unpacker.decompress(data, 1 << 24))
    file.seek(0)
    return found <= LARGE


def _bytes_of_pixels(header: Dataset) -> int:
    """How many bytes the pixels of a header take uncompressed; 0 if it tells no size."""
    if not header.get("Rows") or not header.get("Columns"):
        return 0
    samples = header.get("SamplesPerPixel") or 1
    pixels = int(header.Rows) * int(header.Columns) * frame_count(header)
    if header.get("PhotometricInterpretation") == "YBR_FULL_422":
        return pixels * 2 * int(header.BitsAllocated) // 8
    return pixels * int(samples) * int(header.BitsAllocated) // 8


def frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _whole(path: Path) -> FileDataset:
    """The whole data set, its pixels not decoded yet."""
    try:
        dataset = pydicom.dcmread(path)
    except Exception:
        raise unreadable(path, "damaged", "damaged DICOM file; export it again") from None
    if not any(tag in dataset for tag in _PIXELS):  # pydicom leaves out what has no end
        raise unreadable(path, "truncated", "file is incomplete, its pixels have no end; copy it again")
    return dataset


def read_pixels(path: Path) -> tuple[FileDataset, Pixels]:
    """The whole data set, and its decoded pixels: (frames,) rows, columns (, 3) in the file's numbers.

    Colour is RGB. Call `read_header` first. Raises UnreadableFile.
    """
    dataset = _whole(path)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax not in PLUGINS:
        text = f"no decoder for pixels compressed as {syntax.name}; export it without compression"
        raise unreadable(path, "not-supported", text)
    try:
        pixels = pixel_array(dataset, decoding_plugin=PLUGINS.get(syntax, ""))
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
    except Exception:
        text = f"its pixels ({syntax.name}) are damaged or of a rare kind; export it without compression"
        raise unreadable(path, "damaged", text) from None
    return dataset, pixels


def rescaled(path: Path, pixels: Pixels, dataset: Dataset) -> Values:
    """Pixels in the units of the data set's rescale slope and intercept or modality LUT (Hounsfield for CT)."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, by name, later
            return np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float32)
    except Exception:
        raise unreadable(path, "damaged", "its rescale values or lookup table are invalid; export it again") from None


def read_dicom_picture(path: Path, modality: Modality) -> Sample:
    """A 2-D image as a sample (C, H, W), black as low values. Raises UnreadableFile.

    If the modality takes a file's whole range, the file's own window (VOI LUT) says what that is.
    """
    header = read_header(path)
    if frame_count(header) > 1:
        text = f"{frame_count(header)} frames in one file; export one image a file"
        raise unreadable(path, "dimensions", text)
    if header.Rows * header.Columns > (most := most_pixels(modality.channels)):
        raise unreadable(path, "too-large", f"claims more than {most // 10**6} million pixels; export it again")
    dataset, pixels = read_pixels(path)
    if pixels.shape not in ((header.Rows, header.Columns), (header.Rows, header.Columns, 3)):
        raise unreadable(path, "dimensions", f"pixels {pixels.shape} where grey or RGB is expected; export it again")
    if pixels.ndim == 3:
        colour = pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16) >> 8  # palettes have 16 bits
        image = Image.fromarray(colour.astype(np.uint8)).convert("L" if modality.channels == 1 else "RGB")
        return picture(path, np.asarray(image), modality.channels)
    values, full_range = _shown(path, pixels, dataset, modality.normalisation == "range")
    sample = picture(path, values, modality.channels, full_range)
    if header.get("ImageOrientationPatient"):
        odd = warning(path, "dimensions", "a slice of a volume, used as a picture")
        sample = replace(sample, warnings=(*sample.warnings, odd))
    return sample


def _shown(path: Path, pixels: Pixels, dataset: Dataset, windowed: bool) -> tuple[Values, tuple[float, float] | None]:
    """Grey pixels as a display would have them, and the values of black and white if the file has a window."""
    values, full_range = rescaled(path, pixels, dataset), None
    if pixels.dtype == np.uint8 and np.array_equal(values, pixels):
        full_range = (0.0, 255.0)
    if windowed and (dataset.get("VOILUTSequence") or dataset.get("WindowWidth")):
        try:
            values, full_range = _through_window(values, dataset)
        except Exception:
            raise unreadable(path, "damaged", "its window or lookup table is invalid; export it again") from None
    stated = dataset.get("PixelPaddingValue")
    padding = pixels == stated if isinstance(stated, int) else np.zeros(pixels.shape, bool)
    seen = values if padding.all() else values[~padding]
    low, high = full_range or (float(seen.min()), float(seen.max()))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = low + high - values
    values[padding] = low
    return values, full_range


def _through_window(values: Values, dataset: Dataset) -> tuple[Values, tuple[float, float]]:
    """`values` through the data set's lookup table or window, and what is black and white after it."""
    if dataset.get("VOILUTSequence"):
        seen = apply_voi_lut(np.rint(values).astype(np.int64), dataset)
        return seen.astype(np.float32), (0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1)
    with np.errstate(over="ignore"):  # of a sigmoid
        black, white = np.sort(apply_voi_lut(np.array([-1e9, 1e9]), dataset))
        return np.asarray(apply_voi_lut(values, dataset), dtype=np.float32), (float(black), float(white))
