"""Strict acceptance of what a site returns: sizes before anything is fetched, then every tensor, before any use."""

from __future__ import annotations

from pathlib import Path

import torch

from invcoss_common.errors import ProtocolError, WeightsError
from invcoss_common.metrics import METRICS
from invcoss_common.records import Artefact, HandOff, Report, Task
from invcoss_common.statistics import statistics_from_bytes, statistics_schema
from invcoss_common.weights import Schema, check_file, model_schema

HEADER_BYTES = 1 << 20  # most that names and shapes of a safetensors file take
EVALUATED = frozenset({"train_images", "train_cases", "heldout_images", "quarantined_files", "heldout_mim_loss"})
TRAINED = frozenset(METRICS)


def check_report(report: Report, handoff: HandOff) -> None:
    """Raise ProtocolError unless the report holds what the task asks for, and nothing besides."""
    task = handoff.task
    expected = TRAINED if task.kind == "train" else EVALUATED
    if set(report.metrics) != expected:
        odd = ", ".join(sorted(set(report.metrics) ^ expected))
        raise ProtocolError(f"the report of site '{report.sender}' lacks metrics, or has some not asked for: {odd}")
    if task.kind == "evaluate":
        if report.artefacts or report.curve:
            raise ProtocolError(f"the report of site '{report.sender}' brings artefacts, but an evaluation has none")
        return
    if report.model is None or report.statistics is None:
        raise ProtocolError(f"the report of site '{report.sender}' lacks the trained model or its statistics")
    _check_size(report.model, model_schema(task.model, task.families, handoff.wire_dtype), "model", report.sender)
    _check_size(report.statistics, statistics_schema(task.model), "statistics", report.sender)


def check_model(path: Path, handoff: HandOff) -> None:
    """Raise WeightsError unless the file holds exactly the hand-off's model as `wire_dtype`, every value finite."""
    check_file(path, model_schema(handoff.task.model, handoff.task.families, handoff.wire_dtype))


def check_statistics(path: Path, report: Report, task: Task) -> None:
    """Raise WeightsError unless the file holds possible statistics of this task's model over the reported images."""
    check_file(path, statistics_schema(task.model))
    statistics = statistics_from_bytes(path.read_bytes(), task.model)
    if bool((statistics.variance < 0).any()) or float(statistics.task_loss) < 0:
        raise WeightsError(f"the statistics of site '{report.sender}' hold a negative variance or loss")
    if int(statistics.images) != int(report.metrics["train_images"]):
        raise WeightsError(f"the statistics of site '{report.sender}' are not over the images that its report counts")


def _check_size(artefact: Artefact, schema: Schema, what: str, site: str) -> None:
    values = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in schema.values())
    if not values < artefact.size_bytes <= values + HEADER_BYTES:
        raise ProtocolError(
            f"the {what} that site '{site}' offers has {artefact.size_bytes} bytes; this plan's has about {values}"
        )
