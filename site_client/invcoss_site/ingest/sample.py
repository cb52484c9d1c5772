"""What every reader gives, and how it says what is wrong with a file.

C = channels; spatial axes are (H, W), or (D, H, W): towards the head, the back, the left.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from invcoss_common.errors import UnreadableFile

Pixels = npt.NDArray[np.generic]

Kind = Literal[
    "missing",  # can't be opened
    "empty",
    "not-this-format",
    "not-supported",  # a kind of its format that no reader takes
    "truncated",
    "damaged",
    "no-image",
    "no-geometry",  # a part of a volume without orientation, position or spacing
    "spacing",  # of pixels: implausible
    "gap",  # between slices
    "duplicates",  # several images at one position
    "tilt",
    "dimensions",
    "too-small",
    "too-large",
    "not-finite",
    "constant",
    "units",
    "inverted",
    "shape",
    "grey",
    "mask",
    "index",  # a row of an index
    "line",  # of a text file
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Finding:
    """Why a file is not used, or what is odd about one that is; `reason` names it and says what to do.

    Findings stay at the site. `kind` is for counting them.
    """

    path: Path
    reason: str
    kind: str


@dataclass(frozen=True)
class Sample:
    """One image as its file has it: turned the right way, not scaled yet.

    `pixels` (C, *spatial) are in the file's own units (Hounsfield for CT, 0 to 255 for 8-bit pictures); `full_range` is
    what is black and white where the file tells. Of a volume, `spacing_mm` is the size of a voxel along D, H, W and
    `axes` says which way the axes ran in the file, such as "LAS".
    """

    path: Path
    pixels: Pixels
    full_range: tuple[float, float] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    axes: str = ""
    warnings: tuple[Finding, ...] = ()


def unreadable(path: Path, kind: Kind, text: str) -> UnreadableFile:
    """The error to raise for a file that must not be used."""
    return UnreadableFile(f"{path}: {text}", kind)


def warning(path: Path, kind: Kind, text: str) -> Finding:
    """A note on a file that is used all the same."""
    return Finding(path, f"{path}: {text}", kind)


def check_not_empty(path: Path) -> None:
    """Raises UnreadableFile for a file that can't be opened or holds nothing."""
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise unreadable(path, "missing", f"can't be opened ({error.strerror}); check name and permissions") from None
    if not size_bytes:
        raise unreadable(path, "empty", "file is empty; copy it again")


LARGE = 400 << 20  # bytes of memory as float32; what takes more must be large on disk too
_TIGHT = 128  # bytes of memory a byte on disk: a scan has noise, and can't be packed so


def check_expansion(path: Path, memory_bytes: int, size_bytes: int) -> None:
    """Raises UnreadableFile for a small file that would take more than LARGE in memory: no scan packs so well."""
    if memory_bytes > max(LARGE, _TIGHT * size_bytes):
        text = f"{size_bytes:,} bytes would become {memory_bytes:,}, packed tighter than any scan; save it unpacked"
        raise unreadable(path, "too-large", text)


_BEGINNINGS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"%PDF": "PDF",
    b"PK\x03\x04": "ZIP",
    b"NRRD": "NRRD",
}


def looks_like(path: Path) -> str:
    """ " (looks like PNG)" and the like by a file's first bytes, for messages; empty if they tell nothing."""
    with path.open("rb") as file:
        head = file.read(512)
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        inside = b"\0"  # if it is damaged
        with suppress(zlib.error):
            inside = zlib.decompressobj(wbits=31).decompress(head, 512)
        head = inside
    name = next((name for beginning, name in _BEGINNINGS.items() if head.startswith(beginning)), "")
    if head[128:132] == b"DICM":
        name = "DICOM"
    if head[344:347] in (b"n+1", b"ni1"):
        name = "NIfTI"
    if not name and b"\0" not in head:
        name = "text"
    if packed:
        name = f"packed {name}" if name else "gzip"
    return f" (looks like {name})" if name else ""
