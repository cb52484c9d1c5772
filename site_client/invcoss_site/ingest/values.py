"""What every reader does to the numbers of an image: scale them to [0, 1], and resample without aliasing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import ScaleIntensityRange
from torch.nn.functional import interpolate

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import Modality

Values = npt.NDArray[np.float32]


def unit_range(path: Path, raw: npt.NDArray[np.generic], modality: Modality) -> Values:
    """`raw` (any shape, number type of the file) scaled to float32 in [0, 1] as the modality's row says.

    Raises UnreadableFile for values that aren't finite, a constant image, or one that lies outside the window.
    """
    if not np.isfinite(raw).all():
        bad = raw.size - int(np.isfinite(raw).sum())
        raise UnreadableFile(f"{path}: {bad} of {raw.size} values are not numbers (NaN or infinite); export it again")
    lowest, highest = float(raw.min()), float(raw.max())
    if lowest == highest:
        raise UnreadableFile(f"{path}: constant image, every value is {lowest:g}; remove it")
    low, high = _bounds(raw, modality)
    if lowest >= 0 > low:
        raise UnreadableFile(
            f"{path}: no value below 0, but the window starts at {low:g}: probably stored with an offset; "
            "export it with its rescale slope and intercept applied"
        )
    if lowest >= high or highest <= low or low == high:
        raise UnreadableFile(
            f"{path}: values {lowest:g} to {highest:g} are constant within {low:g} to {high:g}; "
            "check that the file is of the stated modality"
        )
    scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True, dtype=np.float32)
    return np.ascontiguousarray(scale(raw.astype(np.float32)), dtype=np.float32)


def _bounds(raw: npt.NDArray[np.generic], modality: Modality) -> tuple[float, float]:
    """The values of `raw` that become 0 and 1."""
    match modality.normalisation:
        case "window":
            return modality.low, modality.high
        case "percentile":
            low, high = np.percentile(raw[raw != 0], (modality.low, modality.high))
            return float(low), float(high)
        case "range":
            # 12-bit data sit in 16-bit containers, so only 8-bit files are known to use their type's full range.
            return (0.0, 255.0) if raw.dtype == np.uint8 else (float(raw.min()), float(raw.max()))


def resample(values: Values, size: tuple[int, ...]) -> Values:
    """`values` (C, *spatial) in 2-D or 3-D resized to (C, *size): linear, with antialiasing where it shrinks."""
    image = torch.from_numpy(values)
    plane = interpolate(image.reshape(-1, 1, *image.shape[-2:]), size[-2:], mode="bilinear", antialias=True)
    plane = plane.reshape(*image.shape[:-2], *size[-2:])
    if len(size) == 3 and size[0] != plane.shape[1]:  # torch has no antialiased 3-D resize, but axes are separable
        columns = plane.flatten(2)[None]  # (1, C, D, H * W)
        plane = interpolate(columns, (size[0], columns.shape[-1]), mode="bilinear", antialias=True).reshape(-1, *size)
    return np.ascontiguousarray(plane.numpy())
