"""Turns a site's files into arrays ready for the model, once: read, scaled, sized, cached; damaged ones quarantined.

A 2-D picture is resized and centre-cropped to a square; a volume is resized to the input, or, with a voxel size, cut
into half-overlapping sub-volumes of the input size. N = images, C = channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from monai.transforms import CenterSpatialCrop, SpatialPad

from invcoss_common.canonical import canonical_json, sha256_hex, write_atomic
from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import Geometry, Modality
from invcoss_site.batches import FloatImages
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.sample import Finding
from invcoss_site.ingest.values import Values, model_values, resample
from invcoss_site.inventory import Inventory, Item

RECIPE = 4  # raise it when the same files give other arrays or facts: old caches are then not used
MARGIN = 1.5  # side of a stored training picture over the input's, so that random crops need little enlarging
FOREGROUND = 0.02  # least spread (standard deviation) of a sub-volume that is more than background
CASES = "cases.i32"  # the case number of each training image
AHEAD = 32  # files read ahead of the one being stored

OnFile = Callable[[int, int], None]


@dataclass(frozen=True)
class SiteImages:
    """Training images (N, C, *stored) and held-out images (N, C, *input size), float16 in [0, 1], memory-mapped.

    `case_of` (N,) counts the cases of the training images from 0; `key` names exactly these files and settings.
    `axes` says how many volumes had which axes in their files, and names the first.
    """

    train: FloatImages
    heldout: FloatImages
    case_of: npt.NDArray[np.int32]
    key: str
    train_cases: int
    heldout_cases: int
    quarantined: tuple[Finding, ...]
    warnings: tuple[Finding, ...] = ()
    axes: Mapping[str, tuple[int, str]] = field(default_factory=dict)


def prepare(
    inventory: Inventory,
    modality: Modality,
    geometry: Geometry,
    spacing_mm: tuple[float, float, float] | None,
    cache: Path,
    on_file: OnFile | None = None,
) -> SiteImages:
    """The arrays of `inventory`, from `cache` if nothing has changed; `on_file(done, of)` follows the reading.

    Raises DataError unless there are at least two training images and one held-out image of different cases.
    """
    folder = cache / _key(inventory, modality, geometry, spacing_mm)
    if not (folder / "done.json").is_file():
        _fill(folder, inventory, modality, geometry, spacing_mm, on_file or (lambda _done, _of: None))
    facts = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    quarantined = (*inventory.rejected, *_findings(facts["quarantined"]))
    if facts["train"] < 2 or facts["heldout"] < 1:
        first = f"; first of {len(quarantined)} rejected: {quarantined[0].reason}" if quarantined else ""
        raise DataError(
            f"{facts['train']} training and {facts['heldout']} held-out images are usable, but at least 2 and 1, of "
            f"different cases, are needed; add cases, or say in an index which are held out{first}"
        )
    return SiteImages(
        mapped(folder / "train.f16", (facts["train"], geometry.channels, *stored_size(geometry))),
        mapped(folder / "heldout.f16", (facts["heldout"], geometry.channels, *geometry.size)),
        np.fromfile(folder / CASES, dtype=np.int32),
        folder.name,
        facts["train_cases"],
        facts["heldout_cases"],
        quarantined,
        _findings(facts["warnings"]),
        {axes: (count, first) for axes, (count, first) in facts["axes"].items()},
    )


def _findings(stored: list[list[str]]) -> tuple[Finding, ...]:
    return tuple(Finding(Path(path), reason, kind) for path, reason, kind in stored)


def stored_size(geometry: Geometry) -> tuple[int, ...]:
    """Size of a stored training image: larger than the input in 2-D, where batches crop."""
    if geometry.ndim == 2:
        return tuple(round(n * MARGIN) for n in geometry.size)
    return geometry.size


def _key(
    inventory: Inventory, modality: Modality, geometry: Geometry, spacing_mm: tuple[float, float, float] | None
) -> str:
    """Name of the cache for exactly these files and settings."""
    files = []
    for item in inventory.items:
        statuses = [(path.name, path.stat()) for path in item.files]
        sizes = [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]
        files.append([str(item.path), item.case, item.held_out, sizes])
    settings = [RECIPE, modality.model_dump(mode="json"), geometry.model_dump(mode="json"), spacing_mm]
    return sha256_hex(canonical_json([settings, files]))[:32]


def _fill(
    folder: Path,
    inventory: Inventory,
    modality: Modality,
    geometry: Geometry,
    spacing_mm: tuple[float, float, float] | None,
    on_file: OnFile,
) -> None:
    """Read every file and write all arrays and, last, `done.json`; a kill before that costs only time."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "heldout": 0}
    cases: dict[str, set[str]] = {"train": set(), "heldout": set()}
    number_of: dict[str, int] = {}
    case_of: list[int] = []
    quarantined: list[Finding] = []
    warnings: list[Finding] = []
    axes: dict[str, tuple[int, str]] = {}

    def read(item: Item) -> _Read | Finding:
        size = geometry.size if item.held_out else stored_size(geometry)
        try:
            samples = read_samples(item.files, modality)
            images = [model_values(sample, modality, spacing_mm) for sample in samples]
        except UnreadableFile as error:
            return Finding(item.path, str(error), error.kind)
        parts = [part for image in images for part in sized(image, size, cut=spacing_mm is not None)]
        return _Read(parts, [one for sample in samples for one in sample.warnings], samples[0].axes)

    with (folder / "train.f16").open("wb") as train, (folder / "heldout.f16").open("wb") as heldout:
        for done, (item, result) in enumerate(_ahead(read, inventory.items), start=1):
            if isinstance(result, Finding):
                quarantined.append(result)
            else:
                images = result.images
                warnings += dict.fromkeys(result.warnings)  # once, if it is so for many tiles of a slide
                if result.axes:
                    count, first = axes.get(result.axes, (0, str(item.path)))
                    axes[result.axes] = count + 1, first
                side, file = ("heldout", heldout) if item.held_out else ("train", train)
                for image in images:
                    file.write(image.astype(np.float16).tobytes())
                counts[side] += len(images)
                if not item.held_out:
                    case_of += [number_of.setdefault(item.case, len(number_of))] * len(images)
                cases[side].add(item.case)
            on_file(done, len(inventory.items))
        for file in (train, heldout):
            file.flush()
            os.fsync(file.fileno())
    write_atomic(folder / CASES, np.array(case_of, dtype=np.int32).tobytes())
    numbers = {f"{side}_cases": len(names) for side, names in cases.items()}
    noted = {"quarantined": quarantined, "warnings": warnings}
    findings = {name: [[str(one.path), one.reason, one.kind] for one in found] for name, found in noted.items()}
    facts = {**counts, **numbers, **findings, "axes": axes}
    write_atomic(folder / "done.json", json.dumps(facts).encode())


