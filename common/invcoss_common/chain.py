"""Append-only records: a text file of one JSON object a line, chained by sha256 and signed (docs/records.md).

Every record names its number, its time (UTC), its kind and the digest of the line before it, and where its owner has a
key, ends in a signature over all that. Nothing can be altered, removed, put in or exchanged unnoticed, but the newest
records can be cut off by who may write the file: against that, write the head down somewhere else.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from invcoss_common.canonical import canonical_json, sha256_hex
from invcoss_common.errors import ChainError, CredentialError
from invcoss_common.keys import check_signature, sign

RECORD = "record"  # kind of signed document
MAX_LINE_BYTES = 64 << 10
OWN = frozenset({"n", "time", "previous", "chain", "cut", "signature"})  # what the chain itself puts into a record

Value = str | int | list[str]  # no fractions: their text differs from one program to the next
Record = dict[str, Any]


class Head(NamedTuple):
    """The newest record of a chain: its number, and the sha256 of its line without the newline."""

    n: int
    digest: str

    def __str__(self) -> str:
        return f"{self.n}:{self.digest}"


NOTHING = Head(0, "0" * 64)


@dataclass(frozen=True)
class Verified:
    """What was found to hold: the chain's name and head, the times of its first and newest record.

    Without `signed`, no key was given: whoever may write the file may have made all of it anew.
    """

    name: str
    head: Head
    first: str
    newest: str
    signed: bool


def now() -> str:
    """The time of a record: UTC in ISO form, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def parse_head(text: str) -> Head:
    """A head as `str` writes it, N:DIGEST; raises ChainError."""
    if not re.fullmatch(r"[1-9][0-9]{0,17}:[0-9a-f]{64}", text):
        raise ChainError("not a head: give it as it was shown, N:DIGEST")
    n, digest = text.split(":")
    return Head(int(n), digest)


