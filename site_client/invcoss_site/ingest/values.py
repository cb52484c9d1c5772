"""From a sample to what the model takes: values scaled to [0, 1], and volumes resampled without aliasing."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from invcoss_common.modality import Modality
from invcoss_site.ingest.sample import LARGE, Pixels, Sample, unreadable

Values = npt.NDArray[np.float32]

MAX_VOXELS = 1 << 29  # 2 GiB as float32
_WIDEST = float(np.finfo(np.float32).max) / 2  # difference of two values with which float32 can calculate
_FINER = 8  # times as many voxels as a scan has that a large one may be resampled to
_COUNTED = 1 << 25  # values that are looked at for percentiles, at most twice as many


def model_values(sample: Sample, modality: Modality, spacing_mm: tuple[float, float, float] | None = None) -> Values:
    """The sample as float32 (C, *spatial) in [0, 1]; a volume at `spacing_mm` (D, H, W) if that is given.

    Raises UnreadableFile.
    """
    values = unit_range(sample, modality)
    if spacing_mm is None:
        return values
    assert sample.spacing_mm is not None, "the plan refuses spacing_mm for 2-D modalities"
    found = zip(values.shape[1:], sample.spacing_mm, spacing_mm, strict=True)
    size = tuple(max(1, round(n * mm / to)) for n, mm, to in found)
    voxels = math.prod(size)
    if voxels > MAX_VOXELS or 4 * voxels > max(LARGE, 4 * _FINER * math.prod(values.shape[1:])):
        text = f"would have {size} voxels at {spacing_mm} mm; check its spacing"
        raise unreadable(sample.path, "spacing", text)
    return resample(values, size)


def unit_range(sample: Sample, modality: Modality) -> Values:
    """The sample's pixels (any shape) scaled to float32 in [0, 1] as the modality's row says.

    Raises UnreadableFile for values that aren't finite, a constant image, or one that lies outside the window.
    """
    path, raw = sample.path, sample.pixels
    finite = int(np.isfinite(raw).sum())
    if not finite:
        raise unreadable(path, "not-finite", "no usable voxel, every value is NaN or infinite; export it again")
    if finite < raw.size:
        text = f"{raw.size - finite} of {raw.size} values are not numbers (NaN or infinite); export it again"
        raise unreadable(path, "not-finite", text)
    lowest, highest = float(raw.min()), float(raw.max())
    if lowest == highest:
        raise unreadable(path, "constant", f"constant image, every value is {lowest:g}; remove it")
    low, high = _bounds(sample, modality)
    if lowest >= 0 > low:
        raise unreadable(
            path,
            "units",
            f"no value below 0, so no air near {low:g}: probably not Hounsfield units but stored with an offset; "
            "export it with its rescale slope and intercept applied",
        )
    span = high - low
    if not max(highest - lowest, span) <= _WIDEST:
        text = f"values {lowest:g} to {highest:g} are more than any scan has; export it again"
        raise unreadable(path, "not-finite", text)
    if lowest >= high or highest <= low or not np.float32(span):
        raise unreadable(
            path,
            "constant",
            f"values {lowest:g} to {highest:g} are constant within {low:g} to {high:g}; "
            "check that the file is of the stated modality",
        )
    values = raw.astype(np.float32)  # and then in place: this copy may be large
    with np.errstate(over="ignore"):  # infinity is clipped
        values -= np.float32(low)
        values /= np.float32(span)
    return np.clip(values, 0.0, 1.0, out=values)


def _bounds(sample: Sample, modality: Modality) -> tuple[float, float]:
    """The values of the sample that become 0 and 1."""
    raw: Pixels = sample.pixels
    match modality.normalisation:
        case "window":
            return modality.low, modality.high
        case "percentile":
            some = raw.ravel()[:: max(1, raw.size // _COUNTED)]
            seen = some if some.any() else raw
            low, high = np.percentile(seen[seen != 0], (modality.low, modality.high))
            return float(low), float(high)
        case "range":
            # 12-bit data sit in 16-bit containers, so a range wider than 8 bits is known only if the file tells.
            return sample.full_range or (float(raw.min()), float(raw.max()))


def resample(values: Values, size: tuple[int, ...]) -> Values:
    """`values` (C, *spatial) in 2-D or 3-D resized to (C, *size): linear, with antialiasing where it shrinks."""
    image = torch.from_numpy(values)
    plane = interpolate(image.reshape(-1, 1, *image.shape[-2:]), size[-2:], mode="bilinear", antialias=True)
    plane = plane.reshape(*image.shape[:-2], *size[-2:])
    if len(size) == 3 and size[0] != plane.shape[1]:  # torch has no antialiased 3-D resize, but axes are separable
        columns = plane.flatten(2)[None]  # (1, C, D, H * W)
        plane = interpolate(columns, (size[0], columns.shape[-1]), mode="bilinear", antialias=True).reshape(-1, *size)
    return np.ascontiguousarray(plane.numpy())
