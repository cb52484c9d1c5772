"""The file of a synthetic pool: one tensor `images` (N, C, *size) uint8 in a safetensors file, as both sides read it.

Equal pools give equal bytes, whoever writes them, so that a site can name the digest of a pool without some of its
images and the coordinator can make that very file. N = images, C = channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from invcoss_common.canonical import new_file
from invcoss_common.errors import ProtocolError
from invcoss_common.modality import Geometry
from invcoss_common.records import Artefact

Pixels = npt.NDArray[np.uint8]

PIECE_BYTES = 4 << 20  # as much of a pool as is in memory at a time


def pool_to_bytes(images: Pixels) -> bytes:
    """Images (N, C, *size) as the bytes of a pool file."""
    return save({"images": np.ascontiguousarray(images)})


def pool_from_bytes(data: bytes) -> Pixels:
    """Images (N, C, *size) of a pool file; raises ProtocolError if it holds anything else."""
    tensors = load(data)
    if set(tensors) != {"images"} or tensors["images"].dtype != np.uint8:
        raise ProtocolError("not a pool: a pool file holds one uint8 tensor 'images'")
    return tensors["images"]


def write_pool(path: Path, images: Pixels) -> None:
    """Write `path` at once with the bytes of `pool_to_bytes`, which are never in memory."""
    with new_file(path) as draft:
        save_file({"images": np.ascontiguousarray(images)}, draft)


def pool_shape(path: Path) -> tuple[int, ...]:
    """(N, C, *size) of a pool file, of which only the header is read; raises ProtocolError if it is none."""
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            part = file.get_slice("images") if names == ["images"] else None
            if part is not None and part.get_dtype() == "U8":
                return tuple(part.get_shape())
    except SafetensorError:
        pass
    raise ProtocolError("not a pool: a pool file holds one uint8 tensor 'images'")


def first_images(path: Path, count: int) -> tuple[Pixels, int]:
    """The first `count` images of a pool file, and how many it has; the others are not read."""
    with safe_open(path, framework="np") as file:
        images = file.get_slice("images")
        held = images.get_shape()[0]
        return images[: min(count, held)], held


def mapped_images(path: Path) -> Pixels:
    """The images of a pool file (N, C, *size), mapped: read when drawn, and in memory once for all processes."""
    with safe_open(path, framework="pt") as file:
        images: Pixels = file.get_tensor("images").numpy()
    return images


def images_like(path: Path, geometry: Geometry) -> Pixels:
    """`mapped_images` of a file that came from elsewhere; raises ProtocolError unless they are of this geometry."""
    count, *shape = pool_shape(path)
    if not count or shape != [geometry.channels, *geometry.size]:
        raise ProtocolError("a pool without images, or with images of another size than is said of them")
    return mapped_images(path)


def without_rows(path: Path, dropped: Sequence[int]) -> Iterator[bytes]:
    """The file of the pool in `path` without the rows `dropped` (ascending), piece by piece.

    All pieces together are what `write_pool` makes of the images that are left. Raises ProtocolError when `path` is
    no pool or has no such rows.
    """
    count, *rest = pool_shape(path)
    if list(dropped) != sorted(set(dropped)) or not all(0 <= row < count for row in dropped):
        raise ProtocolError(f"a pool of {count} images has no such rows to drop, or they are not in ascending order")
    row_bytes = math.prod(rest)
    yield _header((count - len(dropped), *rest))
    with path.open("rb") as file:
        images_at, first = path.stat().st_size - count * row_bytes, 0
        for last in (*dropped, count):
            file.seek(images_at + first * row_bytes)
            left = (last - first) * row_bytes
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                yield piece
                left -= len(piece)
            first = last + 1


def artefact_of(pieces: Iterable[bytes]) -> Artefact:
    """Digest and size of a file that is nowhere whole."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return Artefact(sha256=digest.hexdigest(), size_bytes=size)


def _header(shape: tuple[int, ...]) -> bytes:
    """What precedes the images in a pool file; the same as safetensors' own, which wants all images in memory."""
    tensor = {"dtype": "U8", "shape": shape, "data_offsets": (0, math.prod(shape))}
    text = json.dumps({"images": tensor}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
