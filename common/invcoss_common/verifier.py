"""What both commands offer an auditor: a journal or ledger shown, and verified with public keys only."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from invcoss_common.chain import OWN, Record, parse_head, records, verify
from invcoss_common.command import AsJson, tell
from invcoss_common.errors import CredentialError
from invcoss_common.keys import MAX_KEY_BYTES, parse_public_key

FIRST = ("verb", "run", "hop", "site", "stage", "state", "error", "order")  # what tells people most

Last = Annotated[int | None, typer.Option("--last", min=1, help="only so many of the newest")]
Keys = Annotated[
    list[str] | None, typer.Option("--key", help="public key that signed it, as text or a file; may be repeated")
]
KnownHead = Annotated[str | None, typer.Option("--head", metavar="N:DIGEST", help="head that was written down earlier")]


def verify_chain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a site's journal.jsonl or a run's ledger.jsonl")],
    key: Keys = None,
    head: KnownHead = None,
    as_json: AsJson = False,
) -> None:
    """Verify a journal or ledger that was handed over; needs nothing but the file and its owner's public key."""
    tell_verified(file, read_keys(key), head, as_json)


def tell_verified(file: Path, keys: Sequence[Ed25519PublicKey], head: str | None, as_json: bool) -> None:
    """Verify a chain, and print what it is and its head; raises ChainError."""
    found = verify(file, keys, parse_head(head) if head else None)
    signed = "each signed" if found.signed else "NOT CHECKED for signatures: no key"
    tell(
        as_json,
        {
            "chain": found.name,
            "records": found.head.n,
            "head": str(found.head),
            "first": found.first,
            "newest": found.newest,
            "signed": found.signed,
        },
        f"{found.name}: {found.head.n} records hold, {signed}; {found.first} to {found.newest}",
        "write its head down elsewhere, and give it with --head next time; without one, a cut-off end is not found:",
        f"  {found.head}",
    )


def read_keys(given: list[str] | None) -> list[Ed25519PublicKey]:
    """Ed25519 public keys from their text, or files that hold it; raises CredentialError."""
    keys = []
    for text in given or []:
        try:
            if not text.startswith(("ssh-ed25519 ", "-----BEGIN")):
                with Path(text).open("rb") as file:
                    text = file.read(MAX_KEY_BYTES + 1).decode("ascii", errors="replace").strip()
        except OSError as error:
            raise CredentialError(f"--key: not a public key, nor a file to read ({error.strerror})") from None
        key = parse_public_key(text)
        if not isinstance(key, Ed25519PublicKey):
            raise CredentialError("--key: not an Ed25519 key; give the signing key, not the node's")
        keys.append(key)
    return keys


def show(file: Path, last: int | None, as_json: bool) -> None:
    """Print the records of a chain, a line each; raises ChainError."""
    found = records(file)
    for record in found if last is None else deque(found, last):
        print(json.dumps(record) if as_json else _line(record))


def _line(record: Record) -> str:
    names = [name for name in FIRST if name in record] + sorted(record.keys() - {*FIRST, *OWN, "kind", "entry"})
    words = [f"{name} {_short(record[name])}" if name != "stage" else f"stage s{record[name]:02d}" for name in names]
    return f"{record['n']:>6}  {record['time'][:19]}  {record['kind']:<9} {', '.join(words)}"


def _short(value: object) -> str:
    """A value with digests cut to what tells them apart."""
    texts = value if isinstance(value, list) else [value]
    return " ".join(t[:12] if re.fullmatch("[0-9a-f]{64}", t) else t for t in map(str, texts)) or "-"
