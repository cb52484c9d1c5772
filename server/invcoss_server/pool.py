"""The pictures by which people look at a synthetic pool. N = images, C = channels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from invcoss_common.pools import Pixels

GAP = 2  # pixels between pictures of a contact sheet


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
