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
from monai.transforms import Orientation, SpatialResample
from nibabel.affines import voxel_sizes

from invcoss_site.ingest.sample import Finding, Sample, unreadable, warning
from invcoss_site.ingest.values import MAX_VOXELS, Values

Affine = npt.NDArray[np.float64]

AXES = "SPL"  # towards the head, the back, the left: slices look as a radiologist sees them
MIN_SIDE = 4  # voxels
SPACING_MM = (0.01, 50.0)  # plausible voxel sizes
STRAIGHT = 0.01  # cosine of the angle between two axes up to which they count as at right angles
_DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))  # of NIfTI's world axes


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Raises UnreadableFile for a volume of `shape` (x, y, z) that is too thin, or larger than any scan."""
    if min(shape) < MIN_SIDE:
        raise unreadable(path, "too-small", f"{shape} voxels is too thin, a side needs {MIN_SIDE}; remove it")
    if math.prod(shape) > MAX_VOXELS:
        text = f"header claims {shape} voxels, more than any scan; export it again"
        raise unreadable(path, "too-large", text)


def check_affine(path: Path, affine: Affine) -> None:
    """Raises UnreadableFile unless the voxels have a plausible size and a volume."""
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
    volume = MetaTensor(torch.from_numpy(np.ascontiguousarray(values)[None]), affine=affine)
    volume, lean_degrees = _straightened(volume, affine)
    if lean_degrees:
        text = f"axes lean by {lean_degrees:.1f} degrees (tilted gantry): straightened by resampling"
        warnings = (*warnings, warning(path, "tilt", text))
    turned = Orientation(axcodes=AXES, labels=_DIRECTIONS)(volume)
    depth, height, width = voxel_sizes(turned.affine.numpy())
    axes = "".join(nib.aff2axcodes(affine))
    pixels = np.ascontiguousarray(turned.numpy())
    return Sample(path, pixels, full_range, (float(depth), float(height), float(width)), axes, warnings)


def _straightened(volume: MetaTensor, affine: Affine) -> tuple[MetaTensor, float]:
    """`volume` (1, x, y, z) on a grid at right angles that holds all of it, and by how many degrees it leaned.

    The first axis keeps its direction, the plane of the first two stays; 0 degrees if nothing had to be done.
    """
    columns = affine[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    lean = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if lean <= STRAIGHT:
        return volume, 0.0
    axes, steps = np.linalg.qr(columns)
    sizes = np.diag(steps)
    straight = np.eye(4)
    straight[:3, :3] = axes * sizes  # a step along each axis, whichever sign QR gave it
    corners = np.array([(x, y, z, 1) for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(volume.shape[1:]) - 1
    straight[:3, 3] = affine[:3, 3]
    on_grid = (np.linalg.inv(straight) @ affine @ corners.T)[:3]
    first, last = on_grid.min(axis=1), on_grid.max(axis=1)
    straight[:3, 3] += straight[:3, :3] @ first
    size = tuple(int(n) for n in np.ceil(last - first - 1e-3) + 1)
    resampled = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)(
        volume, dst_affine=torch.from_numpy(straight), spatial_size=size
    )
    return resampled, math.degrees(math.asin(min(lean, 1.0)))
