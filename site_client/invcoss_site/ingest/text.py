"""Reads reports as text: JSON lines, CSV and plain files, a damaged line costing that line only.

JSON lines hold `id` and `text`, or `sections` with a `text` each; CSV has columns `id` and `text`; a plain file is one
record and its name is its id. Everything is UTF-8.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from invcoss_site.ingest.sample import Finding, check_not_empty, unreadable, warning

SUFFIXES = (".jsonl", ".csv", ".txt")
MAX_CHARS = 20_000  # of a record; the rest is left out
MAX_LINE = 10_000_000  # bytes; what is longer is no record
MOST_REJECTED = 10_000  # lines of a file
_ALLOWED = "\t\n\r"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

csv.field_size_limit(MAX_LINE)


@dataclass(frozen=True)
class Record:
    """One text; `label` and `split` are empty if there is none."""

    id: str
    text: str
    label: str | int = ""
    split: str = ""


@dataclass(frozen=True)
class Texts:
    """The usable records of a file in its order, the lines that are not used, and those used with a warning."""

    records: tuple[Record, ...]
    rejected: tuple[Finding, ...]
    warnings: tuple[Finding, ...]


def read_texts(path: Path) -> Texts:
    """The texts in a file; raises UnreadableFile for one that has none or is of another kind."""
    check_not_empty(path)
    with path.open("rb") as file:
        if file.read(2) in _UTF16:
            raise unreadable(path, "not-this-format", "encoded as UTF-16; save it as UTF-8")
    readers: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
        ".jsonl": _json_lines,
        ".csv": _csv_rows,
        ".txt": _whole,
    }
    if path.suffix.lower() not in readers:
        raise unreadable(path, "not-this-format", f"texts are read from {', '.join(SUFFIXES)}; convert it")
    found: dict[str, Record] = {}
    rejected, warnings = [], []
    usual: type | None = None  # of the labels
    for number, raw in readers[path.suffix.lower()](path):
        where = f"line {number}"
        try:
            record = _record(raw, f"{path.stem}-{number}")
            if record.id in found:
                raise ValueError("its id was used before; give every record its own")
        except ValueError as error:
            rejected.append(Finding(path, f"{path}, {where}: {error}", "line"))
            if len(rejected) > MOST_REJECTED:
                text = f"more than {MOST_REJECTED:,} lines can't be used; first: {rejected[0].reason}"
                raise unreadable(path, "damaged", text) from None
            continue
        usual = usual or (type(record.label) if record.label != "" else None)
        if usual and record.label != "" and type(record.label) is not usual:
            text = f"{where}: its label {record.label!r} is of another type than the first one's"
            warnings.append(warning(path, "line", text))
        if len(record.text) > MAX_CHARS:
            text = f"{where}: {len(record.text):,} characters, cut after {MAX_CHARS:,}"
            warnings.append(warning(path, "line", text))
            record = replace(record, text=record.text[:MAX_CHARS])
        found[record.id] = record
    if not found:
        why = f"; first: {rejected[0].reason}" if rejected else ""
        raise unreadable(path, "empty", f"no usable text in this file{why}")
    return Texts(tuple(found.values()), tuple(rejected), tuple(warnings))


def _record(raw: object, own_name: str) -> Record:
    """A record of one line; raises ValueError that says what is wrong with it and what to do."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError("not an object with an id and a text; correct or remove it")
    text = raw.get("text")
    if text is None and isinstance(raw.get("sections"), list):
        parts = [part.get("text") for part in raw["sections"] if isinstance(part, dict)]
        text = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str):
        raise ValueError("no text; fill in `text`")
    if not text.strip():
        raise ValueError("the text is empty; fill it in or remove the line")
    if any(ord(letter) < 32 and letter not in _ALLOWED for letter in text):
        raise ValueError("the text has a control character such as NUL; remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("not UTF-8; save the file as UTF-8")
    name, label = raw.get("id"), raw.get("label")
    if label is not None and not isinstance(label, (str, int)):
        raise ValueError("its label is neither a word nor a number; correct it")
    if not f"{name}{label}{raw.get('split')}".isprintable():  # half a surrogate is not
        raise ValueError("its id, label or split has a control character, or is not UTF-8; correct it")
    return Record(
        own_name if name in (None, "") else str(name), text, "" if label is None else label, str(raw.get("split") or "")
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes | ValueError]]:
    """Lines, or what is wrong with them, with their numbers from 1."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield number, ValueError(f"longer than {MAX_LINE:,} bytes; remove it")
            elif not line.strip():
                yield number, ValueError("the line is blank; remove it")
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf")


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if isinstance(line, ValueError):
            yield number, line
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, ValueError("not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError):
            yield number, ValueError("not JSON; correct or remove it")


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if len(file.readline(MAX_LINE)) == MAX_LINE:
            raise unreadable(path, "not-this-format", f"its first line is longer than {MAX_LINE:,} bytes; correct it")
        file.seek(0)
        rows = csv.DictReader(file, restval="")
        try:
            if "text" not in (rows.fieldnames or ()):
                raise unreadable(path, "not-this-format", "has no column 'text'; its first line must name the columns")
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            yield rows.line_num, ValueError(f"not CSV ({error}); nothing after it was read")


def _whole(path: Path) -> Iterator[tuple[int, object]]:
    if path.stat().st_size > MAX_LINE:
        raise unreadable(path, "too-large", f"longer than {MAX_LINE:,} bytes; make it JSON lines")
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    yield 1, {"id": path.stem, "text": text}
