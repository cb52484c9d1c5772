"""Reads a 3-D volume (NIfTI) with nibabel; all that can be checked is checked before a voxel is read."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import imageglobals

from invcoss_site.ingest.sample import Sample, looks_like, unreadable
from invcoss_site.ingest.volume import check_affine, check_shape, turned

_MOST_DEFLATED = 1032  # deflate can't shrink by more

imageglobals.logger.disabled = True  # it tells of odd headers, which are refused here


def read_nifti(path: Path) -> Sample:
    """Volume as a sample (1, D, H, W); D runs to the head, H to the back, W to the left. Raises UnreadableFile."""
    try:
        image = nib.load(path)
    except Exception:  # nibabel raises anything on damaged bytes
        text = f"not a NIfTI file{looks_like(path)}, or its header is damaged; export it again"
        raise unreadable(path, "not-this-format", text) from None
    if not isinstance(image, nib.Nifti1Image):
        text = f"{type(image).__name__} where NIfTI is expected; export it as NIfTI"
        raise unreadable(path, "not-this-format", text)
    shape = _checked_shape(path, image)
    header = image.header
    if not header["qform_code"] and not header["sform_code"]:
        text = "header has no orientation or spacing (qform and sform are unset); export it again"
        raise unreadable(path, "no-geometry", text)
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise unreadable(path, "spacing", f"voxel sizes are in {unit}; save it in mm")
    check_affine(path, image.affine)
    try:
        raw = np.asanyarray(image.dataobj).reshape(shape)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise unreadable(path, "truncated", f"incomplete or damaged volume ({reason}); copy it again") from None
    full_range = (0.0, 255.0) if raw.dtype == np.uint8 else None
    return turned(path, raw.astype(np.float32), image.affine, full_range)


def _checked_shape(path: Path, image: nib.Nifti1Image) -> tuple[int, ...]:
    """The three sides of the volume, from the header alone; nothing is allocated for a header that lies."""
    sides = tuple(int(n) for n in image.shape)
    while len(sides) > 3 and sides[-1] == 1:
        sides = sides[:-1]
    if len(sides) != 3:
        text = f"{len(sides)}-D {sides} where one 3-D volume is expected; save one a file"
        raise unreadable(path, "dimensions", text)
    check_shape(path, sides)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        text = f"{dtype} values where plain numbers are expected; export it as a grey volume"
        raise unreadable(path, "not-supported", text)
    expected = math.prod(sides) * dtype.itemsize
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    most = size_bytes * _MOST_DEFLATED if packed else size_bytes - image.dataobj.offset
    if most < expected:
        found = f"a packed file of {size_bytes:,}" if packed else f"{max(most, 0):,}"
        text = f"file is incomplete: expected {expected:,} bytes of voxels, found {found}; copy it again"
        raise unreadable(path, "truncated", text)
    return sides
