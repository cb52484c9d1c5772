"""Whether the readers do right by a file: read it whole, or refuse it with a reason, in bounded time and memory."""

from __future__ import annotations

import resource
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tests.site_client.fuzzing.seeds import Seed

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import MODALITIES, Modality
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.masks import read_mask
from invcoss_site.ingest.sample import KINDS, Finding, Sample
from invcoss_site.ingest.text import MAX_CHARS, read_texts
from invcoss_site.ingest.values import MAX_VOXELS, model_values
from invcoss_site.inventory import Item, list_images

LONGEST_S = 10.0  # of processor time: what else the machine does is not the reader's
MEMORY_MB = 2000.0  # of the whole process, Python and PyTorch included
LONGEST_REASON = 1000  # characters
SPACING_MM = (1.5, 1.0, 1.0)  # that volumes are also resampled to
CLASSES = (0, 1, 2)

Outcome = Literal["read", "quarantined", "failed"]


class Wrong(Exception):
    """A reader gave what it must not give."""


@dataclass(frozen=True)
class Verdict:
    """`kind` is the kind of a quarantine, `failure` what is wrong, or "".

    `seconds` are the processor's, `waited_s` the clock's, `peak_mb` is of the whole process.
    """

    outcome: Outcome
    kind: str
    failure: str
    seconds: float
    waited_s: float
    peak_mb: float
    reason: str = ""
    trace: str = ""


def judge(folder: Path, seed: Seed, data: bytes) -> Verdict:
    """Write `data` as the seed's file into the empty `folder`, and read it as a site does."""
    for name, content in {**seed.others, seed.name: data}.items():
        (folder / name).write_bytes(content)
    _forget_peak()
    began, worked = time.perf_counter(), time.process_time()
    outcome, kind, reason, failure, trace = "read", "", "", "", ""
    try:
        finding = _read(folder, seed)
        if finding:
            outcome, kind, reason = "quarantined", finding.kind, finding.reason
            failure = _wrong_with(finding, folder)
    except Exception as error:
        outcome, failure, trace = "failed", f"{type(error).__name__}: {str(error)[:300]!r}", traceback.format_exc()
    seconds, waited_s, peak_mb = time.process_time() - worked, time.perf_counter() - began, _peak_mb()
    if not failure and seconds > LONGEST_S:
        failure = f"it took {seconds:.1f} s"
    if not failure and peak_mb > MEMORY_MB:
        failure = f"it took {peak_mb:.0f} MB"
    return Verdict("failed" if failure else outcome, kind, failure, seconds, waited_s, peak_mb, reason, trace)  # type: ignore[arg-type]


def _read(folder: Path, seed: Seed) -> Finding | None:
    """Why the seed's file is quarantined, or None if it is read; raises Wrong for what no file may become."""
    path = folder / seed.name
    try:
        if seed.use == "text":
            for record in read_texts(path).records:
                words = f"{record.id}{record.text}{record.label}"
                words.encode()  # raises on half a surrogate
                if not record.text.strip() or "\0" in words or len(record.text) > MAX_CHARS:
                    raise Wrong(f"the record {words[:80]!r}")
        elif seed.use == "mask":
            (other,) = seed.others
            image = read_samples([folder / other], MODALITIES[seed.modality])[0]
            mask = read_mask(image, path, CLASSES)
            if mask.shape[1:] != image.pixels.shape[1:] or not np.isin(mask, CLASSES).all():
                raise Wrong(f"a mask {mask.shape} of {np.unique(mask)[:5]}")
    except UnreadableFile as error:
        return Finding(path, str(error), error.kind)
    return _image(folder, path, MODALITIES[seed.modality]) if seed.use == "image" else None


def _image(folder: Path, path: Path, modality: Modality) -> Finding | None:
    found = list_images(folder, modality)
    quarantined = list(found.rejected)
    for item in found.items:
        try:
            for sample in read_samples(item.files, modality):
                _check(sample, modality)
        except UnreadableFile as error:
            quarantined += [Finding(one, str(error), error.kind) for one in item.files]
    known = {one.path: one for one in quarantined}
    if path not in known and not any(path in _files(item) for item in found.items):
        raise Wrong("neither an image nor quarantined")
    return known.get(path)


def _files(item: Item) -> tuple[Path, ...]:
    return item.files


def _check(sample: Sample, modality: Modality) -> None:
    shape = sample.pixels.shape
    if len(shape) != modality.ndim + 1 or shape[0] != modality.channels or not 0 < sample.pixels.size <= MAX_VOXELS:
        raise Wrong(f"a sample of shape {shape}")
    for spacing_mm in (None, SPACING_MM) if modality.ndim == 3 else (None,):
        values = model_values(sample, modality, spacing_mm)
        low, high = float(values.min()), float(values.max())  # NaN if there is one
        if not 0 <= low <= high <= 1 or values.dtype != np.float32:
            raise Wrong(f"values from {low} to {high}")
        del values


def _wrong_with(finding: Finding, folder: Path) -> str:
    """What is wrong with a reason, or nothing: it names the file, or of a series its folder, in one short line."""
    reason = finding.reason
    if not reason.isprintable() or len(reason) > LONGEST_REASON:
        return f"not one short line: {reason[:300]!r}"
    if finding.path.name not in reason and not reason.startswith(f"{folder}: "):
        return f"names no file: {reason!r}"
    return "" if finding.kind in KINDS else f"unknown kind {finding.kind!r}"


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to what is held now


def _peak_mb() -> float:
    """The most memory that this process held since `_forget_peak`, in MB (10^6 bytes)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
