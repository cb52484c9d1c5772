"""Small files that claim or hold gigabytes, and edits that leave a file whole."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from random import Random

import imagecodecs
import numpy as np
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from tests.site_client.dicoms import dataset, enhanced
from tests.site_client.fuzzing.edits import png_bytes, png_chunks
from tests.site_client.fuzzing.seeds import Seed, dicom_bytes, film, nifti_bytes, packed, seeds, volume

MIB = 1 << 20


@cache
def _block() -> bytes:
    """64 MiB of zeros, deflated so that it may be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(64 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)


def deflated_zeros(head: bytes, zeros: int) -> bytes:
    """`head` and then `zeros` bytes of 0 as a raw deflate stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    blocks, rest = divmod(zeros, 64 * MIB)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    return start + _block() * blocks + last.compress(bytes(rest)) + last.flush()


def zlib_zeros(zeros: int) -> bytes:
    """Some numbers, and then zeros up to this many bytes, as zlib packs them."""
    head = bytes(4) + bytes(range(min(200, zeros - 4)))  # of pictures, a line begins with 0
    zeros -= len(head)
    low, high = zlib.adler32(head) & 0xFFFF, zlib.adler32(head) >> 16
    checksum = (high + zeros * low) % 65521 << 16 | low
    return b"\x78\xda" + deflated_zeros(head, zeros) + struct.pack(">I", checksum)


def gzip_of(head: bytes, zeros: int) -> bytes:
    """`head` and then zeros, as gzip members one after another."""
    blocks, rest = divmod(zeros, 64 * MIB)
    return packed(head) + _gzip_block() * blocks + gzip.compress(bytes(rest), mtime=0)


@cache
def _gzip_block() -> bytes:
    return gzip.compress(bytes(64 * MIB), mtime=0)


def _nifti(sides: tuple[int, int, int], kind: type[np.generic], zeros: int, spacing: float = 1.0) -> bytes:
    """A packed volume that claims `sides`, begins with a ball and goes on with zeros."""
    ball = volume((20, 24, 8)).astype(kind)
    head = bytearray(nifti_bytes(ball, np.diag([spacing, spacing, spacing, 1.0])))
    struct.pack_into("<3h", head, 42, *sides)
    return gzip_of(bytes(head), max(0, zeros - ball.nbytes))


def _png(width: int, height: int, depth: int, colour: int, holds: bool) -> bytes:
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    zeros = height * (1 + width * bits // 8) if holds else 100_000
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_bytes([(b"IHDR", head), (b"IDAT", zlib_zeros(zeros)), (b"IEND", b"")])


def _jpeg(width: int, height: int) -> bytes:
    """A flat picture of its true size, or a small one that claims another."""
    buffer = io.BytesIO()
    if width * height <= 70_000_000:
        flat = Image.new("L", (width, height), 77)
        flat.paste(Image.fromarray(film()))
        flat.save(buffer, "JPEG", progressive=True)
        return buffer.getvalue()
    Image.fromarray(film()).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def _tiff(width: int, height: int, bits: int, holds: bool, samples: int = 1, tile: int = 0) -> bytes:
    """A deflated TIFF of one strip, or with `tile` one that claims tiles of this side."""
    content = zlib_zeros(width * height * samples * bits // 8 if holds else 100_000)
    colour = 2 if samples == 3 else 1
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 8), (262, 3, colour), (277, 3, samples)]
    if tile:
        tags += [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, len(content))]
    else:
        tags += [(273, 4, 8), (278, 4, height), (279, 4, len(content))]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in sorted(tags)
    )
    at = 8 + len(content)
    return b"II*\0" + struct.pack("<I", at) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def _deflated_dicom(rows: int, columns: int, frames: int, zeros: int) -> bytes:
    data = enhanced((volume() + 1024).clip(0, 4095).astype(np.uint16)) if frames > 1 else dataset(film())
    data.Rows, data.Columns = rows, columns
    if frames > 1:
        data.NumberOfFrames = frames
    whole = dicom_bytes(data)
    start = whole.index(b"\x08\x00\x16\x00UI")  # of the data set, after the file's own group
    meta, body = whole[:start], bytearray(whole[start:])
    struct.pack_into("<I", body, body.index(b"\xe0\x7f\x10\x00") + 8, zeros & 0xFFFFFFFF)
    old, new = (
        b"1.2.840.10008.1.2.1\0",
        DeflatedExplicitVRLittleEndian.encode() + b"\0" * (len(DeflatedExplicitVRLittleEndian) % 2),
    )
    meta = meta.replace(struct.pack("<H", len(old)) + old, struct.pack("<H", len(new)) + new)
    at = meta.index(b"\x02\x00\x00\x00UL") + 8
    meta = meta[:at] + struct.pack("<I", struct.unpack_from("<I", meta, at)[0] + len(new) - len(old)) + meta[at + 4 :]
    cut = body.index(b"\xe0\x7f\x10\x00") + 12
    return meta + deflated_zeros(bytes(body[:cut]) + bytes(range(200)), zeros - 200)


def _coded_dicom(syntax: str, side: int) -> bytes:
    """A flat film of its true size in a few bytes."""
    flat = np.full((side, side), 77, np.uint16)
    flat[:200, :200] = np.random.default_rng(0).integers(0, 4096, (200, 200))
    return dicom_bytes(dataset(flat, bits_stored=16), syntax)


def _frames_dicom(count: int, side: int) -> bytes:
    """A volume of `count` flat slices in JPEG-LS, each a few bytes."""
    planes = np.zeros((8, side, side), np.uint16)
    data = enhanced(planes)
    shared = data.PerFrameFunctionalGroupsSequence[0]
    frames = []
    for number in range(count):
        frame = deepcopy(shared)
        frame.PlanePositionSequence[0].ImagePositionPatient = [0.0, 0.0, -2.0 * number]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence, data.NumberOfFrames = frames, count
    noise = np.random.default_rng(0).integers(0, 4096, (16, 16))
    planes[0, :16, :16] = noise
    coded = [imagecodecs.jpegls_encode(planes[0])] + [imagecodecs.jpegls_encode(planes[1])] * (count - 1)
    data.PixelData = encapsulate(coded)
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.file_meta.TransferSyntaxUID = JPEGLSLossless
    return dicom_bytes(data)


def _line(megabytes: int) -> bytes:
    return b'{"id": "a", "text": "' + b"x" * (megabytes << 20) + b'"}\n{"id": "b", "text": "Clear lungs."}\n'


def _rows(megabytes: int) -> bytes:
    return b'id,text\na,"' + b"x" * (megabytes << 20) + b'"\nb,Clear lungs.\n'


def _nested(depth: int) -> bytes:
    return b'{"id": "a", "text": ' + b"[" * depth + b"]" * depth + b'}\n{"id": "b", "text": "Clear lungs."}\n'


G = 1 << 30
Bomb = tuple[str, str, str, Callable[[], bytes]]  # format, name, modality, the file
BOMBS: tuple[Bomb, ...] = (
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((20, 24, 8), np.int16, 4 * G)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((512, 512, 512), np.int16, 512**3 * 2)),
    ("NIfTI", "b.nii.gz", "mri", lambda: _nifti((512, 512, 512), np.float32, 512**3 * 4)),
    ("NIfTI", "b.nii.gz", "mri", lambda: _nifti((512, 512, 512), np.float64, 512**3 * 8)),
    ("NIfTI", "b.nii.gz", "mri", lambda: _nifti((640, 640, 640), np.uint8, 640**3)),
    ("NIfTI", "b.nii.gz", "mri", lambda: _nifti((400, 400, 400), np.float32, 400**3 * 4)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((800, 800, 800), np.int16, 800**3 * 2)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((2000, 2000, 2000), np.int16, 100)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((800, 800, 800), np.int16, 100 * MIB)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((20, 24, 8), np.int16, 0, 50.0)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((20, 24, 8), np.int16, 0, 40.0)),
    ("NIfTI", "b.nii.gz", "ct", lambda: _nifti((30, 30, 30), np.int16, 30**3 * 2, 32.0)),
    ("PNG", "b.png", "xray", lambda: _png(30_000, 30_000, 8, 0, True)),
    ("PNG", "b.png", "xray", lambda: _png(8_000, 8_000, 16, 0, True)),
    ("PNG", "b.png", "pathology", lambda: _png(5_790, 5_790, 8, 6, True)),
    ("PNG", "b.png", "pathology", lambda: _png(5_790, 5_790, 16, 2, True)),
    ("PNG", "b.png", "xray", lambda: _png(8_190, 8_190, 1, 0, True)),
    ("PNG", "b.png", "xray", lambda: _png(2**31 - 1, 17, 8, 0, False)),
    ("PNG", "b.png", "xray", lambda: _png(8_000, 8_000, 8, 0, False)),
    (
        "PNG",
        "b.png",
        "xray",
        lambda: _png(64, 64, 8, 0, False)[:-12] + png_bytes([(b"IDAT", zlib_zeros(2 * G)), (b"IEND", b"")])[8:],
    ),
    ("JPEG", "b.jpg", "xray", lambda: _jpeg(8_190, 8_190)),
    ("JPEG", "b.jpg", "pathology", lambda: _jpeg(5_790, 5_790)),
    ("JPEG", "b.jpg", "xray", lambda: _jpeg(65_500, 65_500)),
    ("JPEG", "b.jpg", "xray", lambda: _jpeg(65_500, 20)),
    ("TIFF", "b.tif", "xray", lambda: _tiff(30_000, 30_000, 8, True)),
    ("TIFF", "b.tif", "xray", lambda: _tiff(8_000, 8_000, 16, True)),
    ("TIFF", "b.tif", "xray", lambda: _tiff(8_000, 8_000, 32, True)),
    ("TIFF", "b.tif", "pathology", lambda: _tiff(5_790, 5_790, 8, False, 3)),
    ("TIFF", "b.tif", "pathology", lambda: _tiff(64, 64, 8, True, 3, tile=60_000)),
    ("TIFF", "b.tif", "xray", lambda: _tiff(64, 64, 8, False, 1, tile=30_000)),
    ("slide", "b.svs", "pathology", lambda: _tiff(60_000, 60_000, 8, False, 3, tile=60_000)),
    ("slide", "b.svs", "pathology", lambda: _tiff(8_000, 8_000, 8, True, 3)),
    ("DICOM", "b.dcm", "xray", lambda: _deflated_dicom(40, 40, 1, 4 * G - 2)),
    ("DICOM", "b.dcm", "xray", lambda: _deflated_dicom(8_000, 8_000, 1, 64_000_000)),
    ("DICOM", "b.dcm", "mri", lambda: _deflated_dicom(512, 512, 8, 1 * G)),
    ("DICOM", "b.dcm", "mri", lambda: _deflated_dicom(512, 512, 512, 512**3 * 2)),
    ("DICOM", "b.dcm", "xray", lambda: _coded_dicom(RLELossless, 6_000)),
    ("DICOM", "b.dcm", "xray", lambda: _coded_dicom(JPEGLSLossless, 8_000)),
    ("DICOM", "b.dcm", "xray", lambda: _coded_dicom(JPEG2000Lossless, 6_000)),
    ("DICOM", "b.dcm", "mri", lambda: _frames_dicom(500, 512)),
    ("DICOM", "b.dcm", "mri", lambda: _frames_dicom(1_000, 700)),
    ("text", "b.jsonl", "", lambda: _line(64)),
    ("text", "b.jsonl", "", lambda: b"{" * (64 << 20)),
    ("text", "b.jsonl", "", lambda: b"\n" * (4 << 20)),
    ("text", "b.jsonl", "", lambda: _nested(100_000)),
    ("text", "b.csv", "", lambda: _rows(64)),
    ("text", "b.csv", "", lambda: b"id,text\n" + b'"' * (32 << 20)),
    ("text", "b.csv", "", lambda: b"," * (32 << 20)),
    ("text", "b.txt", "", lambda: b"x" * (64 << 20)),
    ("text", "b.txt", "", lambda: b"\xff" * 9_999_999),
)


def bomb(number: int) -> tuple[Seed, bytes]:
    kind, name, modality, make = BOMBS[number % len(BOMBS)]
    seed = Seed(kind, name, b"", modality, "text" if kind == "text" else "image")  # type: ignore[arg-type]
    return seed, make()


# what leaves a file whole: it must still be read


def harmless(seed: Seed, random: Random) -> bytes:
    """The seed's file with something else said where no pixel or letter depends on it."""
    data, word = seed.data, random.choice((b"north wing", b"ward 7", b"\xe9t\xe9 1999", b"~"))
    match seed.format:
        case "DICOM":
            if b"StudyDescription" in data or b"\x08\x00\x30\x10LO" in data:
                at = data.index(b"\x08\x00\x30\x10LO") + 8
                return data[:at] + word.ljust(16) + data[at + 16 :]
            return data + b"\xfc\xff\xfc\xffOB\0\0\x0a\0\0\0" + word.ljust(10)[:10]  # trailing padding
        case "NIfTI":
            packing = seed.name.endswith(".gz")
            content = bytearray(gzip.decompress(data) if packing else data)
            at = content.index(b"made up")
            content[at : at + 16] = word.ljust(16, b"\0")
            return packed(bytes(content)) if packing else bytes(content)
        case "PNG":
            chunks = png_chunks(data)
            chunks.insert(1, (b"tEXt", b"Comment\0" + word))
            return png_bytes(chunks)
        case "JPEG":
            return data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(word)) + word + data[2:]
        case "TIFF" | "slide":
            return data.replace(b"made up", word.ljust(7)[:7]) if b"made up" in data else data + word
    if seed.name.endswith(".jsonl"):
        return data + b'{"id": "new", "text": "Clear lungs."}\n'
    return data + (b"new,Clear lungs.,1\n" if seed.name.endswith(".csv") else b" Clear lungs.")


def harmless_seeds() -> tuple[Seed, ...]:
    """Seeds that can be altered so; what is deflated as a whole can't."""
    return tuple(seed for seed in seeds() if not seed.name.startswith("deflated"))
