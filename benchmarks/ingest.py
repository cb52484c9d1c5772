"""How fast a site's files become training samples: each format, beside MONAI's datasets; and the index of many files.

    OMP_NUM_THREADS=1 python benchmarks/ingest.py

It makes its own files, of the sizes of real ones. Every way does the same to a file, with this project's readers, and
draws the same kind of samples from it, so that only what is kept of the work differs. Each measurement is a process of
its own. "first" is what a first epoch takes, with all that is kept of it; "second" a later one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import (
    CastToType,
    Compose,
    Lambda,
    RandFlip,
    Randomizable,
    RandSpatialCropSamples,
    Transform,
)
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from rich.console import Console
from torch import Tensor

from invcoss_common.modality import MODALITIES, Geometry, Modality
from invcoss_site.batches import TrainingBatches, batch_loader, random_crop, resize
from invcoss_site.file_index import open_index
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.text import read_texts
from invcoss_site.ingest.values import model_values
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare, sized, stored_size, without_background
from measurement import MEASUREMENTS, Meter, write_measurement

BATCH = 4
CROP_SCALE = 0.2
WARM_EPOCHS = 3  # after the first, in one process
SPACING_MM = (2.0, 1.5, 1.5)
FILE_SPACING_MM = (2.5, 1.25, 1.25)
FILE_SHAPE = (120, 320, 320)  # D, H, W: 30 x 40 x 40 cm
STORED_SHAPE = tuple(round(n * a / b) for n, a, b in zip(FILE_SHAPE, FILE_SPACING_MM, SPACING_MM, strict=True))
SUB_VOLUME = Geometry(channels=1, size=(16, 192, 192), patch=(16, 16, 16))
GREY = Geometry(channels=1, size=(224, 224), patch=(16, 16))
COLOUR = Geometry(channels=3, size=(224, 224), patch=(16, 16))
WAYS = {
    "ours": "this project",
    "persistent": "PersistentDataset",
    "cache": "CacheDataset",
    "reading": "reading each time",
}

PROCESSES = multiprocessing.get_context("fork")  # they have imported everything; here torch only that, for its threads

Volume = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Format:
    """Files of one kind, and what is made of them."""

    row: str
    geometry: Geometry
    spacing_mm: tuple[float, float, float] | None
    ways: tuple[str, ...] = ("ours", "persistent", "cache")

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.row]


FORMATS = {
    "NIfTI": Format("ct", SUB_VOLUME, SPACING_MM, ("ours", "persistent", "cache", "reading")),
    "DICOM series": Format("ct", SUB_VOLUME, SPACING_MM),
    "PNG": Format("xray", GREY, None),
    "JPEG": Format("pathology", COLOUR, None),
    "TIFF": Format("xray", GREY, None),
}


# Files ----------------------------------------------------------------------------------------------------------------


def body(number: int) -> Volume:
    """A trunk in air, Hounsfield units: one of four, its slices turned round by `number`."""
    return np.roll(_body(number % 4), number, axis=0)


@cache
def _body(seed: int) -> Volume:
    """An ellipse with organs of all sizes and a scanner's noise."""
    random = np.random.default_rng(seed)
    d, h, w = (np.linspace(-1, 1, n, dtype=np.float32) for n in FILE_SHAPE)
    values = np.full(FILE_SHAPE, -1000, np.float32)
    inside = (h[:, None] ** 2 + w[None] ** 2) < 0.98
    values[:, inside] = 40
    for _ in range(12):
        centre, radius = random.uniform(-0.6, 0.6, 3), random.uniform(0.1, 0.4)
        distance = (d[:, None, None] - centre[0]) ** 2 + (h[:, None] - centre[1]) ** 2 + (w - centre[2]) ** 2
        values[(distance < radius**2) & inside] = random.uniform(-850, 400)
    return (values + random.normal(0, 15, FILE_SHAPE).astype(np.float32)).clip(-1024, 3071).astype(np.int16)


def write_nifti(folder: Path, number: int) -> None:
    d, h, w = FILE_SPACING_MM
    voxels = np.ascontiguousarray(body(number).T)
    nib.save(nib.Nifti1Image(voxels, np.diag([w, h, d, 1.0])), folder / f"{number:04d}.nii.gz")


