"""Turns a site's files into images ready for the model: read, scaled, sized and stored once; damaged ones quarantined.

What is stored is kept under the digests of an item's files and the settings, so a new case costs that case, and what
was found wrong with a file is known until the file changes. A 2-D picture is resized and centre-cropped to a square; a
volume is resized to the input, or, with a voxel size, kept whole but for the background around it, and used as
half-overlapping sub-volumes of the input size. N = images, C = channels.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.transforms import CenterSpatialCrop, CropForeground, SpatialPad

from invcoss_common.canonical import sha256_hex
from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import Geometry, Modality
from invcoss_site.batches import FOREGROUND
from invcoss_site.file_index import FileIndex, open_index
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.sample import Finding
from invcoss_site.ingest.values import Values, model_values, resample
from invcoss_site.inventory import Inventory, Item
from invcoss_site.sample_store import SHARD_BYTES, Entry, Float16s, SampleStore, StoredImages, open_store

RECIPE = 5  # raise it when the same files give other images or notes: what was stored is then not used
MARGIN = 1.5  # side of a stored training picture over the input's, so that random crops need little enlarging
BACKGROUND = 0.05  # what is darker at the edges of a volume is left out
THREADS = min(8, os.cpu_count() or 1)  # that read files
AHEAD = 2 * THREADS  # files read ahead of the one being stored, all in memory
LIMIT = "cache_gb in site.toml"

WRITE_EVERY_S = 60.0  # what was read is stored that often at least, in shards that are then smaller

OnFile = Callable[[int, int], None]
Read = tuple[Float16s | None, "Notes"]


@dataclass(frozen=True)
class SiteImages:
    """Training images (N, C, *stored) and held-out images (N, C, *input size), float16 in [0, 1], memory-mapped.

    `case_of` (N,) counts the cases of the training images from 0; `key` names exactly these files and settings.
    `axes` says how many volumes had which axes in their files, and names the first.
    """

    train: StoredImages
    heldout: StoredImages
    case_of: npt.NDArray[np.int32]
    key: str
    train_cases: int
    heldout_cases: int
    quarantined: tuple[Finding, ...]
    warnings: tuple[Finding, ...] = ()
    axes: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How files become images."""

    modality: Modality
    geometry: Geometry
    spacing_mm: tuple[float, float, float] | None

    def size(self, item: Item) -> tuple[int, ...]:
        """Size of the stored images of `item`; with a voxel size the least one."""
        return self.geometry.size if item.held_out else stored_size(self.geometry)

    def least_bytes(self, item: Item) -> int:
        """What `item` takes in the store: just that, but of a slide or with a voxel size more."""
        return 2 * self.geometry.channels * int(np.prod(self.size(item)))

    def key(self, item: Item, digests: Sequence[str]) -> str:
        """Name of what `item`, whose files have these digests, becomes."""
        rows = self.modality.model_dump(mode="json"), self.geometry.model_dump(mode="json")
        settings = [RECIPE, *rows, self.spacing_mm, self.size(item)]
        return _digest_of([settings, item.path.suffix.lower(), item.part, list(digests)])


def prepare(
    inventory: Inventory,
    modality: Modality,
    geometry: Geometry,
    spacing_mm: tuple[float, float, float] | None,
    cache: Path,
    on_file: OnFile | None = None,
    limit_bytes: int | None = None,
) -> SiteImages:
    """The images of `inventory`: from `cache`, and read from those files that are new or have changed.

    `on_file(done, of)` follows first the look at all files, then the reading. The cache holds `limit_bytes` at most.
    Raises DataError unless there are at least two training images and one held-out image of different cases, or when
    they don't fit into the cache.
    """
    recipe, tell = Recipe(modality, geometry, spacing_mm), on_file or (lambda _done, _of: None)
    folder = cache / "images"
    _remove_old(cache)
    with open_store(folder, limit_bytes) as store, open_index(folder / "files.sqlite") as index:
        keys = _keys(inventory.items, recipe, index, tell)
        known = [_find(store, item, key) for item, key in zip(inventory.items, keys, strict=True)]
        missing = [place for place, entry in enumerate(known) if entry is None]
        passing = _fill(store, index, inventory.items, keys, missing, recipe, tell)
        if missing:  # all again, for making room may have moved samples to other shards
            found = (_find(store, item, key) for item, key in zip(inventory.items, keys, strict=True))
            known = [passing.get(place, entry) for place, entry in enumerate(found)]
        return _together(inventory, keys, [entry for entry in known if entry], recipe, store.shards)


def stored_size(geometry: Geometry) -> tuple[int, ...]:
    """Size of a stored training image: larger than the input in 2-D, where batches crop."""
    if geometry.ndim == 2:
        return tuple(round(n * MARGIN) for n in geometry.size)
    return geometry.size


def _remove_old(cache: Path) -> None:
    """Remove what an earlier version kept: one array for each set of files."""
    for array in cache.glob("*/train.f16"):
        shutil.rmtree(array.parent)


