"""Signed documents and chains as they are forged by who lacks the key."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st
from tests.security.fuzzing.mutations import Json, Strategy, altered_json

from invcoss_common.canonical import canonical_json, sha256_hex
from invcoss_common.chain import RECORD
from invcoss_common.keys import sign

BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@st.composite
def altered_envelope(
    draw: st.DrawFn, originals: Sequence[bytes], contents: Strategy, stranger: Ed25519PrivateKey, kind: str
) -> bytes:
    """A signature and, behind its line, a document that it is not of; or another text of the same signature."""
    signature, _, content = draw(st.sampled_from(originals)).partition(b"\n")
    raw = base64.b64decode(signature)
    match draw(st.integers(0, 3)):
        case 0:
            return signature + b"\n" + draw(contents)
        case 1:
            content = draw(contents)
            return sign(stranger, kind, content).encode() + b"\n" + content
        case 2:
            other = draw(st.sampled_from(originals)).partition(b"\n")[0]
            return other + b"\n" + content
        case _:
            last = BASE64[BASE64.index(signature[-3]) ^ 1 :][:1]  # its lowest bits are in no byte of the signature
            texts = (signature[:-3] + last + signature[-2:], signature[:-2], signature + b"=", b" " + signature, b"")
            others = (base64.b16encode(raw), base64.urlsafe_b64encode(raw).replace(b"A", b"-"))
            return draw(st.sampled_from((*texts, *others))) + b"\n" + content


def chain_changes(lines: Sequence[bytes], stranger: Ed25519PrivateKey) -> Iterator[tuple[str, list[bytes]]]:
    """Everything that can be done to a line of a chain, or to two, at every position: what was done, all lines then."""
    for at, line in enumerate(lines):
        before, after = lines[:at], lines[at + 1 :]
        record = json.loads(line)
        yield "deleted", [*before, *after]
        yield "cut off", [*before]
        yield "torn", [*before, line[: len(line) // 2]]
        for name, value in record.items():
            edited = {**record, name: value + 1 if isinstance(value, int) else [] if isinstance(value, list) else "x"}
            removed = {other: value for other, value in record.items() if other != name}
            for changed in (edited, removed, {**edited, "signature": _signature(stranger, edited)}):
                yield "edited", [*before, canonical_json(changed) + b"\n", *after]
        for spelt in (json.dumps(record, sort_keys=True).encode() + b"\n", line[:-1] + b"\r\n", b" " + line):
            yield "edited", [*before, spelt, *after]
        for other in range(at):
            yield "swapped", [*lines[:other], line, *lines[other + 1 : at], lines[other], *after]
    for at in range(len(lines) + 1):
        previous = sha256_hex(lines[at - 1][:-1]) if at else "0" * 64
        forged = {**json.loads(lines[at - 1]), "n": at + 1, "previous": previous}
        signed = {**forged, "signature": _signature(stranger, forged)}
        for line in (lines[at - 1], lines[0], canonical_json(forged) + b"\n", canonical_json(signed) + b"\n", b"\n"):
            yield "inserted", [*lines[:at], line, *lines[at:]]


def _signature(key: Ed25519PrivateKey, record: dict[str, Json]) -> str:
    return sign(key, RECORD, canonical_json({name: value for name, value in record.items() if name != "signature"}))


@st.composite
def altered_chain(draw: st.DrawFn, lines: Sequence[bytes], stranger: Ed25519PrivateKey) -> bytes:
    """A chain with lines removed, repeated, moved, altered, or made anew from some line on by somebody else."""
    altered = list(lines)
    for _ in range(draw(st.integers(1, 3))):
        at, to = draw(st.integers(0, len(altered) - 1)), draw(st.integers(0, len(altered)))
        match draw(st.integers(0, 6)):
            case 0 if len(altered) > 1:
                del altered[at]
            case 1:
                altered.insert(to, altered[at])
            case 2:
                altered.insert(min(to, len(altered) - 1), altered.pop(at))
            case 3:
                altered[at] = draw(altered_json([altered[at]])) + b"\n" if _is_json(altered[at]) else b"\n"
            case 4:
                altered = altered[:to] or altered
            case 5:
                altered = [*altered[:at], *_made_anew(altered[at:], sha256_hex(altered[at - 1][:-1]), at, stranger)]
            case _:
                altered[at] = altered[at][:-1] + draw(st.sampled_from((b"", b"\r\n", b"\n\n", b" \n", b"\0\n")))
    return b"".join(altered)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _made_anew(lines: list[bytes], previous: str, after: int, key: Ed25519PrivateKey) -> Iterator[bytes]:
    """The records in `lines`, as whoever may write the file chains and signs them behind `after` others."""
    for number, line in enumerate(filter(_is_json, lines), start=after + 1):
        content = json.loads(line)
        record = {**(content if isinstance(content, dict) else {}), "n": number, "previous": previous}
        line = canonical_json({**record, "signature": _signature(key, record)})
        previous = sha256_hex(line)
        yield line + b"\n"
