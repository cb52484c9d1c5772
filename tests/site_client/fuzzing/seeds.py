"""Small whole files of every format and compression that is read, made anew and the same each time."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from tests.site_client.dicoms import dataset, enhanced, save, slice_of

Format = Literal["DICOM", "NIfTI", "PNG", "JPEG", "TIFF", "slide", "text"]
Use = Literal["image", "mask", "text"]


@dataclass(frozen=True)
class Seed:
    """A whole file `name` with `data`, and the files `others` beside it that it needs: slices, or a mask's image."""

    format: Format
    name: str
    data: bytes
    modality: str = ""
    use: Use = "image"
    others: dict[str, bytes] = field(default_factory=dict)


@lru_cache(maxsize=1)
def seeds() -> tuple[Seed, ...]:
    return (*_series(), *_films(), *_volumes(), *_pngs(), *_jpegs(), *_tiffs(), *_slides(), *_texts(), *_masks())


def _random() -> np.random.Generator:
    return np.random.default_rng(5)


def volume(sides: tuple[int, ...] = (8, 20, 24)) -> Any:
    """A ball in air, in Hounsfield units and with noise: int16."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in sides), indexing="ij")
    ball = np.where(sum(axis**2 for axis in grid) < 0.6, 40.0, -1000.0)
    return (ball + _random().normal(0, 12, sides)).clip(-1024, 3000).astype(np.int16)


def film(side: int = 40) -> Any:
    """A grey picture with a frame darker than its middle: uint8."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return (200 - 120 * np.maximum(abs(x), abs(y)) + _random().integers(0, 20, (side, side))).astype(np.uint8)


def colour(side: int = 40) -> Any:
    return np.dstack([film(side), film(side)[::-1], film(side).T])


# DICOM


def dicom_bytes(data: Dataset, syntax: str | None = None, number: int = 1) -> bytes:
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number}"
    if syntax == DeflatedExplicitVRLittleEndian:
        data.file_meta.TransferSyntaxUID, syntax = syntax, None
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "a.dcm", data, syntax).read_bytes()


def _series() -> Iterator[Seed]:
    slices = (volume() + 1024).clip(0, 4095).astype(np.uint16)
    syntaxes = {
        "plain": None,
        "deflated": DeflatedExplicitVRLittleEndian,
        "rle": RLELossless,
        "ls": JPEGLSLossless,
        "near": JPEGLSNearLossless,
        "j2k": JPEG2000Lossless,
        "lossless": JPEGLossless,
        "sv1": JPEGLosslessSV1,
        "extended": JPEGExtended12Bit,
    }
    for name, syntax in syntaxes.items():
        files = {
            f"{name}-{number}.dcm": dicom_bytes(
                slice_of(plane, (0.0, 0.0, 2.5 * number), bits_stored=12, StudyDescription="x" * 16), syntax, number
            )
            for number, plane in enumerate(slices)
        }
        yield Seed("DICOM", f"{name}-3.dcm", files.pop(f"{name}-3.dcm"), "ct", others=files)
    yield Seed("DICOM", "frames.dcm", dicom_bytes(enhanced(slices)), "mri")
    yield Seed("DICOM", "frames-rle.dcm", dicom_bytes(enhanced(slices), RLELossless), "mri")


def _films() -> Iterator[Seed]:
    deep = film().astype(np.uint16) * 16
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "RescaleSlope": "1", "RescaleIntercept": "0"}
    yield Seed("DICOM", "window.dcm", dicom_bytes(dataset(deep, bits_stored=12, **window)), "xray")
    white = dataset(deep, bits_stored=12, PixelPaddingValue=0)
    white.PhotometricInterpretation = "MONOCHROME1"
    yield Seed("DICOM", "white.dcm", dicom_bytes(white), "xray")
    table, steps = Dataset(), np.linspace(0, 4095, 4096).astype(np.uint16)
    table.LUTDescriptor, table.LUTData = [4096, 0, 12], steps.tobytes()
    yield Seed("DICOM", "table.dcm", dicom_bytes(dataset(deep, bits_stored=12, VOILUTSequence=[table])), "xray")
    yield Seed("DICOM", "baseline.dcm", dicom_bytes(dataset(film()), JPEGBaseline8Bit), "xray")
    yield Seed("DICOM", "ls.dcm", dicom_bytes(dataset(deep, bits_stored=12), JPEGLSLossless), "xray")
    yield Seed("DICOM", "rgb.dcm", dicom_bytes(dataset(colour())), "pathology")
    palette = dataset(film())
    palette.PhotometricInterpretation = "PALETTE COLOR"
    for number, name in enumerate(("Red", "Green", "Blue")):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        entries = (np.arange(256, dtype=np.uint16) * 257) ^ (number * 4096)
        setattr(palette, f"{name}PaletteColorLookupTableData", entries.tobytes())
    yield Seed("DICOM", "palette.dcm", dicom_bytes(palette), "pathology")


