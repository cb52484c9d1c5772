"""How a file is damaged or forged: bytes at random, edits by who knows its format, and bombs.

Everything is a function of a seed and of what is drawn, so a mutation is known by its number.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable
from random import Random

from tests.site_client.fuzzing.seeds import Seed, packed

NUMBERS = (0, 1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 32, 64, 255, 256, 1000, 9000, 32767, 32768, 65500, 65535)
FLOATS = (0.0, -1.0, 1e-30, 1e-3, 0.5, 50.0, 1e3, 1e9, 1e38, float("inf"), float("-inf"), float("nan"))


def altered(seed: Seed, random: Random) -> tuple[str, bytes]:
    """The seed's file after a mutation, and the name of what was done to it."""
    edits: dict[str, Callable[[bytes, Random], bytes]] = {
        "DICOM": dicom, "NIfTI": nifti, "PNG": png, "JPEG": jpeg, "TIFF": tiff, "slide": tiff, "text": text,
    }  # fmt: skip
    inside = seed.name.endswith(".gz") and random.random() < 0.7  # what is packed is altered, not the packing
    data = gzip.decompress(seed.data) if inside else seed.data
    by_header = (inside or not seed.name.endswith(".gz")) and random.random() < 0.6
    name, edit = ("header", edits[seed.format]) if by_header else random.choice(BLIND)
    made = data
    while made == data:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            made = edit(made, random) or made
    return name, packed(made) if inside else made


# bytes at random


def flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwritten(data: bytes, random: Random) -> bytes:
    at, length = _place(data, random), random.choice((1, 2, 4, 16, 256))
    run = random.choice((b"\0" * length, b"\xff" * length, random.randbytes(length)))
    return data[:at] + run + data[at + length :]


def truncated(data: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def inserted(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    run = random.choice((random.randbytes(random.randint(1, 64)), data[at : at + random.choice((4, 64, 1024))]))
    return data[:at] + run + data[at:]


def shortened(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 2, 4, 64, 1024)) :]


def _place(data: bytes, random: Random) -> int:
    """A place in a file, every other time in its beginning."""
    return random.randrange(max(1, min(len(data), random.choice((512, len(data))))))


BLIND: tuple[tuple[str, Callable[[bytes, Random], bytes]], ...] = (
    ("flips", flipped),
    ("run", overwritten),
    ("truncation", truncated),
    ("insertion", inserted),
    ("deletion", shortened),
)


# DICOM, explicit VR in little endian: group, element, VR, length, value

