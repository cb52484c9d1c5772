"""Whose hand-offs a site takes, and in which order; and its own signature on what it reports.

A site that joined a consortium takes hand-offs with the signature of that consortium's coordinator only. A simulated
site has joined none, has no keys, and takes any.
"""

from __future__ import annotations

import json

from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.errors import ProtocolError
from invcoss_common.keys import check_signature, load_signing_key, parse_signing_key, sign
from invcoss_common.records import HANDOFF, REPORT, HandOff, to_bytes
from invcoss_site.enrol import read_join
from invcoss_site.home import SiteHome


def check_coordinator(home: SiteHome, handoff: bytes, signature: str) -> None:
    """Raise CredentialError unless the coordinator that this site joined signed these bytes."""
    if not has_joined(home):
        return
    key = parse_signing_key(read_join(home.root / "join.json").coordinator_key)
    check_signature(key, HANDOFF, handoff, signature, "the coordinator that this site joined")


def check_sequence(home: SiteHome, handoff: HandOff) -> None:
    """Raise ProtocolError when a later hand-off of the run was taken before, or another one under the same number."""
    if not has_joined(home):
        return
    file = home.spool / "sequence.json"
    taken: dict[str, tuple[int, str]] = json.loads(file.read_bytes()) if file.exists() else {}
    number, digest = taken.get(handoff.run, (0, ""))
    this = sha256_hex(to_bytes(handoff))
    if handoff.sequence < number or (handoff.sequence == number and this != digest):
        raise ProtocolError(
            f"hand-off {handoff.sequence} of run '{handoff.run}' comes after number {number}: it is stale or replayed"
        )
    if handoff.sequence > number:
        write_atomic(file, json.dumps({**taken, handoff.run: (handoff.sequence, this)}).encode())


def sign_report(home: SiteHome, report: bytes) -> str:
    """This site's signature over a report; "" when it joined no consortium."""
    return sign(load_signing_key(home.root / "keys" / "signing.pem"), REPORT, report) if has_joined(home) else ""


def has_joined(home: SiteHome) -> bool:
    return (home.root / "join.json").exists()