def write_series(folder: Path, number: int) -> None:
    series = folder / f"{number:04d}"
    series.mkdir()
    for place, plane in enumerate(body(number)):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}.{place + 1}"
        slice_ = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.Modality, slice_.PatientID = "CT", f"case{number}"
        slice_.SeriesInstanceUID, slice_.InstanceNumber = f"1.2.{number + 1}", place + 1
        slice_.ImagePositionPatient = [0, 0, place * FILE_SPACING_MM[0]]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing, slice_.SliceThickness = list(FILE_SPACING_MM[1:]), FILE_SPACING_MM[0]
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.PixelData = plane.tobytes()
        pydicom.dcmwrite(series / f"{place:03d}.dcm", slice_, enforce_file_format=True)


def picture(seed: int, side: int, channels: int) -> npt.NDArray[np.uint8]:
    """Blobs of all sizes with some noise: about as compressible as a photograph."""
    random = np.random.default_rng(seed)
    values = np.zeros((side, side, channels), np.float32)
    for channel, cells in product(range(channels), (4, 16, 64)):
        coarse = Image.fromarray(random.normal(0, 1, (cells, cells)).astype(np.float32))
        values[..., channel] += np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))
    values += random.normal(0, 0.05, values.shape).astype(np.float32)
    out: npt.NDArray[np.uint8] = (128 + 40 * values).clip(0, 255).astype(np.uint8)
    return out[..., 0] if channels == 1 else out


def write_files(name: str, folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        match name:
            case "NIfTI":
                write_nifti(folder, number)
            case "DICOM series":
                write_series(folder, number)
            case "PNG":
                Image.fromarray(picture(number, 1024, 1)).save(folder / f"{number:04d}.png")
            case "JPEG":
                Image.fromarray(picture(number, 512, 3)).save(folder / f"{number:04d}.jpg", quality=90)
            case "TIFF":
                values = picture(number, 1024, 1).astype(np.uint16) * 257
                Image.fromarray(values).save(folder / f"{number:04d}.tif", compression="tiff_deflate")
            case "JSONL":
                write_reports(folder / f"{number:04d}.jsonl", number)
    rows = [f"{path.name},{'test' if place == 0 else 'train'}" for place, path in enumerate(sorted(folder.iterdir()))]
    (folder / "labels.csv").write_text("\n".join(["file,split", *rows]), encoding="utf-8")


def write_reports(file: Path, seed: int, records: int = 2_000, words: int = 200) -> None:
    random = np.random.default_rng(seed)
    vocabulary = ["".join(map(chr, random.integers(97, 123, random.integers(2, 11)))) for _ in range(5_000)]
    lines = [
        json.dumps({"id": f"{seed}-{number}", "text": " ".join(random.choice(vocabulary, words))})
        for number in range(records)
    ]
    file.write_text("\n".join(lines), encoding="utf-8")


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".csv") / 1e6


# Ways -----------------------------------------------------------------------------------------------------------------


class Augment(Randomizable, Transform):  # type: ignore[misc]
    """A random part of a picture at the input size, mirrored half of the time: as TrainingBatches does it."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __call__(self, stored: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(self.R.randint(2**31)))
        top, left, height, width = random_crop(stored.shape[1], stored.shape[2], CROP_SCALE, generator)
        image = resize(stored[:, top : top + height, left : left + width].float(), self.geometry)
        return image.flip(-1) if self.R.rand() < 0.5 else image


def monai_transforms(kind: Format, samples: int) -> Compose:
    """The very steps of this project, to float32, then MONAI's own random ones (in 2-D the same as here)."""

    def stored(item: dict[str, list[str]]) -> Tensor:
        (sample,) = read_samples([Path(file) for file in item["files"]], kind.modality)
        values = model_values(sample, kind.modality, kind.spacing_mm)
        if kind.spacing_mm is None:
            values = sized(values, stored_size(kind.geometry))
        else:
            values = without_background(values, kind.geometry.size)
        return torch.from_numpy(values)

    if kind.geometry.ndim == 2:
        return Compose([Lambda(stored), Augment(kind.geometry)])
    cut = RandSpatialCropSamples(kind.geometry.size, num_samples=samples, random_size=False)
    return Compose([Lambda(stored), cut, RandFlip(prob=0.5, spatial_axis=2), CastToType(dtype=torch.float32)])


