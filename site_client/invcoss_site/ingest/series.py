"""Assembles DICOM slices, or the frames of one file, into a volume; refuses what does not fit together.

Which files belong together is found from headers alone: those of one folder, series, size, orientation and spacing.
Positions and directions are in DICOM's world (left, back, head), in mm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset

from invcoss_site.ingest.dicom import frame_count, read_header, read_pixels, rescaled
from invcoss_site.ingest.sample import Finding, Sample, check_expansion, unreadable
from invcoss_site.ingest.values import Values
from invcoss_site.ingest.volume import MIN_SIDE, Affine, check_affine, check_shape, turned

Vector = npt.NDArray[np.float64]

SAME_MM = 0.01  # between two slices, up to which they are at one position
UNEVEN = 0.1  # of the distance between slices, up to which it may vary
ALIKE = 0.01  # cosines of orientation, and shares of spacing, up to which slices belong together
_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # NIfTI's world


@dataclass(frozen=True)
class Slice:
    """Where a frame of a file is: `directions` (2, 3) along a row and a column, `spacing` between rows and columns."""

    path: Path
    frame: int
    position: Vector
    directions: Vector
    spacing: Vector

    @property
    def normal(self) -> Vector:
        return np.cross(self.directions[0], self.directions[1])

    @property
    def name(self) -> str:
        return f"{self.path.name} frame {self.frame + 1}" if self.frame else self.path.name


@dataclass(frozen=True, slots=True)
class Header:
    """What decides to which patient and volume a file belongs; small, because there may be millions."""

    path: Path
    patient: str
    group: tuple[object, ...]
    shape: tuple[float, ...]


def header_of(path: Path) -> Header:
    """The facts of a file whose pixels are all there; raises UnreadableFile."""
    header = read_header(path)
    alone = path if frame_count(header) > 1 else path.parent
    try:
        shape = tuple(float(value) for value in (*header.ImageOrientationPatient, *header.PixelSpacing))
    except (AttributeError, TypeError, ValueError):
        shape = ()
    group = (alone, str(header.get("SeriesInstanceUID")), int(header.Rows), int(header.Columns), len(shape))
    return Header(path, _patient(header), group, shape)


def _patient(header: Dataset) -> str:
    """A name for the patient, or for the study if no patient is named, that does not show who it is."""
    for tag in ("PatientID", "StudyInstanceUID"):
        if value := str(header.get(tag) or "").strip():
            return "dicom-" + hashlib.sha256(f"{tag} {value}".encode()).hexdigest()[:16]
    return ""


def find_series(headers: Iterable[Header]) -> list[list[Path]]:
    """The files of each volume, by name; a file of several frames is one by itself."""
    groups: dict[tuple[object, ...], list[tuple[tuple[float, ...], list[Path]]]] = {}
    for header in sorted(headers, key=lambda header: header.path.as_posix()):
        known = groups.setdefault(header.group, [])
        paths = next(
            (paths for shape, paths in known if np.allclose(header.shape, shape, rtol=ALIKE, atol=ALIKE)), None
        )
        if paths is None:
            known.append((header.shape, [header.path]))
        else:
            paths.append(header.path)
    return [paths for known in groups.values() for _, paths in known]


def read_series(files: Sequence[Path]) -> Sample:
    """Volume as a sample (1, D, H, W) of the slices in `files`, in any order. Raises UnreadableFile."""
    headers = {path: read_header(path, frames=True) for path in files}
    for path, header in headers.items():
        check_expansion(path, 4 * header.Rows * header.Columns * frame_count(header), path.stat().st_size)
    slices = [found for path in files for found in _slices(path, headers[path])]
    first = headers[files[0]]
    where = files[0] if len(files) == 1 else files[0].parent
    positions = _in_order(where, slices)
    shape = (int(first.Columns), int(first.Rows), len(positions))
    check_shape(where, shape)
    affine = _affine(where, [alike[0] for alike in positions])
    check_affine(where, affine)

    decoded = lru_cache(maxsize=1)(_frame_values)  # all frames of a file are decoded together
    volume = np.empty(shape[::-1], np.float32)
    dropped: list[str] = []
    for number, alike in enumerate(positions):
        values = decoded(alike[0].path)(alike[0].frame)
        for other in alike[1:]:
            if not np.array_equal(values, decoded(other.path)(other.frame)):
                text = f"different images at one position, {alike[0].name} and {other.name} (echoes, time points?); "
                raise unreadable(where, "duplicates", text + "export one volume a folder")
            dropped.append(other.name)
        if not np.isfinite(values).all():
            text = f"{alike[0].name} has values that are not numbers (NaN or infinite); export it again"
            raise unreadable(where, "not-finite", text)
        volume[number] = values
    decoded.cache_clear()
    odd: tuple[Finding, ...] = ()
    if dropped:
        text = f"{len(dropped)} copies of slices left out, the first: {dropped[0]}"
        odd = (Finding(files[0], f"{where}: {text}", "duplicates"),)
    return turned(files[0], volume.transpose(2, 1, 0), affine, warnings=odd)


def _slices(path: Path, header: FileDataset) -> Iterator[Slice]:
    """Each frame of a file with its place; raises UnreadableFile if it has none."""
    for number, frame in enumerate(_frames(header)):
        try:
            position = np.array(_group(header, frame, "PlanePositionSequence").ImagePositionPatient, dtype=float)
            along = np.array(_group(header, frame, "PlaneOrientationSequence").ImageOrientationPatient, dtype=float)
            spacing = np.array(_group(header, frame, "PixelMeasuresSequence").PixelSpacing, dtype=float)
            directions = along.reshape(2, 3)
            whole = position.shape == (3,) and spacing.shape == (2,)
            with np.errstate(over="ignore", invalid="ignore"):
                whole = whole and np.allclose(directions @ directions.T, np.eye(2), atol=ALIKE)
        except Exception:  # what is in a sequence is read only now, and pydicom raises anything on damaged bytes
            whole = False
        if not whole:
            text = "no geometry (position, orientation, pixel spacing), so it is no part of a volume; export it again"
            raise unreadable(path, "no-geometry", text)
        yield Slice(path, number, position, directions, spacing)


def _frames(header: FileDataset) -> Sequence[Dataset]:
    """What a header says of each frame; of the only one it says it directly."""
    if frame_count(header) == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return [header]
    return header.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * frame_count(header)


def _group(header: FileDataset, frame: Dataset, name: str) -> Dataset:
    """A frame's group of facts: its own, or that which all frames share, or what holds them in a file of one slice."""
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    for place in (frame, shared[0]):
        if place.get(name):
            found: Dataset = place[name].value[0]
            return found
    return frame


