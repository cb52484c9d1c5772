"""Strict acceptance of what a site returns: sizes before anything is fetched, then every tensor, before any use.

A release is accepted with the pool made after it, which must be the very file that the site names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import new_file
from invcoss_common.config import DpConfig
from invcoss_common.errors import ProtocolError, WeightsError
from invcoss_common.metrics import REPORTED
from invcoss_common.pools import pool_shape, without_rows
from invcoss_common.records import Artefact, DpSpent, HandOff, Release, Report, Task
from invcoss_common.statistics import statistics_from_bytes, statistics_schema
from invcoss_common.weights import Schema, check_file, model_schema

HEADER_BYTES = 1 << 20  # most that names and shapes of a safetensors file take
MAX_NORM = 1e6  # of one tensor of a model; what a site's own guard lets leave by default
ROUNDED = 0.005  # most that two digits, the fewest that a site's policy may set, change a share by


def check_report(report: Report, handoff: HandOff) -> None:
    """Raise ProtocolError unless the report holds what the task asks for, and nothing besides."""
    task = handoff.task
    expected = REPORTED[task.kind]
    if set(report.metrics) != expected:
        odd = ", ".join(sorted(set(report.metrics) ^ expected))
        raise ProtocolError(f"the report of site '{report.sender}' lacks metrics, or has some not asked for: {odd}")
    if (report.release is not None) != (task.kind == "audit"):
        raise ProtocolError(f"the report of site '{report.sender}' lacks a release, or has one that was not asked for")
    if report.release is not None:
        _check_release(report.release, handoff)
    if not _as_asked(report.dp, handoff.dp if task.kind == "train" else None):
        raise ProtocolError(
            f"the report of site '{report.sender}' is of other differential privacy than was asked for, or of none"
        )
    if task.kind != "train":
        if report.artefacts or report.curve:
            raise ProtocolError(f"the report of site '{report.sender}' brings artefacts; only a training has some")
        return
    if report.model is None or report.statistics is None:
        raise ProtocolError(f"the report of site '{report.sender}' lacks the trained model or its statistics")
    _check_size(report.model, model_schema(task.model, task.families, handoff.wire_dtype), "model", report.sender)
    _check_size(report.statistics, statistics_schema(task.model), "statistics", report.sender)


def check_model(path: Path, handoff: HandOff) -> None:
    """Raise WeightsError unless the file is exactly the hand-off's model as `wire_dtype`, finite, of possible norms."""
    check_file(path, model_schema(handoff.task.model, handoff.task.families, handoff.wire_dtype), MAX_NORM)


def check_statistics(path: Path, report: Report, task: Task) -> None:
    """Raise WeightsError unless the file holds possible statistics of this task's model over the reported images."""
    check_file(path, statistics_schema(task.model))
    statistics = statistics_from_bytes(path.read_bytes(), task.model)
    if bool((statistics.variance < 0).any()) or float(statistics.task_loss) < 0:
        raise WeightsError(f"the statistics of site '{report.sender}' hold a negative variance or loss")
    if int(statistics.images) != int(report.metrics["train_images"]):
        raise WeightsError(f"the statistics of site '{report.sender}' are not over the images that its report counts")


def store_released(store: ArtefactStore, pool: Artefact, release: Release) -> None:
    """Put what is left of `pool` after `release` into `store`.

    Raises ProtocolError unless the release counts the pool as it is and names the very file that is made here; it is
    never whole in memory.
    """
    figures, count, dropped = release.figures, pool_shape(store.path(pool))[0], len(release.dropped)
    if figures.pool_images != count or dropped >= count:
        raise ProtocolError(f"the release counts {figures.pool_images} and drops {dropped} of {count} images")
    if release.released is None:
        return
    if figures.copies > dropped or abs(figures.beyond.value - dropped / count) > ROUNDED:
        raise ProtocolError(f"the release drops {dropped} of {count} images, but its figures say something else")
    if not dropped:
        return
    digest = hashlib.sha256()
    with new_file(store.path(release.released)) as draft:
        with draft.open("wb") as file:
            for piece in without_rows(store.path(pool), release.dropped):
                file.write(piece)
                digest.update(piece)
        if (digest.hexdigest(), draft.stat().st_size) != (release.released.sha256, release.released.size_bytes):
            raise ProtocolError("the pool without the dropped images is not the file that its release names")


def _check_release(release: Release, handoff: HandOff) -> None:
    (pool,) = handoff.pools
    if (release.stage, release.pool) != (pool.stage, pool.artefact.sha256):
        raise ProtocolError("the release is of another pool than the one handed out")
    if list(release.dropped) != sorted(set(release.dropped)):
        raise ProtocolError("the release does not name each dropped image once, in ascending order")
    if not release.dropped and release.released not in (None, pool.artefact):
        raise ProtocolError("the release drops no image, but names another file than the pool")
    if release.dropped and release.released in (None, pool.artefact):
        raise ProtocolError("the release drops images, and names the pool with them, or none")


def _as_asked(spent: DpSpent | None, asked: DpConfig | None) -> bool:
    if spent is None or asked is None:
        return spent is None and asked is None
    return (spent.noise_multiplier, spent.statistics_noise, spent.delta) == (
        asked.noise_multiplier,
        asked.statistics_noise,
        asked.delta,
    )


def _check_size(artefact: Artefact, schema: Schema, what: str, site: str) -> None:
    values = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in schema.values())
    if not values < artefact.size_bytes <= values + HEADER_BYTES:
        raise ProtocolError(
            f"the {what} that site '{site}' offers has {artefact.size_bytes} bytes; this plan's has about {values}"
        )
