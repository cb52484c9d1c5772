"""What is odd about a sample that can be read: it is used, and a person should look at it."""

from __future__ import annotations

import numpy as np

from invcoss_common.modality import Modality
from invcoss_site.ingest.sample import Finding, Pixels, Sample, warning

_LOOK = 1024  # pixels of the shorter side that are looked at, at most twice as many


def doubts(sample: Sample, modality: Modality) -> tuple[Finding, ...]:
    """Warnings about the content of a sample."""
    found = []
    lowest = sample.pixels.min()
    if modality.normalisation == "window" and modality.low < 0 <= -lowest < -modality.low / 2:
        text = f"no value near {modality.low:g}, the lowest is {lowest:g}: no air, or not Hounsfield units"
        found.append(warning(sample.path, "units", text))
    if modality.ndim == 2 and modality.channels == 1 and looks_inverted(sample.pixels[0]):
        found.append(warning(sample.path, "inverted", "looks like a film with black and white exchanged; check it"))
    return tuple(found)


def looks_inverted(film: Pixels) -> bool:
    """Whether a chest film (H, W) has bright upper corners and a spine darker than the lungs.

    On 498 real films from two sources this was so for one; with black and white exchanged, for three in four.
    """
    step = max(1, min(film.shape) // _LOOK)
    grey = film[::step, ::step].astype(np.float32)
    height, width = grey.shape
    black, white = np.percentile(grey, (1, 99))
    if black == white:
        return False
    grey = (grey - black) / (white - black)
    corners = np.concatenate([grey[: height // 8, : width // 8], grey[: height // 8, -width // 8 :]], axis=1)
    middle = grey[height // 3 : 2 * height // 3]
    spine = middle[:, int(0.45 * width) : int(0.55 * width)].mean()
    lungs = [middle[:, int(left * width) : int((left + 0.15) * width)].mean() for left in (0.2, 0.65)]
    return bool(np.median(corners) > 0.5 and spine - np.mean(lungs) < -0.05)
