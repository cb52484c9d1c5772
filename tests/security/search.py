"""Finds words and pixels in whatever bytes: plain, encoded in a usual way, compressed, or as arrays of numbers.

A pattern is at least 12 bytes and unlike anything else. Hundreds of thousands are looked for at once: eight bytes of
each are its key, and a table tells where eight bytes may be a key.
"""

from __future__ import annotations

import base64
import bz2
import hashlib
import io
import json
import lzma
import re
import shutil
import sqlite3
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from invcoss_common.encoding import FOR_WEIGHTS, decode
from invcoss_common.errors import ProtocolError

Array = npt.NDArray[np.generic]

RUN = 16  # neighbouring pixels of one pattern; of wide numbers the first few
STRIDE = 12
DISTINCT = 10  # values of a run, or it may be in any picture
MIN_BYTES = 12
MAX_BYTES = 1 << 28  # of one thing unpacked
DEPTH = 3  # a package in a package in a package
CHUNK = 1 << 22
_SPREAD, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(40)  # of eight bytes to 24 bits


class Pattern(NamedTuple):
    """What is looked for: `content` is `what` in some form."""

    what: str
    form: str
    content: bytes


class Found(NamedTuple):
    what: str
    form: str
    where: str


class Search:
    """Looks for patterns; `searched` are the bytes that the last search looked at, unpacked ones included."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.by_key: dict[int, list[tuple[int, Pattern]]] = {}
        self.count, self.searched = 0, 0
        for pattern in patterns:
            assert len(pattern.content) >= MIN_BYTES and len(set(pattern.content)) >= 4, pattern  # unlike all else
            at = max(range(0, len(pattern.content) - 7, 2), key=lambda n: len(set(pattern.content[n : n + 8])))
            key = int.from_bytes(pattern.content[at : at + 8], "little")
            self.by_key.setdefault(key, []).append((at, pattern))
            self.count += 1
        self._keys = np.array(sorted(self.by_key), np.uint64)
        self._maybe = np.zeros(1 << 24, bool)
        self._maybe[(self._keys * _SPREAD) >> _SHIFT] = True

    def in_bytes(self, data: bytes, where: str) -> list[Found]:
        return self.in_all([(where, data)])

    def in_all(self, things: Iterable[tuple[str, bytes]]) -> list[Found]:
        """What is in things (where, bytes) or in anything packed in them; the same bytes are looked at once."""
        found: dict[Found, None] = {}
        seen: set[bytes] = set()
        self.searched = 0
        for where, data in things:
            for how, content in unpacked(data, where.endswith(PART)):
                digest = hashlib.sha256(content).digest()
                if digest not in seen:
                    seen.add(digest)
                    self.searched += len(content)
                    found |= {Found(*hit, f"{where}{how}"): None for hit in self._in_plain(content)}
        return list(found)

    def in_folder(self, folder: Path) -> list[Found]:
        """What is in the names and contents of all files under `folder`, and in the rows of its databases."""
        return self.in_all(contents(folder))

    def _in_plain(self, data: bytes) -> Iterator[tuple[str, str]]:
        positions = len(data) - 7
        for start in range(0, max(positions, 0), CHUNK):
            windows = np.ndarray(min(CHUNK, positions - start), "<u8", data, start, (1,))
            likely = np.nonzero(self._maybe[(windows * _SPREAD) >> _SHIFT])[0]
            nearest = np.searchsorted(self._keys[:-1], windows[likely])
            for at in likely[self._keys[nearest] == windows[likely]]:
                position = start + int(at)
                for offset, pattern in self.by_key[int(windows[at])]:
                    if position >= offset and data.startswith(pattern.content, position - offset):
                        yield pattern.what, pattern.form


# What is looked for


def word_patterns(what: str, word: str) -> Iterator[Pattern]:
    """A name or text, as it may be written, and its bytes as numbers."""
    plain = word.encode()
    written = {
        "plain": plain,
        "lower case": word.lower().encode(),
        "upper case": word.upper().encode(),
        "UTF-16": word.encode("utf-16-le"),
        "UTF-16, big end first": word.encode("utf-16-be"),
        "UTF-32": word.encode("utf-32-le"),
        "JSON": json.dumps(word)[1:-1].encode(),
        "\\u escapes": "".join(f"\\u{ord(c):04x}" for c in word).encode(),
        "escapes": word.encode("unicode_escape"),
        "escapes of bytes": ascii(plain)[2:-1].encode(),
        "URL": quote(word).encode(),
        "URL, every byte": "".join(f"%{byte:02X}" for byte in plain).encode(),
        "URL, every byte, lower case": "".join(f"%{byte:02x}" for byte in plain).encode(),
        "reversed": plain[::-1],
    }
    with suppress(UnicodeEncodeError):
        written["Latin-1"] = word.encode("latin-1")
    once = {content: form for form, content in reversed(written.items())}  # most forms of plain letters are the same
    yield from (Pattern(what, form, content) for content, form in once.items())
    yield from _byte_forms(what, plain)
    numbers = _number_forms(what, np.frombuffer(plain, np.uint8))
    yield from (pattern for pattern in numbers if pattern.content not in once)


def pixel_patterns(what: str, pixels: Array) -> Iterator[Pattern]:
    """Runs of neighbouring pixels (any shape), along every axis: as in their file, or scaled to [0, 1]."""
    for axis in range(pixels.ndim):
        for run in runs(np.moveaxis(pixels, axis, -1)):
            yield from _number_forms(what, run)
            if run.dtype == np.uint8:
                yield from _byte_forms(what, run.tobytes())


def prepared_patterns(
    what: str, images: npt.NDArray[np.floating[npt.NBitBase]], repeated: int = 1
) -> Iterator[Pattern]:
    """Runs in images (any shape) as a model gets them: as floats, and what of them is in [0, 1] as bytes 0 to 255.

    Every value is there `repeated` times, one after the other.
    """
    for once in runs(images[..., ::repeated]):
        run = np.repeat(once, repeated)
        yield from _float_forms(what, "prepared ", run)
        grey = np.rint(run.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
        yield from _array(what, "prepared, as bytes", grey)


def runs(pixels: Array) -> Iterator[Array]:
    """Every `STRIDE`th run of `RUN` values along the last axis in which hardly any value comes twice."""
    for row in np.ascontiguousarray(pixels).reshape(-1, pixels.shape[-1]):
        for start in range(0, len(row) - RUN + 1, STRIDE):
            run = row[start : start + RUN]
            if len(np.unique(run)) >= DISTINCT:
                yield run


def _byte_forms(what: str, plain: bytes) -> Iterator[Pattern]:
    yield Pattern(what, "hex", plain.hex().encode())
    yield Pattern(what, "hex, upper case", plain.hex().upper().encode())
    yield Pattern(what, "decimals", ",".join(map(str, plain)).encode())
    yield Pattern(what, "decimals, spaced", ", ".join(map(str, plain)).encode())
    for shift in range(3):
        whole = (shift + len(plain)) * 8 // 6  # characters that no byte after it has a part in
        text = base64.b64encode(bytes(shift) + plain)[-(-shift * 8 // 6) : whole]
        yield Pattern(what, f"base64, alignment {shift}", text)
        if (url := text.translate(bytes.maketrans(b"+/", b"-_"))) != text:
            yield Pattern(what, f"base64 of URLs, alignment {shift}", url)


def _number_forms(what: str, values: Array) -> Iterator[Pattern]:
    """Values as they are in their file, as integers and floats of other widths, and the floats of 8-bit ones / 255."""
    if values.dtype.kind in "iu":
        for kind in (values.dtype.str, "<i2", ">i2", "<i4", ">i4", "<i8", ">i8"):
            yield from _array(what, f"integers {kind}", values.astype(kind))
    yield from _float_forms(what, "", values)
    if values.dtype == np.uint8:
        yield from _float_forms(what, "scaled ", values.astype(np.float64) / 255)


def _float_forms(what: str, prefix: str, values: Array) -> Iterator[Pattern]:
    for kind in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8"):
        yield from _array(what, f"{prefix}floats {kind}", values.astype(kind))
    brain = torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy()
    yield from _array(what, f"{prefix}bfloat16", brain)


def _array(what: str, form: str, values: Array) -> Iterator[Pattern]:
    """The first 16 bytes at least, with 6 different values at least; none where rounding has made them alike."""
    for length in range(max(6, RUN // values.itemsize), len(values) + 1):
        if len(np.unique(values[:length])) >= 6:
            yield Pattern(what, form, values[:length].tobytes())
            return


# Where it is looked for

PART = "|part"  # at the end of a name: this is one part of an artefact, which may be in one of our own encodings


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files under `folder`, and the rows of its SQLite databases."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        yield f"the name of {name}", name.encode(errors="surrogateescape")
        if file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            yield name, data
            if data.startswith(b"SQLite format 3\0"):
                yield from ((f"{name}, table {table}", row) for table, row in _rows(file))


def _rows(database: Path) -> Iterator[tuple[str, bytes]]:
    """Every text and blob of a database, which may be in use; in its file a long one lies in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        for file in database.parent.glob(f"{database.name}*"):  # the write-ahead log beside it, too
            shutil.copyfile(file, Path(folder) / file.name)
        with closing(sqlite3.connect(Path(folder) / database.name)) as connection:
            connection.text_factory = bytes
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in connection.execute(f'SELECT * FROM "{table.decode()}"'):
                    yield from ((table.decode(), value) for value in row if isinstance(value, bytes))