@dataclass(frozen=True)
class _Read:
    """What became of a file: its arrays, what is odd about it, and a volume's axes."""

    images: list[Values]
    warnings: list[Finding]
    axes: str


def _ahead(read: Callable[[Item], _Read | Finding], items: Sequence[Item]) -> Iterator[tuple[Item, _Read | Finding]]:
    """Each item with what `read` makes of it, in order, read by threads a little ahead."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        waiting = [(item, threads.submit(read, item)) for item in items[:AHEAD]]
        for following in range(AHEAD, len(items) + AHEAD):
            if not waiting:
                return
            item, result = waiting.pop(0)
            yield item, result.result()
            if following < len(items):
                waiting.append((items[following], threads.submit(read, items[following])))


def sized(image: Values, size: tuple[int, ...], cut: bool) -> list[Values]:
    """`image` (C, *spatial) as one array (C, *size), or with `cut` (3-D) as all its sub-volumes that aren't empty."""
    if len(size) == 2:
        return [_square(image, size)]
    return _subvolumes(image, size) if cut else [resample(image, size)]


def _square(image: Values, size: tuple[int, ...]) -> Values:
    """Shorter side to `size`, then the centre; resizes the centre only, so that extreme shapes cost nothing."""
    side = min(image.shape[1:])
    centre = np.asarray(CenterSpatialCrop((side, side))(image), dtype=np.float32)
    return resample(np.ascontiguousarray(centre), size)


def _subvolumes(volume: Values, size: tuple[int, ...]) -> list[Values]:
    padded = np.asarray(SpatialPad(size)(volume), dtype=np.float32)  # zeros, the darkest value, around small volumes
    starts = [_starts(extent, wanted) for extent, wanted in zip(padded.shape[1:], size, strict=True)]
    cuts = [padded[:, d : d + size[0], h : h + size[1], w : w + size[2]] for d, h, w in product(*starts)]
    kept = [np.ascontiguousarray(part) for part in cuts if float(part.std()) >= FOREGROUND]
    return kept or [np.ascontiguousarray(cuts[len(cuts) // 2])]


def _starts(extent: int, wanted: int) -> list[int]:
    """First indices of windows of length `wanted` that cover `extent` evenly, overlapping by about half."""
    count = max(1, -(-2 * (extent - wanted) // wanted) + 1)
    return sorted({round(start) for start in np.linspace(0, extent - wanted, count)})


def mapped(path: Path, shape: tuple[int, ...]) -> FloatImages:
    """The prepared images in a file of the cache, memory-mapped; its own `filename` and `shape` map it again."""
    array: FloatImages = np.memmap(path, dtype=np.float16, mode="c", shape=shape)
    return array
