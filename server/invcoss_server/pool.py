"""The synthetic pool of a stage as a file of tensors, and the pictures that people look at it by.

N = images, C = channels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load, save, save_file

from invcoss_common.canonical import new_file
from invcoss_common.errors import ProtocolError

Pixels = npt.NDArray[np.uint8]

GAP = 2  # pixels between pictures of a contact sheet


def pool_to_bytes(images: Pixels) -> bytes:
    """Images (N, C, *size) uint8 as safetensors; equal pools give equal bytes."""
    return save({"images": np.ascontiguousarray(images)})


def write_pool(path: Path, images: Pixels) -> None:
    """Write `path` at once with the bytes of `pool_to_bytes`, which are never in memory."""
    with new_file(path) as draft:
        save_file({"images": np.ascontiguousarray(images)}, draft)


def first_images(path: Path, count: int) -> tuple[Pixels, int]:
    """The first `count` images of a pool file, and how many it has; the others are not read."""
    with safe_open(path, framework="np") as file:
        images = file.get_slice("images")
        held = images.get_shape()[0]
        return images[: min(count, held)], held


def pool_from_bytes(data: bytes) -> Pixels:
    """Images (N, C, *size) uint8 of a pool file; raises ProtocolError if it holds anything else."""
    tensors = load(data)
    if set(tensors) != {"images"} or tensors["images"].dtype != np.uint8:
        raise ProtocolError("not a pool: a pool file holds one uint8 tensor 'images'")
    return tensors["images"]


def contact_sheet(images: Pixels, count: int = 24, columns: int = 12) -> bytes:
    """The first `count` images (N, C, *size) as one PNG; of a volume, the middle slice of its first axis."""
    tiles = [_tile(image) for image in images[:count]]
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (number // columns) * (height + GAP), (number % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return png(sheet)


def slices_sheet(volume: Pixels, columns: int = 16) -> bytes:
    """All slices of one volume (1, D, H, W) as one PNG."""
    return contact_sheet(volume[0][:, None], count=volume.shape[1], columns=columns)


def png(pixels: Pixels) -> bytes:
    """(H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile(image: Pixels) -> Pixels:
    """One image (C, *size) as (H, W, 3)."""
    plane = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    return np.broadcast_to(plane.transpose(1, 2, 0), (*plane.shape[1:], 3))
