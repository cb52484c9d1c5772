"""Prepared images on disk: packed into shards of safetensors, found by key in a SQLite file, mapped when they are used.

A shard is written whole, synced and renamed before the database names it, and never changed: a kill loses the one that
was being written. Where room is short, samples that nobody asked for this time go first, those unused longest ahead.
N = images, C = channels.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from invcoss_common.errors import DataError
from invcoss_common.weights import write_tensors
from invcoss_site.file_index import open_database

Float16s = npt.NDArray[np.float16]
Notes = Mapping[str, object]  # what is to be known of a sample beside its values, as JSON

SHARD_BYTES = 128 * 2**20
KEEP_FREE_BYTES = 2**30  # of the disk, for everybody else

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    key TEXT PRIMARY KEY, shard TEXT NOT NULL, shape TEXT NOT NULL, notes TEXT NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Entry:
    """A sample that is known: its shard, empty if it has no values, the shape of its tensor, and its notes."""

    key: str
    shard: str
    shape: tuple[int, ...]
    notes: Notes


@contextmanager
def open_store(folder: Path, limit_bytes: int | None = None) -> Iterator[SampleStore]:
    """The store in `folder` (0700), for one process at a time: another one waits. Whatever happens, it is let go.

    All its shards together hold `limit_bytes` at most, and leave KEEP_FREE_BYTES of the disk; None: only the latter.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "shards").mkdir(mode=0o700, exist_ok=True)
    with os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with closing(open_database(folder / "samples.sqlite", _SCHEMA)) as database:
            store = SampleStore(folder / "shards", limit_bytes, database)
            try:
                yield store
            finally:
                store.finish()


class SampleStore:
    """An open store; `open_store` opens one."""

    def __init__(self, shards: Path, limit_bytes: int | None, database: sqlite3.Connection) -> None:
        self.shards, self.limit_bytes, self._database = shards, limit_bytes, database
        self._waiting: dict[str, tuple[Float16s | None, Notes]] = {}
        self.waiting_bytes = 0
        (last,) = self._database.execute("SELECT coalesce(max(used), 0) FROM samples").fetchone()
        self._turn = last + 1  # number of samples that were asked for since the store was opened
        self._asked: dict[str, int] = {}  # and what number they had
        self._tidy()

    def _tidy(self) -> None:
        """Forget samples whose shard is gone, and remove files that no sample is in, such as a kill leaves."""
        there = {path.name: path for path in self.shards.iterdir()}
        named = {name for (name,) in self._database.execute("SELECT DISTINCT shard FROM samples WHERE shard != ''")}
        self._database.executemany("DELETE FROM samples WHERE shard = ?", [(name,) for name in named - there.keys()])
        self._database.commit()
        for name in there.keys() - named:
            there[name].unlink()

    def find(self, *keys: str) -> Entry | None:
        """The sample under the first of `keys` that is known; it will not have to make room for others."""
        for key in keys:
            row = self._database.execute(
                "SELECT shard, shape, notes, used FROM samples WHERE key = ?", (key,)
            ).fetchone()
            if row:
                self._asked[key] = row[3]
                return Entry(key, row[0], tuple(json.loads(row[1])), json.loads(row[2]))
        return None

    def finish(self) -> None:
        """Write down which samples were asked for, unless they are the latest as it is."""
        numbers = self._asked.values()
        if min(numbers, default=self._turn) < max([self._turn - 1, *numbers]):
            self._note_asked()
        self._database.commit()

    def _note_asked(self) -> None:
        self._database.executemany(
            "UPDATE samples SET used = ? WHERE key = ?", [(self._turn, key) for key in self._asked]
        )

    def add(self, key: str, images: Float16s | None, notes: Notes) -> None:
        """Take a sample (N, C, *spatial), or the mere notes on one, to be written with the next shard."""
        if key not in self._waiting:  # of files that hold the same
            self._waiting[key] = images, notes
            self.waiting_bytes += 0 if images is None else images.nbytes

    def write(self) -> None:
        """Write what was added as one shard. The caller has made room for it."""
        tensors = {key: torch.from_numpy(images) for key, (images, _) in self._waiting.items() if images is not None}
        name = f"{uuid.uuid4().hex}.safetensors" if tensors else ""
        if tensors:
            write_tensors(self.shards / name, tensors)
        rows = [
            (key, name if images is not None else "", json.dumps([] if images is None else images.shape), notes)
            for key, (images, notes) in self._waiting.items()
        ]
        self._database.executemany(
            "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)",
            [(*row, json.dumps(notes), self._turn) for *row, notes in rows],
        )
        self._database.commit()
        self._waiting.clear()
        self.waiting_bytes = 0

    def make_room(self, least: int, likely: int, setting: str) -> None:
        """See to it that `least` more bytes may be written; samples that weren't asked for go as far as they must.

        Raises DataError that names `setting`, and `likely`, what is needed by all that is known.
        """
        if self._room() < least:
            self._note_asked()
            for shard in self._dispensable():
                if self._room() >= least:
                    break
                self._drop(shard)
        if least and self._room() < least:
            held, most = self._held(), self._held() + self._room()
            of_disk = self.limit_bytes is None or most < self.limit_bytes
            remedy = f"free space on the disk of {self.shards}" if of_disk else f"raise {setting}"
            raise DataError(
                f"the prepared images need about {(held + likely) / 1e9:.3g} GB, and {max(most, 0) / 1e9:.3g} GB may "
                f"be used; {remedy}, or use fewer images"
            )

    def _held(self) -> int:
        return sum(path.stat().st_size for path in self.shards.iterdir())

    def _room(self) -> int:
        free = shutil.disk_usage(self.shards).free - KEEP_FREE_BYTES
        return free if self.limit_bytes is None else min(free, self.limit_bytes - self._held())

    def _dispensable(self) -> list[str]:
        """Shards with samples that weren't asked for: mostly those first, and of them those unused longest."""
        rows = self._database.execute(
            "SELECT shard, avg(used = :turn) > 0.5 AS live, max(CASE WHEN used < :turn THEN used END) AS last "
            "FROM samples WHERE shard != '' GROUP BY shard HAVING last IS NOT NULL ORDER BY live, last",
            {"turn": self._turn},
        )
        return [shard for shard, _, _ in rows.fetchall()]

    def _drop(self, shard: str) -> None:
        """Remove the samples of a shard that weren't asked for; the others move to a new one."""
        path = self.shards / shard
        rows = self._database.execute("SELECT key FROM samples WHERE shard = ? AND used = ?", (shard, self._turn))
        kept = [key for (key,) in rows.fetchall()]
        if kept:
            name = f"{uuid.uuid4().hex}.safetensors"
            with safe_open(path, framework="pt") as file:
                write_tensors(self.shards / name, {key: file.get_tensor(key) for key in kept})
            moved = [(name, key) for key in kept]
            self._database.executemany("UPDATE samples SET shard = ? WHERE key = ?", moved)
        self._database.execute("DELETE FROM samples WHERE shard = ?", (shard,))
        self._database.commit()
        path.unlink()


