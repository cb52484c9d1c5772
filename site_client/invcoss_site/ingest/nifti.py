"""Reads a 3-D volume (NIfTI) with nibabel and turns it by its affine to one fixed order of axes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.affines import voxel_sizes

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest.values import Values, resample, unit_range

AXES = "SPL"  # towards the head, the back, the left: slices look as a radiologist sees them
_DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))  # of NIfTI's world axes
MIN_SIDE = 4  # voxels
MAX_VOXELS = 1 << 29  # 2 GiB as float32
SPACING_MM = (0.01, 50.0)  # plausible voxel sizes
_MOST_DEFLATED = 1032  # deflate can't shrink by more


def read_volume(path: Path, modality: Modality, spacing_mm: tuple[float, float, float] | None) -> Values:
    """Volume as float32 (1, D, H, W) in [0, 1], at `spacing_mm` (D, H, W) if given.

    D runs from the feet to the head, H from front to back, W from the patient's right to the left.
    Raises UnreadableFile.
    """
    try:
        image = nib.load(path)
    except Exception:  # nibabel raises anything on damaged bytes
        raise UnreadableFile(f"{path}: not a NIfTI file, or its header is damaged; export it again") from None
    if not isinstance(image, nib.Nifti1Image):
        raise UnreadableFile(f"{path}: {type(image).__name__} where NIfTI is expected; export it as NIfTI")
    shape = _checked_shape(path, image)
    _check_spacing(path, image)
    try:
        raw = np.asanyarray(image.dataobj).reshape(shape)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnreadableFile(f"{path}: incomplete or damaged volume ({reason}); copy it again") from None
    values = MetaTensor(torch.from_numpy(unit_range(path, raw, modality)[None]), affine=image.affine)
    turned = Orientation(axcodes=AXES, labels=_DIRECTIONS)(values)
    volume = np.ascontiguousarray(turned.numpy())
    if spacing_mm is None:
        return volume
    found_mm = voxel_sizes(turned.affine.numpy())
    size = tuple(max(1, round(n * mm / to)) for n, mm, to in zip(volume.shape[1:], found_mm, spacing_mm, strict=True))
    if np.prod(size, dtype=float) > MAX_VOXELS:
        raise UnreadableFile(f"{path}: would have {size} voxels at {spacing_mm} mm; check its spacing")
    return resample(volume, size)


def _checked_shape(path: Path, image: nib.Nifti1Image) -> tuple[int, ...]:
    """The three sides of the volume, from the header alone; nothing is allocated for a header that lies."""
    sides = tuple(int(n) for n in image.shape)
    while len(sides) > 3 and sides[-1] == 1:
        sides = sides[:-1]
    if len(sides) != 3:
        raise UnreadableFile(f"{path}: {len(sides)}-D {sides} where one 3-D volume is expected; save one a file")
    if min(sides) < MIN_SIDE:
        raise UnreadableFile(f"{path}: {sides} voxels is too thin, a side needs {MIN_SIDE}; remove it")
    voxels = int(np.prod(sides, dtype=object))
    if voxels > MAX_VOXELS:
        raise UnreadableFile(f"{path}: header claims {sides} voxels, more than any scan; export it again")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise UnreadableFile(f"{path}: {dtype} values where plain numbers are expected; export it as a grey volume")
    found, expected = path.stat().st_size, voxels * dtype.itemsize
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if found * (_MOST_DEFLATED if packed else 1) < expected:
        raise UnreadableFile(f"{path}: incomplete, header claims {expected} bytes and the file has {found}")
    return sides


def _check_spacing(path: Path, image: nib.Nifti1Image) -> None:
    header = image.header
    if not header["qform_code"] and not header["sform_code"]:
        raise UnreadableFile(f"{path}: header has no orientation (qform and sform are unset); export it again")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise UnreadableFile(f"{path}: voxel sizes are in {unit}; save it in mm")
    found_mm = voxel_sizes(image.affine)
    low, high = SPACING_MM
    if not all(low <= mm <= high for mm in found_mm) or abs(np.linalg.det(image.affine)) < low**3 / 2:
        shown = " x ".join(f"{mm:g}" for mm in found_mm)
        raise UnreadableFile(f"{path}: voxels of {shown} mm are not plausible ({low} to {high}); correct the header")
