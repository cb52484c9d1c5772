"""The guard's look at a report and the artefacts it names, in the worker, before the report is signed.

A file of tensors that may leave is all schema and values: its header must be the one that our writer gives to these
tensors, so that nothing can hide in names, order, gaps, white space, metadata or behind the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from invcoss_common import __version__
from invcoss_common.errors import EgressRefused, InvcossError
from invcoss_common.metrics import COUNTS, REPORTED
from invcoss_common.records import Artefact, HandOff, Report, from_bytes, to_bytes
from invcoss_common.statistics import statistics_schema
from invcoss_common.weights import Schema, model_schema
from invcoss_site.home import SiteHome
from invcoss_site.policy import SitePolicy
from invcoss_site.rounding import rounded_report
from invcoss_site.uploads import check_upload

DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}  # in the order in which the file has them


def released(report: Report, handoff: HandOff, home: SiteHome, policy: SitePolicy) -> Report:
    """`report`, rounded, once it and the artefacts it names may leave; else these are removed from the store.

    Raises EgressRefused, and UploadSpent when the artefacts are more than the site's budget has left.
    """
    try:
        try:
            final = rounded_report(report, policy.egress)
            check_report(final, handoff, home, policy)
        except ValueError as error:
            raise EgressRefused(f"the report is not one of the protocol: {error}") from None
        check_artefacts(final, handoff, home, policy)
        check_upload(home, policy.egress, sum(artefact.size_bytes for artefact in final.artefacts))
        return final
    except BaseException:
        for artefact in set(report.artefacts) - set(handoff.artefacts):
            home.artefacts.path(artefact).unlink(missing_ok=True)
        raise


def check_report(report: Report, handoff: HandOff, home: SiteHome, policy: SitePolicy) -> None:
    """Raise EgressRefused unless `report` answers `handoff` with what its kind of task reports, within all bounds."""
    task, egress = handoff.task, policy.egress
    names = (report.protocol, report.run, report.hop, report.sender, report.plan_digest, report.code_version)
    known = (handoff.protocol, handoff.run, handoff.hop, home.name, handoff.plan_digest, __version__)
    if names != known:
        raise EgressRefused("the report names another protocol, run, hop, site, plan or version than it answers")
    try:
        read = from_bytes(Report, to_bytes(report))
    except InvcossError as error:
        raise EgressRefused(str(error)) from None
    if read != report or rounded_report(report, egress) != report:
        raise EgressRefused("the report has more digits, or a curve, than the site's policy lets leave")
    if odd := set(report.metrics) ^ REPORTED[task.kind]:
        raise EgressRefused(f"the report lacks metrics, or has some not asked for: {', '.join(sorted(odd))}")
    if not all(report.metrics[name].is_integer() for name in COUNTS & report.metrics.keys()):
        raise EgressRefused("a count in the report is not a whole number")
    trains, audits = task.kind == "train", task.kind == "audit"
    has = (report.model is not None, report.statistics is not None, report.release is not None, report.dp is not None)
    if has != (trains, trains, audits, trains and handoff.dp is not None) or (report.curve and not trains):
        raise EgressRefused(f"the report has parts that a task of kind '{task.kind}' has not, or lacks some")
    if report.release is not None:
        _check_release(report, handoff)
    few = trains and report.metrics["train_cases"] < policy.cases.min_train
    if few or report.metrics["heldout_images"] < policy.cases.min_heldout:  # which are no fewer than cases
        raise EgressRefused("fewer cases stand behind the report than the site asks for ([cases] in policy.toml)")


def check_artefacts(report: Report, handoff: HandOff, home: SiteHome, policy: SitePolicy) -> None:
    """Raise EgressRefused unless the files of the report are the hand-off's model and its statistics, to the last byte.

    One tensor is in memory at a time.
    """
    task = handoff.task
    if report.model is not None:
        schema = model_schema(task.model, task.families, handoff.wire_dtype)
        for name, tensor in checked_tensors(home.artefacts.path(report.model), report.model, schema):
            norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
            if not norm <= policy.egress.max_weight_norm:  # so too when it is not a number
                raise EgressRefused(f"tensor '{name}' of the model has norm {norm:g} (egress.max_weight_norm)")
    if report.statistics is not None:
        file, schema = home.artefacts.path(report.statistics), statistics_schema(task.model)
        statistics = dict(checked_tensors(file, report.statistics, schema))
        for name in ("mean", "variance", "task_loss"):
            if not bool(torch.isfinite(statistics[name]).all()):
                raise EgressRefused(f"'{name}' of the statistics holds values that are not finite")
        if bool((statistics["variance"] < 0).any()) or not 0 <= float(statistics["task_loss"]) <= 1e4:
            raise EgressRefused("the statistics hold a negative variance, or a loss out of its bounds")
        if int(statistics["images"]) != report.metrics["train_images"]:
            raise EgressRefused("the statistics are not over the images that the report counts")


def checked_tensors(path: Path, artefact: Artefact, schema: Schema) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `schema` in `path`, one after the other; the file must hold nothing else and have its digest.

    Raises EgressRefused, for what comes behind the last tensor after it.
    """
    header = header_of(schema)
    digest = hashlib.sha256(header)
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise EgressRefused(f"{path}: its header is not that of the tensors that may leave")
        for name in _order(schema):
            shape, dtype = schema[name]
            data = bytearray(prod(shape) * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise EgressRefused(f"{path}: ends within tensor '{name}'")
            digest.update(data)
            yield name, torch.frombuffer(data, dtype=dtype).reshape(shape)
        if file.read(1):
            raise EgressRefused(f"{path}: has bytes behind its last tensor")
        size = file.tell()
    if (digest.hexdigest(), size) != (artefact.sha256, artefact.size_bytes):
        raise EgressRefused(f"{path}: is not the file that the report names")


def header_of(schema: Schema) -> bytes:
    """The first bytes of a safetensors file, as the library writes them, up to where its tensors begin."""
    entries, end = {}, 0
    for name in _order(schema):
        shape, dtype = schema[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(schema: Schema) -> list[str]:
    """The names of the tensors in the order of the file: by type, then by name."""
    types = list(DTYPES)
    return sorted(schema, key=lambda name: (types.index(schema[name][1]), name))


def _check_release(report: Report, handoff: HandOff) -> None:
    release, (pool, *others) = report.release, handoff.pools
    assert release is not None
    if others or (release.stage, release.pool) != (pool.stage, pool.artefact.sha256):
        raise EgressRefused("the release is of another pool than the one that was handed in for the audit")
    rows, images = release.dropped, release.figures.pool_images
    if any(a >= b for a, b in pairwise(rows)) or (rows and rows[-1] >= images):
        raise EgressRefused("the release drops images that the pool has not, or not in order")
    if release.released is not None and release.released.size_bytes > pool.artefact.size_bytes:
        raise EgressRefused("the release names a larger file than the pool was")