class StoredImages:
    """Images (N, C, *size) float16 in the shards of a store, mapped: rows by number, slice or list, as of an array.

    Row i is the part of `size` that begins at voxel `places[i, 2:]` of image `places[i, 1]` of tensor `places[i, 0]`,
    which is `tensors[places[i, 0]]`: the number of its shard and its name. `are_parts` says that images are larger than
    that. All shards are opened at once, so that they can be used after they were removed. A pickle maps the same files
    again, in another process. Raises DataError for a shard that isn't as it was written.
    """

    dtype = np.dtype(np.float16)

    def __init__(
        self,
        shards: Sequence[Path],
        tensors: Sequence[tuple[int, str]],
        places: npt.NDArray[np.int32],
        channels: int,
        size: tuple[int, ...],
        are_parts: bool = False,
    ) -> None:
        self.are_parts = are_parts
        self._shards, self._tensors, self._places = tuple(shards), tuple(tensors), places
        self._files = [_opened(path) for path in shards]
        self.shape = (len(places), channels, *size)

    def __reduce__(self) -> tuple[type[StoredImages], tuple[object, ...]]:
        _, channels, *size = self.shape
        return StoredImages, (self._shards, self._tensors, self._places, channels, tuple(size), self.are_parts)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: int | slice | Sequence[int] | npt.NDArray[np.integer]) -> Float16s:
        """One image (C, *size), a view of its file; of several rows a copy (n, C, *size)."""
        if isinstance(rows, (int, np.integer)):
            image, start = self._whole(int(rows))
            return self._part(image, start)
        places = np.arange(len(self))[rows]
        out: Float16s = np.empty((len(places), *self.shape[1:]), np.float16)
        for place, row in enumerate(places):
            out[place] = self[int(row)]
        return out

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def around(self, row: int, shift: Sequence[float]) -> Float16s:
        """Row `row`, its begin moved within its image by `shift` (each in [-1, 1]) times a quarter of its size.

        A quarter is half of the stride of half-overlapping windows.
        """
        image, start = self._whole(row)
        size = self.shape[2:]
        moved = [
            min(max(begin + round(part * extent / 4), 0), whole - extent)
            for begin, part, extent, whole in zip(start, shift, size, image.shape[1:], strict=True)
        ]
        return self._part(image, moved)

    def _whole(self, row: int) -> tuple[Float16s, list[int]]:
        """The image (C, *spatial) that a row is a part of, and where the row begins in it."""
        tensor, number, *start = self._places[row].tolist()
        shard, name = self._tensors[tensor]
        stored: torch.Tensor = self._files[shard].get_tensor(name)  # type: ignore[no-untyped-call]
        image: Float16s = stored[number].numpy()
        return image, start

    def _part(self, image: Float16s, start: Sequence[int]) -> Float16s:
        size = self.shape[2:]
        return image[(slice(None), *(slice(at, at + n) for at, n in zip(start, size, strict=True)))]


def _opened(shard: Path) -> safe_open:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        folder = shard.parent.parent
        raise DataError(f"{shard}: can't be used ({error}); delete the folder {folder}, it is made again") from None