def _in_order(where: Path, slices: list[Slice]) -> list[list[Slice]]:
    """Slices from one end to the other; those at one position together. Raises UnreadableFile for gaps."""
    normal = slices[0].normal
    for one in slices[1:]:
        same = np.allclose(one.directions, slices[0].directions, atol=ALIKE)
        if not same or not np.allclose(one.spacing, slices[0].spacing, rtol=ALIKE):
            text = f"{slices[0].name} and {one.name} differ in orientation or pixel spacing; export one volume a folder"
            raise unreadable(where, "no-geometry", text)
    positions: list[list[Slice]] = []
    for one in sorted(slices, key=lambda one: float(one.position @ normal)):
        if positions and (one.position - positions[-1][0].position) @ normal < SAME_MM:
            positions[-1].append(one)
        else:
            positions.append([one])
    if len(positions) < MIN_SIDE:
        text = f"a series of {len(positions)} slices, a volume needs {MIN_SIDE}; remove it"
        raise unreadable(where, "too-small", text)
    ordered = [alike[0] for alike in positions]
    steps = np.diff([float(one.position @ normal) for one in ordered])
    usual = float(np.median(steps))
    for number in np.flatnonzero(np.abs(steps - usual) > UNEVEN * usual):
        here, there = ordered[number].name, ordered[number + 1].name
        text = f"uneven slice spacing, {steps[number]:g} mm between {here} and {there} and {usual:g} mm elsewhere: "
        raise unreadable(where, "gap", text + "slices are missing; export the whole series")
    return positions


def _affine(where: Path, ordered: list[Slice]) -> Affine:
    """From voxels (x along a row, y down a column, z by slice) to NIfTI's world; raises UnreadableFile for strays."""
    first, last = ordered[0], ordered[-1]
    step = (last.position - first.position) / (len(ordered) - 1)
    for number, one in enumerate(ordered):
        if np.linalg.norm(one.position - first.position - number * step) > UNEVEN * np.linalg.norm(step):
            text = f"slices are not in line, {one.name} is beside its place; export one volume a folder"
            raise unreadable(where, "no-geometry", text)
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine[:3] = _TO_RAS @ affine[:3]
    return affine


def _frame_values(path: Path) -> Callable[[int], Values]:
    """What gives a frame (rows, columns) of a file, by number, in its units; raises UnreadableFile, as that does."""
    dataset, pixels = read_pixels(path)
    frames = _frames(dataset)
    if pixels.shape not in ((dataset.Rows, dataset.Columns), (len(frames), dataset.Rows, dataset.Columns)):
        text = f"pixels {pixels.shape} where {len(frames)} grey slices are expected; remove it"
        raise unreadable(path, "dimensions", text)
    planes = pixels.reshape(len(frames), dataset.Rows, dataset.Columns)
    try:
        units = [_group(dataset, frame, "PixelValueTransformationSequence") for frame in frames]
    except Exception:  # as in `_slices`
        raise unreadable(path, "damaged", "its rescale values are damaged; export it again") from None
    return lambda number: rescaled(path, planes[number], units[number])