_US = {  # tags by group and element
    (0x28, 0x02): "samples", (0x28, 0x06): "planar", (0x28, 0x10): "rows", (0x28, 0x11): "columns",
    (0x28, 0x100): "allocated", (0x28, 0x101): "stored", (0x28, 0x102): "high bit", (0x28, 0x103): "signed",
    (0x28, 0x120): "padding", (0x28, 0x3002): "table",
}  # fmt: skip
_WORDS = {
    (0x28, 0x08): ("0", "-1", "2", "7", "1000000", "2147483647", "99999999999999", "1.5", "1e9", "x", ""),  # frames
    (0x28, 0x30): ("0\\0", "-1\\1", "nan\\1", "1e9\\1e9", "1", "1\\1\\1", "1e-9\\1e-9", "inf\\1", "50\\50", "x\\y", ""),
    (0x20, 0x32): ("0\\0\\0", "nan\\0\\0", "0\\0\\1e30", "1e308\\0\\0", "0\\0", "x\\y\\z", "3\\2\\1", "0\\0\\2.6", ""),
    (0x20, 0x37): ("1\\0\\0\\1\\0\\0", "0\\0\\0\\0\\0\\0", "1\\0\\0\\0\\0\\1", "nan\\0\\0\\0\\1\\0",
                   "1\\0\\0", "1e200\\0\\0\\0\\1\\0"),
    (0x20, 0x13): ("1e400", "-1", "999999999999", "x"),
    (0x28, 0x1052): ("nan", "inf", "1e38", "1e308", "-1e308", "x", "0\\0", ""),  # rescale
    (0x28, 0x1053): ("nan", "0", "-1", "1e38", "1e308", "1e-300", "x", "1\\1", ""),
    (0x28, 0x1050): ("nan", "1e308", "0\\5", "x", "", "-1e9"),  # window
    (0x28, 0x1051): ("nan", "0", "-1", "1e308", "0.5", "1", "x", "4096\\1"),
    (0x28, 0x04): ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "X", ""),
    (0x02, 0x10): (
        "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99",
        "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70",
        "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.201",
        "1.2.840.10008.1.2.5", "1.2.3", "",
    ),
    (0x02, 0x02): ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.2", "x", ""),
    (0x08, 0x05): ("ISO_IR 192", "ISO 2022 IR 87", "x" * 70, "\\" * 20),
    (0x10, 0x20): ("x" * 4000, "a\\b\\c", "\0\x1b[2J", ""),
    (0x20, 0x0D): ("x" * 4000, "1\\2", "\r\n", ""),
    (0x20, 0x0E): ("9.9", "1\\2", "\r\n", ""),
}  # fmt: skip
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")
_VRS = (*_LONG, b"US", b"SS", b"UL", b"DS", b"IS", b"LO", b"FD", b"AT", b"PN", b"UI", b"CS", b"XX", b"\0\0")
_ELEMENT = re.compile(b"([\x02-\x30\xe0]\x00|\xe0\x7f)(..)(" + b"|".join(_VRS[:-2]) + b"|SH|DA|TM|ST|LT|FL|SL)", re.S)