@contextmanager
def writing(path: Path, name: str, key: Ed25519PrivateKey | None) -> Iterator[Writer]:
    """Open the chain in `path` to add records, while no other process does; `name` is in the first record of a new one.

    Raises ChainError when what is there is no chain, OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Writer(path, descriptor, name, key)
    finally:
        os.close(descriptor)


class Writer:
    """Adds records to an open chain; `last` is the newest one, empty when there is none."""

    def __init__(self, path: Path, descriptor: int, name: str, key: Ed25519PrivateKey | None) -> None:
        self._path, self._descriptor, self._name, self._key = path, descriptor, name, key
        self.last: Record = {}
        self.head = NOTHING
        size = os.fstat(descriptor).st_size
        begin = max(0, size - 2 * MAX_LINE_BYTES - 2)
        tail = os.pread(descriptor, size - begin, begin)
        end = tail.rfind(b"\n") + 1
        self._end = begin + end  # behind it is what a writer was killed within
        if begin and not end:
            raise ChainError(f"{path}: ends in no record; move it away, and keep it")
        if end:
            line = tail[tail.rfind(b"\n", 0, end - 1) + 1 : end - 1]
            self.last = parse(line, f"{path}: the last line")
            self.head = Head(self.last["n"], sha256_hex(line))

    def add(self, kind: str, values: Mapping[str, Value], time: str = "") -> Head:
        """Add a record, on disk when this returns; `time` is now, unless given. Raises OSError.

        What a killed writer left of a line is written over and cut off, in this order: there is no instant at which
        that it was cut off (`cut` bytes) is not in the record that is there, or the rest still is.
        """
        record: Record = {"n": self.head.n + 1, "time": time or now(), "kind": kind, "previous": self.head.digest}
        assert not (OWN | {"kind"}) & values.keys()
        record.update(values)
        if not self.last:
            record["chain"] = self._name
        if cut := os.fstat(self._descriptor).st_size - self._end:
            record["cut"] = cut
        if self._key is not None:
            record["signature"] = sign(self._key, RECORD, canonical_json(record))
        line = canonical_json(record)
        assert len(line) <= MAX_LINE_BYTES
        _write(self._descriptor, line + b"\n", self._end)
        os.ftruncate(self._descriptor, self._end + len(line) + 1)
        os.fsync(self._descriptor)
        if not self.last:
            _sync_folder(self._path.parent)
        self._end += len(line) + 1
        self.last, self.head = record, Head(record["n"], sha256_hex(line))
        return self.head


def records(path: Path) -> Iterator[Record]:
    """Every record of the chain in `path`, unverified, but for one that is not complete; raises ChainError."""
    for number, line in _lines(path):
        if line.endswith(b"\n"):
            yield parse(line[:-1], f"line {number}")


def verify(path: Path, keys: Sequence[Ed25519PublicKey] = (), head: Head | None = None) -> Verified:
    """Check every line of the chain in `path`, and that `head`, if known, is in it.

    Each record must have the signature of one of `keys`: several where the owner's key was changed; without keys no
    signature is looked at. Raises ChainError with the line and what is wrong with it.
    """
    current = NOTHING
    first: Record = {}
    record: Record = {}
    for number, line in _lines(path):
        where, before = f"line {number}", f"line {number - 1}"
        if not line.endswith(b"\n"):
            raise ChainError(f"{where} is torn: its writer was killed, or its end was cut off")
        record = parse(line[:-1], where)
        if record["n"] > number:
            raise ChainError(f"{where} is record {record['n']}: what stood before it was deleted or exchanged")
        if record["n"] < number:
            raise ChainError(f"{where} is record {record['n']}: it was inserted or exchanged")
        if record["previous"] != current.digest:
            raise ChainError(f"{where} does not follow {before}: one of them was altered, inserted or exchanged")
        if keys:
            _check_signature(record, keys, where)
        current, first = Head(number, sha256_hex(line[:-1])), first or record
        if head is not None and head.n == number and head != current:
            raise ChainError(f"{where} is not the record of the known head: the chain was made anew")
    if not current.n:
        raise ChainError(f"{path}: no record in it")
    if head is not None and head.n > current.n:
        raise ChainError(f"{path} is truncated: it ends with record {current.n}, but record {head.n} is known")
    return Verified(str(first.get("chain", "")), current, first["time"], record["time"], bool(keys))


def parse(line: bytes, where: str) -> Record:
    """A record from its line without the newline; raises ChainError unless it is one, in the form it was written in."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if (
            isinstance(record, dict)
            and canonical_json(record) == line
            and type(record.get("n")) is int
            and all(isinstance(record.get(name), str) for name in ("time", "kind", "previous"))
        ):
            return record
    raise ChainError(f"{where} is not a record in the form it was written in: it was altered or damaged")


def _check_signature(record: Record, keys: Sequence[Ed25519PublicKey], where: str) -> None:
    signature = record.get("signature")
    if not isinstance(signature, str):
        raise ChainError(f"{where} is not signed")
    content = canonical_json({name: value for name, value in record.items() if name != "signature"})
    for key in keys:
        with suppress(CredentialError):
            check_signature(key, RECORD, content, signature, "its writer")
            return
    raise ChainError(f"{where} does not have the signature of the key: it was altered, or signed with another key")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their newline, up to where the file ended at first: others may be added meanwhile."""
    try:
        with path.open("rb") as file:
            left, number = _size(file), 0
            while left > 0:
                line, number = file.readline(min(left, MAX_LINE_BYTES + 2)), number + 1
                if len(line) > MAX_LINE_BYTES + 1:
                    raise ChainError(f"line {number} is longer than any record")
                if not line:
                    return
                yield number, line
                left -= len(line)
    except OSError as error:
        raise ChainError(f"{path}: can't read it ({error.strerror})") from None


def _size(file: BinaryIO) -> int:
    fcntl.flock(file, fcntl.LOCK_SH)  # not within a line that is being written
    try:
        return os.fstat(file.fileno()).st_size
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _write(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _sync_folder(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
