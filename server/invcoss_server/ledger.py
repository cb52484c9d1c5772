"""The ledger of a run: everything that happened to it, in FOLDER_OF_RUN/ledger.jsonl, signed by the coordinator.

What goes into it is first numbered and kept in the run's state, in the very transaction that it is about, and then
written here in that order: whatever is killed when, each entry is in the ledger once. A ledger that was lost is written
again, the same to the bit. A run outside a consortium, a simulation, has no key: its ledger is chained only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from invcoss_common.chain import Value, writing
from invcoss_common.errors import ChainError
from invcoss_common.keys import load_signing_key

LEDGER = "ledger.jsonl"


class Entry(NamedTuple):
    """One entry: its number, counted from 1, its time (UTC, ISO), kind and values."""

    number: int
    time: str
    kind: str
    values: dict[str, Value]


def write_ledger(folder: Path, run: str, entries_from: Callable[[int], list[Entry]]) -> None:
    """Add what the ledger of the run in `folder` lacks; `entries_from(number)` are the entries from that one on.

    Raises ChainError when the ledger has more than there are, or is none; OSError.
    """
    with writing(folder / LEDGER, f"ledger of run {run}", coordinator_key(folder)) as ledger:
        newest = int(ledger.last.get("entry", 0))
        entries = entries_from(newest)
        if newest and not entries:
            raise ChainError(
                f"{folder / LEDGER} is ahead of the run's state, which seems to be from a backup; "
                "move the ledger away, and keep it"
            )
        for number, time, kind, values in entries:
            if number > newest:
                ledger.add(kind, {"entry": number, **values}, time)


def coordinator_key(folder: Path) -> Ed25519PrivateKey | None:
    """The key of the consortium that the run in `folder` belongs to, if it does; raises CredentialError."""
    file = folder.resolve().parent.parent / "pki" / "coordinator.pem"
    return load_signing_key(file) if file.exists() else None
