"""Every number that a site may report: its name, unit, direction and bounds. What is not here is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from invcoss_common.errors import ProtocolError


@dataclass(frozen=True)
class Metric:
    """One declared metric; `better` says which direction is good, `low` and `high` bound what is accepted."""

    unit: str
    better: Literal["lower", "higher", "neither"]
    low: float
    high: float
    meaning: str


METRICS: dict[str, Metric] = {
    "heldout_mim_loss": Metric(
        "normalised squared error",
        "lower",
        0.0,
        1e4,
        "masked reconstruction on held-out cases; 1 = predicting the mean",
    ),
    "train_mim_loss": Metric("normalised squared error", "lower", 0.0, 1e4, "the same on training cases, frozen model"),
    "heldout_images": Metric("images", "neither", 0, 1e9, "held-out images evaluated"),
    "train_images": Metric("images", "neither", 0, 1e9, "training images of this site"),
    "train_cases": Metric("cases", "neither", 0, 1e9, "training patients or cases"),
    "quarantined_files": Metric("files", "lower", 0, 1e9, "files that could not be used"),
    "train_seconds": Metric("s", "lower", 0, 1e9, "time spent in optimiser steps"),
    "images_per_s": Metric("images/s", "higher", 0, 1e9, "training throughput"),
    "data_wait_share": Metric("share", "lower", 0, 1, "share of training time spent waiting for data"),
    "skipped_steps": Metric("steps", "lower", 0, 1e9, "steps skipped because the loss was not finite"),
}

COUNTS = frozenset(name for name, metric in METRICS.items() if metric.unit in ("images", "cases", "files", "steps"))
DATA = frozenset({"train_images", "train_cases", "heldout_images", "quarantined_files"})
REPORTED = {  # by kind of task, no more, no less
    "train": frozenset(METRICS),
    "evaluate": DATA | {"heldout_mim_loss"},
    "audit": DATA,
}
CURVE_POINTS = 200  # most points of a loss curve that a site reports


def check_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return `metrics` if each is declared, finite and within its bounds; raise ProtocolError otherwise."""
    for name, value in metrics.items():
        metric = METRICS.get(name)
        if metric is None:
            raise ProtocolError(f"metric '{name}' is not declared in the protocol")
        if not math.isfinite(value) or not metric.low <= value <= metric.high:
            raise ProtocolError(f"metric '{name}' is {value}, outside [{metric.low:g}, {metric.high:g}] {metric.unit}")
    return metrics