def dicom(data: bytes, random: Random) -> bytes:
    found = list(_ELEMENT.finditer(data, 132))
    if not found:
        return flipped(data, random)
    known = [one for one in found if _tag(one) in _US or _tag(one) in _WORDS]
    match random.randrange(12):
        case 0:
            one = random.choice(found)
            return data[: one.start(3)] + random.choice(_VRS) + data[one.end(3) :]
        case 1:
            one = random.choice(found)
            length = random.choice((0, 1, 3, 7, 0xFFFE, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
            if one[3] in _LONG:
                return data[: one.end() + 2] + struct.pack("<I", length) + data[one.end() + 6 :]
            return data[: one.end()] + struct.pack("<H", length & 0xFFFF) + data[one.end() + 2 :]
        case 2:
            one = random.choice(found)
            return data[: one.start()] + data[_value(data, one)[1] :]
        case 3:
            one = random.choice(found)
            whole = data[one.start() : _value(data, one)[1]]
            return data[: one.start()] + whole * random.choice((2, 3, 50)) + data[one.start() + len(whole) :]
        case 4:
            depth = random.choice((3, 60, 3000))
            item = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
            at = random.choice(found).start()
            return data[:at] + item + data[at:]
    if not known:
        return flipped(data, random)
    one = random.choice(known)
    start, end = _value(data, one)
    if _tag(one) in _US:
        value = struct.pack("<H", random.choice(NUMBERS))
        return data[:start] + value + data[start + 2 :]
    written = random.choice(_WORDS[_tag(one)]).encode()
    padding = b"\0" if one[3] == b"UI" else b" "
    if random.random() < 0.5 and end > start:  # in its place, as what is around it says its length
        return data[:start] + written[: end - start].ljust(end - start, padding) + data[end:]
    written += padding * (len(written) % 2)
    if one[3] in _LONG:
        return data[: one.end() + 2] + struct.pack("<I", len(written)) + written + data[end:]
    return data[: one.end()] + struct.pack("<H", len(written)) + written + data[end:]


def _tag(found: re.Match[bytes]) -> tuple[int, int]:
    group, element = struct.unpack("<HH", found[1] + found[2])
    return group, element


def _value(data: bytes, found: re.Match[bytes]) -> tuple[int, int]:
    """Where the value of an element begins and ends."""
    if found[3] in _LONG:
        start = found.end() + 6
        length = int.from_bytes(data[start - 4 : start], "little")
    else:
        start = found.end() + 2
        length = int.from_bytes(data[start - 2 : start], "little")
    return start, min(start + length, len(data))


# NIfTI-1: offsets of fields

_SHORTS = (*range(40, 56, 2), 70, 72, 252, 254)  # dim, datatype, bitpix, codes
_REALS = (*range(76, 108, 4), 108, 112, 116, *range(256, 328, 4))  # pixdim, offset, scale, quaternion, affine
_TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304)


def nifti(data: bytes, random: Random) -> bytes:
    end = "<" if data[:1] in (b"\x5c", b"\x1c") else ">"
    match random.randrange(10):
        case 0 | 1 | 2:
            return _put(data, random.choice(_SHORTS), end + "h", random.choice((*NUMBERS[:-3], -1, -32768)))
        case 3 | 4 | 5:
            value = random.choice((*FLOATS, 2.0, 348.0, 352.5, 1e6))
            return _put(data, random.choice(_REALS), end + "f", value)
        case 6:
            return _put(data, 70, end + "h", random.choice(_TYPES))
        case 7:
            return _put(data, 123, "B", random.randrange(256))
        case 8:
            at = random.choice((0, 344, 348, 352))
            return _put(data, at, end + "i", random.choice((0, 348, 540, 2**31 - 1, -1, 0x01000000)))
    for at in range(42, 48, 2):
        data = _put(data, at, end + "h", random.choice((1, 4, 8, 20, 64, 512, 1024, 30000)))
    return data


def _put(data: bytes, at: int, form: str, value: float) -> bytes:
    if at + struct.calcsize(form) > len(data):
        return data
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


# PNG: chunks, with their checksums right again


def png(data: bytes, random: Random) -> bytes:
    chunks = png_chunks(data)
    if not chunks:
        return flipped(data, random)
    number = random.randrange(len(chunks))
    name, content = chunks[number]
    match random.randrange(9):
        case 0 | 1 | 2 if chunks[0][0] == b"IHDR":
            at, form = random.choice(((0, ">I"), (4, ">I"), (8, "B"), (9, "B"), (10, "B"), (11, "B"), (12, "B")))
            top = (*NUMBERS, 30_000, 2**31 - 1, 2**32 - 1) if form == ">I" else (0, 1, 2, 3, 4, 6, 8, 16, 32, 255)
            chunks[0] = b"IHDR", _put(chunks[0][1], at, form, random.choice(top))
        case 3:
            del chunks[number]
        case 4:
            chunks.insert(number, random.choice(chunks))
        case 5:
            random.shuffle(chunks)
        case 6:
            chunks[number] = name, random.choice(BLIND)[1](content, random) if content else b"\0"
        case 7:
            chunks[number] = random.choice((b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"abcd")), content
        case _:
            extra = random.choice(
                (b"acTL" + b"\xff" * 8, b"iCCPa\0\0" + zlib.compress(b"\0" * 10_000_000), b"tRNS", b"gAMA")
            )
            chunks.insert(min(number + 1, len(chunks) - 1), (extra[:4], extra[4:]))
    return png_bytes(chunks)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_bytes(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        parts += [struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))]
    return b"".join(parts)


# JPEG: segments


