"""Canonical JSON, digests, atomic files and folders: the habits that everything recorded or sent relies on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, no NaN: equal values give equal bytes. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(text: str, most: int = 300) -> str:
    """`text` as one line of at most `most` characters, whatever somebody else put into it."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `path` so that a kill at any instant leaves the old content or the new, never a part."""
    with new_file(path, mode) as draft:
        draft.write_bytes(data)


@contextmanager
def new_file(path: Path, mode: int = 0o600) -> Iterator[Path]:
    """Write a draft that becomes the file `path` at the end, for what is too large for `write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    draft = Path(temporary)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        rename(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def rename(source: Path, path: Path) -> None:
    """Give a file of the same file system the name `path`, so that it has it after a power cut too."""
    source.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a draft that becomes the folder `path` (0700) at the end: a kill at any instant leaves no `path`, or all.

    Raises FileExistsError when `path` is there, BlockingIOError while another process makes it; a draft that was left
    behind is removed.
    """
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    draft = path.with_name(f".{path.name}.unfinished")
    try:
        fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            raise FileExistsError(f"{path} exists")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        yield draft
        draft.rename(path)
        os.fsync(parent)
    finally:
        os.close(parent)