def unpacked(data: bytes, part: bool = False, depth: int = DEPTH) -> Iterator[tuple[str, bytes]]:
    """`data` itself, and whatever is packed in it: (how it was found, bytes)."""
    yield "", data
    if depth:
        for how, inner in _packed(data, part):
            if len(inner) >= MIN_BYTES:
                yield from ((f" > {how}{path}", content) for path, content in unpacked(inner, False, depth - 1))


def _packed(data: bytes, part: bool) -> Iterator[tuple[str, bytes]]:
    if part:
        with suppress(ProtocolError):
            yield FOR_WEIGHTS, decode(data, FOR_WEIGHTS, MAX_BYTES)
    yield "deflate", _inflate(data, 0, -zlib.MAX_WBITS)
    yield from ((f"zlib at {at}", _inflate(data, at, zlib.MAX_WBITS)) for at in _zlib_headers(data))
    yield from ((f"gzip at {at}", _inflate(data, at, zlib.MAX_WBITS | 16)) for at in _all(data, b"\x1f\x8b\x08"))
    for at in _all(data, b"PK\x03\x04"):
        names = sum(int.from_bytes(data[at + n : at + n + 2], "little") for n in (26, 28))
        yield f"zip at {at}", _inflate(data, at + 30 + names, -zlib.MAX_WBITS)
    for magic in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"):  # PNG, JPEG, TIFF
        for at in _all(data, magic):
            with suppress(Exception), warnings.catch_warnings(action="ignore"):
                yield f"picture at {at}", np.asarray(Image.open(io.BytesIO(data[at:]))).tobytes()
    for name, magic, opened in (("bz2", b"BZh", bz2.BZ2Decompressor), ("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor)):
        for at in _all(data, magic):
            with suppress(OSError, lzma.LZMAError, EOFError):
                yield f"{name} at {at}", opened().decompress(data[at:], MAX_BYTES)
    for match in re.finditer(rb"[A-Za-z0-9+/_\-\r\n]{24,}", data):
        text = re.sub(rb"[\r\n]", b"", match[0]).translate(bytes.maketrans(b"-_", b"+/"))
        for shift in range(4):  # letters of something else may stand before it
            kept = text[shift:]
            yield f"base64 at {match.start()}+{shift}", base64.b64decode(kept[: len(kept) & ~3])
    for match in re.finditer(rb"[0-9A-Fa-f]{24,}", data):
        for shift in range(2):
            text = match[0][shift:]
            yield f"hex at {match.start()}+{shift}", bytes.fromhex(text[: len(text) & ~1].decode())


def _zlib_headers(data: bytes) -> list[int]:
    """Where a zlib stream may begin: two bytes that name deflate and a window, and are divisible by 31."""
    if len(data) < 2:
        return []
    first, second = np.frombuffer(data[:-1], np.uint8), np.frombuffer(data[1:], np.uint8)
    likely = np.nonzero((first & 0x8F) == 8)[0]
    pairs = first[likely].astype(np.uint16) * 256 + second[likely]
    return [int(at) for at in likely[(pairs % 31 == 0) & (pairs & 0x20 == 0)]]


def _all(data: bytes, magic: bytes) -> Iterator[int]:
    at = data.find(magic)
    while at >= 0:
        yield at
        at = data.find(magic, at + 1)


def _inflate(data: bytes, start: int, window: int) -> bytes:
    """What a deflate stream holds, as far as it can be read."""
    engine, out, size, piece = zlib.decompressobj(window), [], 0, 256
    while start < len(data) and not engine.eof and size < MAX_BYTES:
        try:
            out.append(engine.decompress(data[start : start + piece]))
        except zlib.error:
            break
        size, start, piece = size + len(out[-1]), start + piece, 1 << 16
    return b"".join(out)