def epochs(way: str, kind: Format, data: Path, work: Path) -> Iterator[tuple[str, int]]:
    """Epochs, each when asked for: its name, and how many samples it had. "first" includes all preparation."""
    inventory = take_inventory(data, kind.modality, ("labels.csv",))
    items = [item for item in inventory.items if not item.held_out]
    turns = ["first"] + ([] if way == "reading" else ["second"] * WARM_EPOCHS)
    if kind.geometry.ndim == 3:
        turns += [] if way == "reading" else ["second, 4 a volume"] * WARM_EPOCHS
    if way == "ours":
        train = prepare(inventory, kind.modality, kind.geometry, kind.spacing_mm, work).train
        batches = TrainingBatches(train, kind.geometry, batch_size=BATCH, crop_scale=CROP_SCALE, flip=True, seed=0)
        start = 0
        for name in turns:
            stop = start + -(-len(items) * (4 if "4" in name else 1) // BATCH)
            yield name, sum(len(batch) for batch in batch_loader(batches, start, stop, 0))
            start = stop
        return
    files = [{"files": [str(path) for path in item.files]} for item in items]
    dataset: Any = None
    for name in turns:
        samples = 4 if "4" in name else 1
        transforms = monai_transforms(kind, samples)
        if dataset is not None:
            dataset.transform = transforms  # what it has kept is from before the random ones
        elif way == "persistent":
            dataset = PersistentDataset(files, transforms, cache_dir=work)
        elif way == "cache":
            dataset = CacheDataset(files, transforms, num_workers=os.cpu_count(), progress=False)
        else:
            dataset = Dataset(files, transforms)
        loader = DataLoader(dataset, batch_size=BATCH // samples, shuffle=True, num_workers=0)
        yield name, sum(len(batch) for batch in loader)


def measure_way(way: str, kind: Format, data: Path, work: Path) -> dict[str, Any]:
    """Seconds of a first epoch, milliseconds a sample of later ones, the peak of memory, and what is kept on disk."""
    seconds: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    with Meter() as meter:
        began = time.perf_counter()
        for name, samples in epochs(way, kind, data, work):
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            found[f"{name}, samples"] = samples
            began = time.perf_counter()
    if way == "reading":
        seconds["second"], found["second, samples"] = seconds["first"], found["first, samples"]
    found["first"] = seconds.pop("first")[0]
    found |= {name: 1000 * statistics.median(some) / found[f"{name}, samples"] for name, some in seconds.items()}
    kept = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / 1e6
    return found | {"peak_mb": meter.peak_mb, "kept_mb": kept}


def measure_texts(data: Path, _work: Path) -> dict[str, Any]:
    """Seconds for all files with this project's reader, and with the standard library's JSON line by line."""
    files = sorted(data.glob("*.jsonl"))

    def bare() -> int:
        return sum(len([json.loads(line)["text"] for line in file.open(encoding="utf-8")]) for file in files)

    def ours() -> int:
        return sum(len(read_texts(file).records) for file in files)

    found: dict[str, Any] = {}
    for name, reader in (("json", bare), ("first", ours)):
        with Meter() as meter:
            found["samples"] = reader()
        found[name], found["peak_mb"] = meter.seconds, meter.peak_mb
    return found


def walk(folder: Path) -> Iterator[Path]:
    for part in folder.iterdir():
        yield from part.iterdir()


def measure_index(data: Path, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with open_index(work / "files.sqlite") as index:
        for name in ("first", "again"):
            with Meter() as meter:
                found["files"] = sum(digest is not None for digest in index.digests(walk(data)))
            found[name], found[f"{name}_mb"] = meter.seconds, meter.peak_mb
    return found


def measure_recheck(data: Path, work: Path) -> dict[str, Any]:
    """Seconds from a folder to images ready for training: at first, with nothing changed, and with one file more."""
    row, geometry = MODALITIES["xray"], Geometry(channels=1, size=(32, 32), patch=(8, 8))

    def ready() -> float:
        began = time.perf_counter()
        prepare(take_inventory(data, row), row, geometry, None, work)
        return time.perf_counter() - began

    found = {"first": ready(), "again": ready()}
    Image.fromarray(picture(0, 40, 1)).save(data / "new.png")
    return found | {"one_more": ready()}


# The whole ------------------------------------------------------------------------------------------------------------


def _send(sender: Connection, measure: Callable[..., dict[str, Any]], *arguments: object) -> None:
    torch.set_num_threads(1)
    sender.send(measure(*arguments))


def apart(times: int, measure: Callable[..., dict[str, Any]], *arguments: object, work: Path) -> list[dict[str, Any]]:
    """Measurements, each in a process of its own, with an empty folder to keep things in as the last argument."""
    found = []
    for _ in range(times):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            process = PROCESSES.Process(target=_send, args=(sender, measure, *arguments, Path(folder)))
            process.start()
            sender.close()
            found.append(receiver.recv())
            process.join()
    return found


def small_files(folder: Path, count: int, size: int = 4096) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"{number // 1000}").mkdir(parents=True)
        (folder / f"{number // 1000}" / f"{number}.dcm").write_bytes(random.bytes(size))


def small_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"{number:05d}.png")


def middle(runs: Iterable[dict[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def span(runs: Sequence[dict[str, Any]], name: str, digits: int = 2) -> str:
    """Median, and the least and greatest."""
    values = [run[name] for run in runs]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=24, help="NIfTI files")
    parser.add_argument("--series", type=int, default=5, help="DICOM series of 96 slices")
    parser.add_argument("--pictures", type=int, default=120, help="files of each 2-D format")
    parser.add_argument("--files", type=int, default=100_000, help="small files to index")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    say, began, load = Console(stderr=True).print, time.perf_counter(), [os.getloadavg()[0]]
    counts = {"NIfTI": asked.volumes, "DICOM series": asked.series, "JSONL": 10}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-") as name:
        work = Path(name)
        for files, kind in FORMATS.items():
            write_files(files, work / files, counts.setdefault(files, asked.pictures))
            sizes[files] = megabytes(work / files)
            runs[files] = {way: [] for way in kind.ways}
            for _ in range(asked.repeats):
                for way in kind.ways:  # in turns, so that what else the machine does falls on all of them
                    runs[files][way] += apart(1, measure_way, way, kind, work / files, work=work)
            shutil.rmtree(work / files)
            load.append(os.getloadavg()[0])
            say(files, {way: span(found, "second", 3) for way, found in runs[files].items()})
        write_files("JSONL", work / "JSONL", counts["JSONL"])
        sizes["JSONL"] = megabytes(work / "JSONL")
        texts = apart(asked.repeats, measure_texts, work / "JSONL", work=work)
        index: dict[int, list[dict[str, Any]]] = {}
        for count in (asked.files // 10, asked.files):
            small_files(work / str(count), count)
            index[count] = apart(asked.repeats, measure_index, work / str(count), work=work)
            load.append(os.getloadavg()[0])
        small_pictures(work / "pictures", asked.files // 10)
        recheck = apart(1, measure_recheck, work / "pictures", work=work)
        load.append(os.getloadavg()[0])
    report(asked, counts, sizes, runs, texts, index, recheck, load, time.perf_counter() - began)


def report(
    asked: argparse.Namespace,
    counts: dict[str, int],
    sizes: dict[str, float],
    runs: dict[str, dict[str, list[dict[str, Any]]]],
    texts: list[dict[str, Any]],
    index: dict[int, list[dict[str, Any]]],
    recheck: list[dict[str, Any]],
    load: list[float],
    seconds: float,
) -> None:
    def speedup(name: str, way: str, epoch: str = "second") -> float:
        return middle(runs[name][way], epoch) / middle(runs[name]["ours"], epoch)

    def rate(name: str) -> tuple[float, float]:
        first = middle(texts if name == "JSONL" else runs[name]["ours"], "first")
        return counts[name] / first, sizes[name] / first

    few, many = index.values()
    figures = {
        "second_epoch_speedup_vs_persistent": speedup("NIfTI", "persistent"),
        "second_epoch_speedup_vs_persistent_4_a_volume": speedup("NIfTI", "persistent", "second, 4 a volume"),
        "second_epoch_speedup_vs_cache": speedup("NIfTI", "cache"),
        "second_epoch_speedup_vs_reading": speedup("NIfTI", "reading"),
        "first_epoch_speedup_vs_persistent": speedup("NIfTI", "persistent", "first"),
        "index_seconds_100k": middle(many, "first") * 100_000 / asked.files,
        "reindex_seconds_100k": middle(many, "again") * 100_000 / asked.files,
        "index_memory_mb_10k": middle(few, "first_mb"),
        "index_memory_mb_100k": middle(many, "first_mb"),
        "recheck_seconds_10k_images": recheck[0]["again"] * 100_000 / asked.files,
    }
    names = [*FORMATS, "JSONL"]
    for name in names:
        stem = name.split()[0].lower()
        figures[f"{stem}_files_per_s"], figures[f"{stem}_mb_per_s"] = rate(name)
    ways = [
        [
            name if way == "ours" else "",
            WAYS[way],
            span(found, "first", 1),
            span(found, "second"),
            span(found, "second, 4 a volume") if "second, 4 a volume" in found[0] else "",
            f"{middle(found, 'peak_mb'):.0f}",
            f"{middle(found, 'kept_mb'):.0f}",
        ]
        for name, by_way in runs.items()
        for way, found in by_way.items()
    ]
    rates = [[name, counts[name], f"{sizes[name]:.0f}", *(f"{value:.3g}" for value in rate(name))] for name in names]
    again = (few, "first"), (few, "again"), (many, "first"), (many, "again")
    indexed = [
        [
            f"{found[0]['files']:,}",
            "new" if name == "first" else "unchanged",
            span(found, name),
            span(found, f"{name}_mb", 1),
        ]
        for found, name in again
    ]
    shape = " x ".join(map(str, FILE_SHAPE))
    markdown = f"""# From files to training samples

    OMP_NUM_THREADS=1 python benchmarks/ingest.py --volumes {asked.volumes} --series {asked.series} --pictures {asked.pictures} --files {asked.files} --repeats {asked.repeats}

Made-up files: CT-like volumes of {shape} voxels at {FILE_SPACING_MM} mm (NIfTI, gzip; DICOM, uncompressed), pictures of
1024 x 1024 (PNG 8 bits, TIFF 16 bits with deflate) and 512 x 512 x 3 (JPEG), ten files of 2,000 reports. All ways do the same
to a file: this project's readers; volumes at {SPACING_MM} mm ({" x ".join(map(str, STORED_SHAPE))} voxels), without the
background around them. Then sub-volumes of 16 x 192 x 192, or random resized crops of 224 x 224, in batches of {BATCH} float32,
prepared by the process itself without workers. MONAI's data sets keep float32 as they do by themselves, this project float16.
An epoch has one sample of each file, or four of each volume, which MONAI cuts from one loading (`RandSpatialCropSamples`).

Median of {asked.repeats} processes (least–greatest). "First" is seconds, everything from the folder on; this project (which
reads a held-out file too, and takes digests) and `CacheDataset` then read with {os.cpu_count()} threads, the others with one. "Second"
is milliseconds a sample in the middle one of {WARM_EPOCHS} later epochs; of reading each time in the first and only. Memory is the peak beyond what the process held before, mapped pages of files
and libraries included; "kept" is what lies on disk. Files were in the page cache: no disk was waited for.

{table(["", "way", "first, s", "second, ms", "4 a volume, ms", "memory, MB", "kept, MB"], ways)}

Second epoch of sub-volumes, NIfTI: {figures["second_epoch_speedup_vs_persistent"]:.1f} times as fast as `PersistentDataset` with one
sub-volume a volume, {figures["second_epoch_speedup_vs_persistent_4_a_volume"]:.1f} times with four. `PersistentDataset` loads a whole volume
for each, `CacheDataset` copies it (its default); here only the part that is asked for is read from the mapped file.

## Reading, by format

This project's first epoch; of JSONL reading alone, which the standard library's `json` does at {sizes["JSONL"] / middle(texts, "json"):.3g} MB/s without
a check of anything.

{table(["format", "files or series", "MB", "files/s", "MB/s"], rates)}

## The index

Files of 4 KiB; memory beyond what the process held before.

{table(["files", "", "seconds", "peak memory, MB"], indexed)}

From a folder of {asked.files // 10:,} pictures of 40 x 40 to images ready for training: {recheck[0]["first"]:.1f} s at first, {recheck[0]["again"]:.2f} s with nothing
changed, {recheck[0]["one_more"]:.2f} s with one more (one run).

## What else ran

The machine was shared: its load average was {min(load):.1f} to {max(load):.1f} on {os.cpu_count()} cores during the {seconds / 60:.0f} minutes that this took, so
what is above its own use made seconds longer; ways were measured in turns, so that this fell on all of them.
"""  # noqa: E501 - the lines of the page
    config: dict[str, object] = {
        "counts": counts,
        "megabytes": sizes,
        "files": asked.files,
        "repeats": asked.repeats,
        "warm_epochs": WARM_EPOCHS,
        "batch": BATCH,
    }
    raw = {"ways": runs, "texts": texts, "index": index, "recheck": recheck, "load_average": load, "seconds": seconds}
    print(write_measurement("ingest", figures, config, raw, markdown, asked.out))


if __name__ == "__main__":
    main()
