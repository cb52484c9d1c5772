"""Reads a volume that is published as 16-bit PNG slices beside a table with their spacing, as DeepLesion is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from invcoss_site.ingest.image import read_picture
from invcoss_site.ingest.sample import Pixels, Sample, unreadable
from invcoss_site.ingest.volume import check_affine, check_shape, turned

TABLE = "DL_info.csv"
_OFFSET = 32768  # of the stored values over Hounsfield units

Spacing = tuple[float, float, float]


def read_stack(files: Sequence[Path]) -> Sample:
    """Volume as a sample (1, D, H, W) of the slices in `files`, from the head down, and last the table.

    Raises UnreadableFile.
    """
    *slices, table = files
    where = slices[0].parent
    spacing = spacings(table, table.stat().st_mtime_ns).get(where.name)
    if spacing is None:
        raise unreadable(where, "no-geometry", f"{table.name} has no spacing for it; correct the table")
    affine = np.diag([-spacing[0], -spacing[1], -spacing[2], 1.0])  # columns run to the left, rows to the back
    check_affine(where, affine)
    first = _slice(slices[0])
    shape = (first.shape[1], first.shape[0], len(slices))
    check_shape(where, shape)
    volume = np.empty(shape[::-1], np.float32)
    for number, path in enumerate(slices):
        values = _slice(path)
        if values.shape != first.shape:
            text = f"{values.shape[1]} x {values.shape[0]} pixels, and {slices[0].name} has another size; remove it"
            raise unreadable(path, "dimensions", text)
        volume[number] = values
    volume -= _OFFSET
    return turned(slices[0], volume.transpose(2, 1, 0), affine)


def _slice(path: Path) -> Pixels:
    pixels: Pixels = read_picture(path, 1).pixels[0]
    if pixels.dtype == np.uint8:
        raise unreadable(path, "not-supported", "8-bit values where 16 bits hold Hounsfield units; download it again")
    return pixels


@lru_cache(maxsize=2)
def spacings(table: Path, _mtime_ns: int) -> dict[str, Spacing]:
    """Size of a voxel in mm, along a row, down a column and between slices, by the folder of a volume."""
    found: dict[str, Spacing] = {}
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines, restval=""):
            try:
                x, y, z = (float(mm) for mm in row["Spacing_mm_px_"].split(","))
            except (KeyError, ValueError):
                continue
            found[row.get("File_name", "").rpartition("_")[0]] = x, y, abs(z)
    return found
