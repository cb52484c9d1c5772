"""Reads a 3-D volume (NIfTI) with nibabel; all that can be checked is checked before a voxel is read."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import imageglobals

from invcoss_site.ingest.sample import Sample, check_expansion, looks_like, unreadable
from invcoss_site.ingest.volume import check_affine, check_shape, turned

_UNITS, _OTHER_UNITS = (0, 2), {1: "metres", 3: "micrometres"}  # 0: unknown, 2: mm
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
    unit = int(header["xyzt_units"]) % 8
    if unit not in _UNITS:
        raise unreadable(
            path, "spacing", f"voxel sizes are in {_OTHER_UNITS.get(unit, 'no known unit')}; save it in mm"
        )
    check_affine(path, image.affine)
    full_range = None
    try:
        raw = image.dataobj.get_unscaled().reshape(shape)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise unreadable(path, "truncated", f"incomplete or damaged volume ({reason}); copy it again") from None
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, by name, later
        values = raw.astype(np.float32)
        if (slope, intercept) != (1, 0):
            values *= np.float32(slope)
            values += np.float32(intercept)
        elif raw.dtype == np.uint8:
            full_range = (0.0, 255.0)
    del raw  # two copies at a time are enough
    return turned(path, values, image.affine, full_range)


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
    if packed:
        check_expansion(path, math.prod(sides) * max(dtype.itemsize, 4), size_bytes)
    return sides
