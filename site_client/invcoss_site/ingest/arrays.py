"""Reads images out of an npz file of arrays, as MedMNIST is published; never unpickles anything."""

from __future__ import annotations

import math
import zipfile
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image

from invcoss_site.ingest.image import picture
from invcoss_site.ingest.sample import Pixels, Sample, check_expansion, unreadable

Bytes = npt.NDArray[np.uint8]

_ONE_AT_A_TIME = Lock()  # threads share an array, and must not all unpack it


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    """Shape of the array `name`, whose values are bytes, from its header alone; empty if there is none.

    Raises UnreadableFile for a damaged file, and for an array that would have to be unpickled.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if f"{name}.npy" not in file.namelist():
                return ()
            with file.open(f"{name}.npy") as member:
                major, _ = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                claimed, packed = file.getinfo(member.name), path.stat().st_size
    except Exception:  # a damaged header raises anything
        raise unreadable(path, "damaged", f"not an npz file, or its {name} is damaged; download it again") from None
    if dtype.hasobject:
        text = f"its {name} holds Python objects, which could run code when they are read; remove the file"
        raise unreadable(path, "not-supported", text)
    if dtype != np.uint8:
        raise unreadable(path, "not-supported", f"its {name} are {dtype} where 8-bit images are expected; remove it")
    if claimed.file_size < math.prod(shape):
        text = f"its {name} has {claimed.file_size:,} bytes of {math.prod(shape):,}; download it again"
        raise unreadable(path, "truncated", text)
    check_expansion(path, math.prod(shape), packed)
    return tuple(int(n) for n in shape)


def read_image(path: Path, part: str, ndim: int, channels: int) -> Sample:
    """The image `part`, such as "train_images[17]", as a sample (C, *spatial); its file has no voxel size, so 1 mm.

    Raises UnreadableFile. The array is unpacked as a whole, once, and kept until another one is asked for.
    """
    name, _, number = part.rstrip("]").partition("[")
    where = path / part
    with _ONE_AT_A_TIME:
        array = _array(path, name, path.stat().st_mtime_ns)
    pixels: Pixels = array[int(number)]
    if ndim == 3:
        return Sample(where, np.ascontiguousarray(pixels)[None], (0.0, 255.0), (1.0, 1.0, 1.0))
    if pixels.ndim == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    return picture(where, pixels, channels)


@lru_cache(maxsize=2)
def _array(path: Path, name: str, _mtime_ns: int) -> Bytes:
    shape_of(path, name)
    try:
        with zipfile.ZipFile(path) as file, file.open(f"{name}.npy") as member:
            array: Bytes = np.lib.format.read_array(member, allow_pickle=False)
            if member.read(1):  # only at its end is its checksum looked at
                raise ValueError
    except Exception:  # zlib and zipfile raise anything on damaged bytes
        raise unreadable(path, "damaged", f"its {name} are damaged; download it again") from None
    return array