# NIfTI


def nifti_bytes(
    values: Any, affine: Any = None, kind: Any = nib.Nifti1Image, header: Any = None, slope: float = 1
) -> bytes:
    image = kind(values, np.diag([1.5, 1.5, 2.5, 1.0]) if affine is None else affine, header)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"made up"
    image.header.set_slope_inter(slope, 0)
    content: bytes = image.to_bytes()
    return content


def _volumes() -> Iterator[Seed]:
    values = volume((20, 24, 8))
    oblique = np.diag([1.5, 1.5, 2.5, 1.0])
    oblique[0, 2] = 0.4
    big = nib.Nifti1Header(endianness=">")
    made = {
        "plain.nii": ("ct", nifti_bytes(values)),
        "packed.nii.gz": ("ct", nifti_bytes(values)),
        "leaning.nii.gz": ("ct", nifti_bytes(values, oblique)),
        "scaled.nii.gz": ("ct", nifti_bytes(values, np.diag([-1.5, 1.5, 2.5, 1.0]), slope=0.5)),
        "float.nii.gz": ("mri", nifti_bytes(values.astype(np.float32) + 1024)),
        "double.nii": ("mri", nifti_bytes(values.astype(np.float64) + 1024)),
        "bytes.nii.gz": ("mri", nifti_bytes((values // 16 + 64).clip(0, 255).astype(np.uint8))),
        "big-endian.nii": ("mri", nifti_bytes(values + np.int16(1024), header=big)),
        "second.nii.gz": ("mri", nifti_bytes(values + np.int16(1024), kind=nib.Nifti2Image)),
    }
    for name, (modality, data) in made.items():
        yield Seed("NIfTI", name, packed(data) if name.endswith(".gz") else data, modality)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


# pictures


def picture_bytes(pixels: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pngs() -> Iterator[Seed]:
    rgba = np.dstack([colour(), 255 - film()])
    made = {
        "grey.png": ("xray", picture_bytes(film(), "PNG")),
        "deep.png": ("xray", picture_bytes(film().astype(np.uint16) * 200, "PNG")),
        "bits.png": ("xray", picture_bytes(Image.fromarray(film()).convert("1"), "PNG")),
        "rgb.png": ("pathology", picture_bytes(colour(), "PNG")),
        "alpha.png": ("pathology", picture_bytes(rgba, "PNG")),
        "palette.png": ("pathology", picture_bytes(Image.fromarray(colour()).quantize(16), "PNG", transparency=3)),
        "moving.png": (
            "xray",
            picture_bytes(film(), "PNG", save_all=True, append_images=[Image.fromarray(film()[::-1])]),
        ),
    }
    return (Seed("PNG", name, data, modality) for name, (modality, data) in made.items())


def _jpegs() -> Iterator[Seed]:
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "grey.jpg": ("xray", picture_bytes(film(), "JPEG")),
        "turned.jpg": ("xray", picture_bytes(film(), "JPEG", exif=exif)),
        "rgb.jpg": ("pathology", picture_bytes(colour(), "JPEG")),
        "progressive.jpg": ("pathology", picture_bytes(colour(), "JPEG", progressive=True)),
        "cmyk.jpg": ("pathology", picture_bytes(Image.fromarray(colour()).convert("CMYK"), "JPEG")),
    }
    return (Seed("JPEG", name, data, modality) for name, (modality, data) in made.items())


def tiff_bytes(pixels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, software="made up", **options)
    return buffer.getvalue()


def _tiffs() -> Iterator[Seed]:
    deep = film().astype(np.uint16) * 200
    made = {
        "grey.tif": ("xray", tiff_bytes(film(), photometric="minisblack")),
        "white.tif": ("xray", tiff_bytes(film(), photometric="miniswhite")),
        "deep.tif": ("xray", tiff_bytes(deep, photometric="minisblack", compression="zlib")),
        "strips.tif": ("xray", tiff_bytes(deep, photometric="minisblack", rowsperstrip=4)),
        "other-end.tif": ("xray", tiff_bytes(deep, photometric="minisblack", byteorder=">")),
        "float.tif": ("xray", tiff_bytes(film() / np.float32(255), photometric="minisblack")),
        "lzw.tif": ("pathology", picture_bytes(colour(), "TIFF", compression="tiff_lzw")),
        "packbits.tif": ("pathology", picture_bytes(colour(), "TIFF", compression="packbits")),
        "tiles.tif": ("pathology", tiff_bytes(colour(), photometric="rgb", tile=(16, 16), compression="zlib")),
        "jpeg.tif": ("pathology", tiff_bytes(colour(64), photometric="rgb", tile=(32, 32), compression="jpeg")),
        "big.tif": ("pathology", tiff_bytes(colour(), photometric="rgb", bigtiff=True)),
    }
    return (Seed("TIFF", name, data, modality) for name, (modality, data) in made.items())


def slide_bytes(compression: str | None, description: str | None = None) -> bytes:
    """A slide of two levels at 0.5 um: white glass, and stained tissue on the left."""
    pixels = np.full((576, 576, 3), (243, 242, 244), np.uint8)
    pixels[:, :540] = (200, 110, 170)
    pixels -= _random().integers(0, 7, (72, 72, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level in range(2):
            scale = {"resolution": (20_000 / 4**level,) * 2, "resolutionunit": 3}
            further: dict[str, Any] = {"subifds": 1} if level == 0 else {"subfiletype": 1}
            file.write(
                pixels[:: 4**level, :: 4**level],
                tile=(256, 256),
                photometric="rgb",
                compression=compression,
                description=description,
                metadata=None,
                software="made up",
                **scale,
                **further,
            )
    return buffer.getvalue()


def _slides() -> Iterator[Seed]:
    aperio = "Aperio Image Library v11.2.1\n576x576 (256x256) JPEG/RGB Q=30|AppMag = 20|MPP = 0.5"
    yield Seed("slide", "pyramid.tif", slide_bytes("jpeg"), "pathology")
    yield Seed("slide", "flat.tif", slide_bytes("zlib"), "pathology")
    yield Seed("slide", "aperio.svs", slide_bytes("jpeg", aperio), "pathology")


# texts and masks


def _texts() -> Iterator[Seed]:
    words = "No focal consolidation. Heart size is normal; é."
    rows: list[dict[str, Any]] = [{"id": f"r{n}", "text": f"{words} {n}", "label": n % 3} for n in range(6)]
    rows[4] = {"id": "r4", "sections": [{"name": "findings", "text": words}, {"name": "impression", "text": "Clear."}]}
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = "id,text,label\n" + "".join(f'r{n},"{words} ""{n}""\nsecond line",{n}\n' for n in range(6))
    yield Seed("text", "reports.jsonl", lines, use="text")
    yield Seed("text", "reports.csv", table.encode(), use="text")
    yield Seed("text", "report.txt", (words * 20).encode(), use="text")


def _masks() -> Iterator[Seed]:
    values, classes = volume((20, 24, 8)), (volume((20, 24, 8)) > -500).astype(np.uint8)
    image = {"image.nii.gz": packed(nifti_bytes(values))}
    yield Seed("NIfTI", "mask.nii.gz", packed(nifti_bytes(classes)), "ct", "mask", image)
    indexed = Image.fromarray((film() > 120).astype(np.uint8), "L")
    yield Seed(
        "PNG", "mask.png", picture_bytes(indexed, "PNG"), "xray", "mask", {"image.png": picture_bytes(film(), "PNG")}
    )
