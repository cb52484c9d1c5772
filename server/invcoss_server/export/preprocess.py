"""An image as the sites prepare theirs, in plain numpy and torch: copied as it is into what is exported."""

import numpy as np
import torch
from torch.nn.functional import interpolate


def prepare(image: torch.Tensor, size: list[int], normalisation: str, low: float = 0, high: float = 0) -> torch.Tensor:
    """A picture (C, H, W) or volume (C, D, H, W) in its file's units -> (C, *size), floats in [0, 1].

    "range" and "window" take low..high to 0..1, or without them the image's own range; "percentile" takes those
    percentiles of all that is not 0. Of a picture the square in its middle is used.
    """
    values = torch.as_tensor(image).float()
    if normalisation == "percentile":
        low, high = np.percentile(values[values != 0].numpy(), (low, high))
    elif low == high:
        low, high = float(values.min()), float(values.max())
    values = ((values - low) / (high - low)).clamp(0, 1)
    if len(size) == 2:
        side = min(values.shape[1:])
        top, left = ((n - side) // 2 for n in values.shape[1:])
        values = values[:, top : top + side, left : left + side]
    values = _resized(values.reshape(-1, 1, *values.shape[-2:]), size[-2:]).reshape(*values.shape[:-2], *size[-2:])
    if len(size) == 3:  # axes are separable
        values = _resized(values.flatten(2)[None], [size[0], size[1] * size[2]]).reshape(-1, *size)
    return values


def _resized(planes: torch.Tensor, size: list[int]) -> torch.Tensor:
    return interpolate(planes, size, mode="bilinear", antialias=True)