def jpeg(data: bytes, random: Random) -> bytes:
    found = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", data)]
    frames = [match.start() for match in re.finditer(rb"\xff[\xc0-\xc3]\0", data)]
    if frames and random.random() < 0.5:
        at = frames[0]
        field = random.choice((4, 5, 7, 9, 11, 12))  # precision, height, width, components, sampling, table
        form = ">H" if field in (5, 7) else "B"
        return _put(data, at + field, form, random.choice(NUMBERS) & (0xFFFF if form == ">H" else 0xFF))
    if not found:
        return flipped(data, random)
    at = random.choice(found)
    match random.randrange(5):
        case 0:
            return data[: at + 1] + bytes([random.randrange(0xC0, 0xFF)]) + data[at + 2 :]
        case 1:
            return _put(data, at + 2, ">H", random.choice(NUMBERS))
        case 2:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            return data[:at] + data[at + 2 + length :]
        case 3:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            return data[:at] + data[at : at + 2 + length] * random.choice((2, 200)) + data[at + 2 + length :]
    return data[: at + 4] + overwritten(data[at + 4 : at + 40], random) + data[at + 40 :]


# TIFF: entries of directories


def tiff(data: bytes, random: Random) -> bytes:
    """One field of one entry of the first directories gets another tag, type, count or value."""
    end = "<" if data[:2] == b"II" else ">"
    large = data[2:4] in (b"+\0", b"\0+")
    offset, count, width = ("Q", "Q", 20) if large else ("I", "H", 12)
    at, directories = _get(data, 8 if large else 4, end + offset), []
    while at and at + 2 < len(data) and len(directories) < 4:
        entries = _get(data, at, end + count)
        first = at + struct.calcsize(count)
        directories.append((at, first, min(entries, 40)))
        at = _get(data, first + entries * width, end + offset)
    if not directories:
        return flipped(data, random)
    at, first, entries = random.choice(directories)
    if random.random() < 0.1:  # how many entries, or where the next directory is: perhaps here
        place, form = random.choice(((at, end + count), (first + entries * width, end + offset)))
        return _put(data, place, form, random.choice((0, 1, at, 8, 65535)))
    entry = first + random.randrange(max(1, entries)) * width
    value = entry + 4 + struct.calcsize(offset)
    small = random.choice(NUMBERS)
    long = random.choice((*NUMBERS, at, len(data), 2**31 - 1, 2**32 - 1))
    place, form, number = random.choice(
        (
            (entry, "H", random.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 322, 323, 330, 339, small))),
            (entry + 2, "H", random.choice((0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 255))),
            (entry + 4, offset, long),
            (value, offset, long),
            (value, offset, long),
            (value, "H", small),
            (value, "H", small),
        )
    )
    return _put(data, place, end + form, number)


def _get(data: bytes, at: int, form: str) -> int:
    if at + struct.calcsize(form) > len(data):
        return 0
    (value,) = struct.unpack_from(form, data, at)
    return int(value)


# texts

_TOKENS = (
    b"", b"\0", b"\n", b"\r", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"\\", b"\\ud800",
    b"\\u0000", b",", b"{}", b"[]", b"[" * 4000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"NaN", b"null", b"true",
    b"\x1b[2J",    b"\xe2\x80\xae", b"x" * 30_000, b'"text"', b'"id"', b"sections", b"\xc2\x85", b"\xe2\x80\xa8",
)  # fmt: skip
_VALUES = (None, True, 0, -1, 1.5, 10**400, "", " ", "\0", "\ud800", "x" * 30_000, [], {}, [[1]], {"text": "a"}, ["a"])


def text(data: bytes, random: Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    number = random.randrange(len(lines))
    if lines[number].startswith(b"{") and random.random() < 0.5:
        try:
            row = json.loads(lines[number])
        except ValueError:
            return flipped(data, random)
        row[random.choice(("id", "text", "label", "sections", "split"))] = random.choice(_VALUES)
        lines[number] = json.dumps(row).encode() + b"\n"
    elif random.random() < 0.5:
        at = random.randrange(len(lines[number]) + 1)
        lines[number] = lines[number][:at] + random.choice(_TOKENS) + lines[number][at + random.randrange(3) :]
    else:
        lines.insert(random.randrange(len(lines)), random.choice((lines[number], b"\n", b"{}\n", b'"' * 3, b"\0")))
    return b"".join(lines)