def _digest_of(value: object) -> str:
    return sha256_hex(json.dumps(value, sort_keys=True).encode())


def _keys(items: Sequence[Item], recipe: Recipe, index: FileIndex, tell: OnFile) -> list[str]:
    """The key of each item, empty if a file can't be read or is being written to."""
    digests = index.digests(path for item in items for path in item.files)
    keys = []
    for done, item in enumerate(items, start=1):
        own = list(islice(digests, len(item.files)))
        keys.append(recipe.key(item, [one for one in own if one]) if all(own) else "")
        tell(done, len(items))
    if len(index) > sum(len(item.files) for item, key in zip(items, keys, strict=True) if key):
        index.forget_missing()
    return keys


def _find(store: SampleStore, item: Item, key: str) -> Entry | None:
    return store.find(key, _named(item, key)) if key else None


def _named(item: Item, key: str) -> str:
    """The key of what is known of just this item: findings name its files, which others may hold the same as."""
    return _digest_of([key, *map(str, item.files), item.part])


def _fill(
    store: SampleStore,
    index: FileIndex,
    items: Sequence[Item],
    keys: Sequence[str],
    missing: Sequence[int],
    recipe: Recipe,
    tell: OnFile,
) -> dict[int, Entry]:
    """Read the items in the places `missing` and store them; what must not be remembered comes back, by place."""
    passing: dict[int, Entry] = {}
    left, taken, written_at = sum(recipe.least_bytes(items[place]) for place in missing), 0, time.monotonic()
    store.make_room(left, left, LIMIT)
    results = _ahead(_reader(recipe), [items[place] for place in missing])
    for done, (place, (images, notes)) in enumerate(zip(missing, results, strict=True), start=1):
        item, key = items[place], keys[place]
        if key and all(index.is_known(path) for path in item.files):
            store.add(_named(item, key) if notes.quarantined or notes.warnings else key, images, notes.as_json())
            taken += 0 if images is None else images.nbytes
        else:
            text = f"{item.path}: changes while it is read; wait until it is copied, then start again"
            changing = Notes(quarantined=(Finding(item.path, text, "damaged"),))
            passing[place] = Entry("", "", (), (notes if images is None else changing).as_json())
        left -= recipe.least_bytes(item)
        due = store.waiting_bytes >= SHARD_BYTES or time.monotonic() - written_at > WRITE_EVERY_S
        if due or done == len(missing):
            others = max(left, taken // done * (len(missing) - done))  # like those so far
            store.make_room(store.waiting_bytes + left, store.waiting_bytes + others, LIMIT)
            store.write()
            written_at = time.monotonic()
        tell(done, len(missing))
    return passing


@dataclass(frozen=True)
class Notes:
    """What is known of an item beside its values: why it isn't used, what is odd about it, a volume's axes.

    `starts` are the first voxels (D, H, W) of the sub-volumes that aren't empty.
    """

    quarantined: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    axes: str = ""
    starts: tuple[tuple[int, ...], ...] = ()

    def as_json(self) -> dict[str, object]:
        return {
            "quarantined": [[str(one.path), one.reason, one.kind] for one in self.quarantined],
            "warnings": [[str(one.path), one.reason, one.kind] for one in self.warnings],
            "axes": self.axes,
            "starts": self.starts,
        }


def _notes(entry: Entry) -> Notes:
    """The notes of a stored item."""
    found: Any = entry.notes
    quarantined, warnings = (
        tuple(Finding(Path(path), reason, kind) for path, reason, kind in found[name])
        for name in ("quarantined", "warnings")
    )
    return Notes(quarantined, warnings, found["axes"], tuple(map(tuple, found["starts"])))


def _reader(recipe: Recipe) -> Callable[[Item], Read]:
    """A function that reads an item: its images (N, C, *spatial), None if it can't be used, and its notes."""
    modality, spacing_mm = recipe.modality, recipe.spacing_mm

    def read(item: Item) -> Read:
        try:
            samples = read_samples(item.files, modality, item.part)
            images = [model_values(sample, modality, spacing_mm) for sample in samples]
        except UnreadableFile as error:
            return None, Notes(quarantined=(Finding(item.path, str(error), error.kind),))
        starts: list[tuple[int, ...]] = []
        if spacing_mm is None:
            images = [sized(image, recipe.size(item)) for image in images]
        else:
            (volume,) = images
            images = [without_background(volume, recipe.geometry.size)]
            starts = sub_volumes(images[0], recipe.geometry.size)
        warnings = dict.fromkeys(one for sample in samples for one in sample.warnings)  # once for all tiles of a slide
        return np.stack(images, dtype=np.float16), Notes((), tuple(warnings), samples[0].axes, tuple(starts))

    return read


def _ahead(read: Callable[[Item], Read], items: Sequence[Item]) -> Iterator[Read]:
    """What `read` makes of each item, in order, read by threads a little ahead."""
    with ThreadPoolExecutor(THREADS) as threads:
        waiting = deque(threads.submit(read, item) for item in items[:AHEAD])
        for following in range(AHEAD, len(items) + AHEAD):
            if not waiting:
                return
            yield waiting.popleft().result()
            if following < len(items):
                waiting.append(threads.submit(read, items[following]))


def _together(
    inventory: Inventory, keys: Sequence[str], entries: Sequence[Entry], recipe: Recipe, shards: Path
) -> SiteImages:
    """What is known of all items of the inventory, as one."""
    used: dict[bool, list[tuple[Item, Entry]]] = {False: [], True: []}
    quarantined, warnings = list(inventory.rejected), list[Finding]()
    axes: dict[str, tuple[int, str]] = {}
    for item, entry in zip(inventory.items, entries, strict=True):
        notes = _notes(entry)
        quarantined += notes.quarantined
        warnings += notes.warnings
        if notes.axes:
            count, first = axes.get(notes.axes, (0, str(item.path)))
            axes[notes.axes] = count + 1, first
        if entry.shard:
            used[item.held_out].append((item, entry))
    train, heldout = ([entry for _, entry in used[side]] for side in (False, True))
    number_of: dict[str, int] = {}
    case_of = [
        number_of.setdefault(item.case, len(number_of)) for item, entry in used[False] for _ in _places(entry, recipe)
    ]
    held_out_images = sum(len(_places(entry, recipe)) for entry in heldout)
    if len(case_of) < 2 or held_out_images < 1:
        first = f"; first of {len(quarantined)} rejected: {quarantined[0].reason}" if quarantined else ""
        raise DataError(
            f"{len(case_of)} training and {held_out_images} held-out images are usable, but at least 2 and 1, of "
            f"different cases, are needed; add cases, or say in an index which are held out{first}"
        )
    return SiteImages(
        _mapped(train, recipe, stored_size(recipe.geometry), shards),
        _mapped(heldout, recipe, recipe.geometry.size, shards),
        np.array(case_of, dtype=np.int32),
        _digest_of([[key, item.case, item.held_out] for key, item in zip(keys, inventory.items, strict=True)])[:32],
        len(number_of),
        len({item.case for item, _ in used[True]}),
        tuple(quarantined),
        tuple(warnings),
        axes,
    )


def _places(entry: Entry, recipe: Recipe) -> list[tuple[int, ...]]:
    """Of each image of an entry its number in the tensor and its first voxel."""
    starts = _notes(entry).starts
    if starts:
        return [(0, *start) for start in starts]
    return [(number, *[0] * recipe.geometry.ndim) for number in range(entry.shape[0])]


def _mapped(entries: Sequence[Entry], recipe: Recipe, size: tuple[int, ...], shards: Path) -> StoredImages:
    number_of: dict[str, int] = {}
    tensors = [(number_of.setdefault(entry.shard, len(number_of)), entry.key) for entry in entries]
    places = [(number, *place) for number, entry in enumerate(entries) for place in _places(entry, recipe)]
    return StoredImages(
        [shards / name for name in number_of],
        tensors,
        np.array(places, dtype=np.int32),
        recipe.geometry.channels,
        size,
        are_parts=recipe.spacing_mm is not None,
    )


def sized(image: Values, size: tuple[int, ...]) -> Values:
    """`image` (C, *spatial) as (C, *size): a picture's centre square, a whole volume."""
    return _square(image, size) if len(size) == 2 else resample(image, size)


def _square(image: Values, size: tuple[int, ...]) -> Values:
    """Shorter side to `size`, then the centre; resizes the centre only, so that extreme shapes cost nothing."""
    side = min(image.shape[1:])
    centre = np.asarray(CenterSpatialCrop((side, side))(image), dtype=np.float32)
    return resample(np.ascontiguousarray(centre), size)


def without_background(volume: Values, size: tuple[int, ...]) -> Values:
    """`volume` (C, D, H, W) cropped to what is brighter than BACKGROUND, then padded with zeros to `size` at least."""
    bright = volume > BACKGROUND
    cropped = CropForeground(select_fn=lambda _: bright, allow_smaller=True)(volume) if bright.any() else volume
    return np.ascontiguousarray(SpatialPad(size)(cropped), dtype=np.float32)


def sub_volumes(volume: Values, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """First voxels of the half-overlapping windows of `size` that cover `volume` and aren't empty; of one at least."""
    starts = list(product(*(_starts(extent, wanted) for extent, wanted in zip(volume.shape[1:], size, strict=True))))

    def spread(start: tuple[int, ...]) -> float:
        return float(volume[(slice(None), *(slice(at, at + n) for at, n in zip(start, size, strict=True)))].std())

    return [start for start in starts if spread(start) >= FOREGROUND] or [starts[len(starts) // 2]]


def _starts(extent: int, wanted: int) -> list[int]:
    """First indices of windows of length `wanted` that cover `extent` evenly, overlapping by about half."""
    count = max(1, -(-2 * (extent - wanted) // wanted) + 1)
    return sorted({round(start) for start in np.linspace(0, extent - wanted, count)})
