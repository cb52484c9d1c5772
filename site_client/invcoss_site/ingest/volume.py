"""What NIfTI and DICOM volumes have in common: plausible sizes, straight axes, and one fixed order of them.

x, y, z = the axes of a volume as its file has them; affines lead to NIfTI's world (right, front, head), in mm.
"""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from invcoss_site.ingest.sample import Finding, Sample, unreadable, warning
from invcoss_site.ingest.values import MAX_VOXELS, Values

Affine = npt.NDArray[np.float64]

AXES = "SPL"  # towards the head, the back, the left: slices look as a radiologist sees them
MIN_SIDE = 4  # voxels
SPACING_MM = (0.01, 50.0)  # plausible voxel sizes
STRAIGHT = 0.01  # cosine of the angle between two axes up to which they count as at right angles
MOST_LEAN = 45.0  # degrees; gantries tilt up to 30
MOST_GROWTH, MOST_LEANING = 4, 1 << 25  # of a straightened volume: times its voxels, and voxels


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Raises UnreadableFile for a volume of `shape` (x, y, z) that is too thin, or larger than any scan."""
    if min(shape) < MIN_SIDE:
        raise unreadable(path, "too-small", f"{shape} voxels is too thin, a side needs {MIN_SIDE}; remove it")
    if math.prod(shape) > MAX_VOXELS:
        text = f"header claims {shape} voxels, more than any scan; export it again"
        raise unreadable(path, "too-large", text)


def check_affine(path: Path, affine: Affine) -> None:
    """Raises UnreadableFile unless the voxels have a plausible size and a volume."""
    if not np.isfinite(affine).all():
        raise unreadable(path, "no-geometry", "its position or orientation is not a number; correct the header")
    found_mm = voxel_sizes(affine)
    low, high = SPACING_MM
    if not all(low <= mm <= high for mm in found_mm) or abs(np.linalg.det(affine)) < low**3 / 2:
        shown = " x ".join(f"{mm:g}" for mm in found_mm)
        text = f"voxels of {shown} mm are not plausible ({low} to {high}); correct the header"
        raise unreadable(path, "spacing", text)


def turned(
    path: Path,
    values: Values,
    affine: Affine,
    full_range: tuple[float, float] | None = None,
    warnings: tuple[Finding, ...] = (),
) -> Sample:
    """The sample of a volume (x, y, z): its axes straightened if they lean, and turned by its affine."""
    axes = "".join(nib.aff2axcodes(affine))
    values, affine, lean_degrees = _straightened(path, values, affine)
    if lean_degrees:
        text = f"axes lean by {lean_degrees:.1f} degrees (tilted gantry): straightened by resampling"
        warnings = (*warnings, warning(path, "tilt", text))
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(AXES))
    depth, height, width = voxel_sizes(affine @ inv_ornt_aff(turn, values.shape))
    pixels = np.ascontiguousarray(apply_orientation(values, turn))[None]  # a view until here: volumes are large
    return Sample(path, pixels, full_range, (float(depth), float(height), float(width)), axes, warnings)


def _straightened(path: Path, values: Values, affine: Affine) -> tuple[Values, Affine, float]:
    """`values` (x, y, z) on a grid at right angles that holds all of them, its affine, and the degrees of their lean.

    The first axis keeps its direction, the plane of the first two stays; 0 degrees if nothing had to be done. Raises
    UnreadableFile for what leans more than any gantry, or would grow too much.
    """
    columns = affine[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    lean = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if lean <= STRAIGHT:
        return values, affine, 0.0
    degrees = math.degrees(math.asin(min(lean, 1.0)))
    if degrees > MOST_LEAN:
        text = f"axes lean by {degrees:.0f} degrees, more than any gantry; correct its orientation"
        raise unreadable(path, "tilt", text)
    axes, steps = np.linalg.qr(columns)
    sizes = np.diag(steps)
    straight = np.eye(4)
    straight[:3, :3] = axes * sizes  # a step along each axis, whichever sign QR gave it
    corners = np.array([(x, y, z, 1) for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(values.shape) - 1
    straight[:3, 3] = affine[:3, 3]
    on_grid = (np.linalg.inv(straight) @ affine @ corners.T)[:3]
    first, last = on_grid.min(axis=1), on_grid.max(axis=1)
    straight[:3, 3] += straight[:3, :3] @ first
    size = tuple(int(n) for n in np.ceil(last - first - 1e-3) + 1)
    if math.prod(size) > min(MOST_GROWTH * values.size, MOST_LEANING):
        text = f"axes lean by {degrees:.1f} degrees, and straightened it would have {size} voxels; reformat it"
        raise unreadable(path, "tilt", text)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
    leaning = MetaTensor(torch.from_numpy(np.ascontiguousarray(values)[None]), affine=affine)
    resampled = resample(leaning, dst_affine=torch.from_numpy(straight), spatial_size=size)
    return resampled.numpy()[0], straight, degrees
