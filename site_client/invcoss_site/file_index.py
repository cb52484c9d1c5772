"""What each of a site's files holds, as a digest: taken once, and again only when size, time or inode have changed.

The index is a SQLite file in the site's private cache. What it has committed a kill leaves as it is.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from invcoss_common.canonical import sha256_file

COMMIT_EVERY_S = 2.0  # of hashing lost by a kill, at most, or one large file
THREADS = 8  # waiting for a disk is most of the work
CHUNK = 2048  # files in memory at a time
_PART = 64  # files that one thread looks at before it asks for more

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    digest TEXT NOT NULL
) WITHOUT ROWID
"""


class Stamp(NamedTuple):
    """By what a change of a file is noticed without reading it."""

    size: int
    mtime_ns: int
    inode: int


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file, None where there is none that can be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1))  # SQLite's numbers are signed


@contextmanager
def open_index(file: Path) -> Iterator[FileIndex]:
    """The index in the SQLite file `file` (0600, in a folder 0700)."""
    with closing(open_database(file, _SCHEMA)) as database:
        yield FileIndex(database)


class FileIndex:
    """The digests of files; `open_index` opens one."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def digests(self, paths: Iterable[Path]) -> Iterator[str | None]:
        """The sha256 of each file in order; None for one that can't be read, or that changes meanwhile.

        `paths` are taken a few thousand at a time, so memory doesn't grow with their number.
        """
        remaining = iter(paths)
        with ThreadPoolExecutor(THREADS) as threads:
            while some := list(islice(remaining, CHUNK)):
                yield from self._digests(some, threads)

    def _digests(self, paths: list[Path], threads: ThreadPoolExecutor) -> list[str | None]:
        stamps = _stamps(paths, threads)
        found = [self._known(path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
        new = [place for place, digest in enumerate(found) if digest is None and stamps[place] is not None]
        committed = time.monotonic()
        for place, digest in zip(new, threads.map(_digest, [paths[place] for place in new]), strict=True):
            stamp = stamps[place]
            if digest is None or stamp is None or stamp_of(paths[place]) != stamp:
                continue
            found[place] = digest
            row = (os.fsencode(paths[place]), *stamp, digest)
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)
            if time.monotonic() - committed > COMMIT_EVERY_S:
                self._database.commit()
                committed = time.monotonic()
        self._database.commit()
        return found

    def is_known(self, path: Path) -> bool:
        """Whether a file is still as it was when its digest was taken."""
        return self._known(path, stamp_of(path)) is not None

    def _known(self, path: Path, stamp: Stamp | None) -> str | None:
        if stamp is None:
            return None
        row = self._database.execute(
            "SELECT digest FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?",
            (os.fsencode(path), *stamp),
        ).fetchone()
        return None if row is None else str(row[0])

    def __len__(self) -> int:
        """How many files are known."""
        (count,) = self._database.execute("SELECT count(*) FROM files").fetchone()
        return int(count)

    def forget_missing(self) -> None:
        """Drop the files that are no longer there."""
        last = b""
        with ThreadPoolExecutor(THREADS) as threads:
            while rows := self._database.execute(
                "SELECT path FROM files WHERE path > ? ORDER BY path LIMIT ?", (last, CHUNK)
            ).fetchall():
                last = rows[-1][0]
                stamps = _stamps([Path(os.fsdecode(path)) for (path,) in rows], threads)
                gone = [row for row, stamp in zip(rows, stamps, strict=True) if stamp is None]
                self._database.executemany("DELETE FROM files WHERE path = ?", gone)
                self._database.commit()


def _stamps(paths: list[Path], threads: ThreadPoolExecutor) -> list[Stamp | None]:
    parts = [paths[first : first + _PART] for first in range(0, len(paths), _PART)]
    return list(chain.from_iterable(threads.map(lambda part: [stamp_of(path) for path in part], parts)))


def _digest(path: Path) -> str | None:
    with suppress(OSError):
        return sha256_file(path)
    return None


def open_database(file: Path, schema: str) -> sqlite3.Connection:
    """A private SQLite file, made if need be. One that is damaged is begun anew: all in it can be found again."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(file, os.O_CREAT, 0o600))  # SQLite gives its log the same mode
    database = sqlite3.connect(file, timeout=60)
    try:
        # A commit is then one sync of one file, and without shared memory this works on a network's disk too.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(schema)
        if database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return database
    except sqlite3.OperationalError:  # locked, or no room: no damage
        raise
    except sqlite3.DatabaseError:
        pass
    database.close()
    for ending in ("", "-wal"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    return open_database(file, schema)
