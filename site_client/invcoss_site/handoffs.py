"""Whose hand-offs a site takes, and in which order; and its own signature on what it reports.

A site that joined a consortium takes hand-offs with the signature of that consortium's coordinator, or of a key that
its policy names, only. A simulated site has joined none, has no keys, and takes any.
"""

from __future__ import annotations

import json
from contextlib import suppress

from invcoss_common.canonical import sha256_file, sha256_hex, write_atomic
from invcoss_common.errors import CredentialError, ProtocolError
from invcoss_common.keys import check_signature, load_signing_key, parse_signing_key, sign
from invcoss_common.records import HANDOFF, REPORT, HandOff, from_bytes, to_bytes
from invcoss_site.enrol import read_join
from invcoss_site.home import SiteHome
from invcoss_site.policy import SitePolicy

SEQUENCES = "sequence.json"  # in the spool


def check_coordinator(home: SiteHome, policy: SitePolicy | None, handoff: bytes, signature: str) -> None:
    """Raise CredentialError unless the coordinator that this site joined, or one of the policy, signed these bytes."""
    if not has_joined(home):
        return
    keys = [*(policy.trust.coordinators if policy else ()), read_join(home.root / "join.json").coordinator_key]
    for number, key in enumerate(map(parse_signing_key, keys), start=1):
        try:
            check_signature(key, HANDOFF, handoff, signature, "the coordinator that this site joined")
            return
        except CredentialError:
            if number == len(keys):
                raise


def keep(home: SiteHome, handoff: HandOff, content: bytes, signature: str) -> None:
    """Put a hand-off and its signature into the spool as they came: the signature is over these very bytes."""
    folder = home.hop_folder(handoff.hop)
    write_atomic(folder / "handoff.json", content)
    write_atomic(folder / "handoff.signature", signature.encode())


def kept(home: SiteHome, hop: str) -> HandOff | None:
    """What lies in the spool as the hand-off of `hop`, None if it is none; whose it is is not asked."""
    file = home.hop_folder(hop) / "handoff.json"
    with suppress(ProtocolError):
        return from_bytes(HandOff, file.read_bytes()) if file.is_file() else None
    return None


def taken(home: SiteHome, policy: SitePolicy, hop: str) -> HandOff:
    """The hand-off of `hop` for whoever acts on it: the network-facing side, which writes the spool, is not believed.

    Raises CredentialError unless it is signed, ProtocolError when it is not of this site and hop, OSError.
    """
    folder = home.hop_folder(hop)
    content, file = (folder / "handoff.json").read_bytes(), folder / "handoff.signature"
    check_coordinator(home, policy, content, file.read_text("ascii") if file.exists() else "")
    handoff = from_bytes(HandOff, content)
    if (handoff.receiver, handoff.hop) != (home.name, hop):
        raise ProtocolError(f"the hand-off in {folder} is {handoff.hop} for site '{handoff.receiver}'")
    return handoff


def check_artefacts(home: SiteHome, handoff: HandOff) -> None:
    """Raise ProtocolError unless the model and pools in the spool are those that the hand-off names; others go."""
    for artefact in handoff.artefacts:
        path = home.artefacts.path(artefact)
        if not home.artefacts.has(artefact) or sha256_file(path) != artefact.sha256:
            path.unlink(missing_ok=True)
            raise ProtocolError(f"{path} is not what the hand-off names; it has to be sent again")


def check_sequence(home: SiteHome, handoff: HandOff) -> None:
    """Raise ProtocolError when a later hand-off of the run was taken before, or another one under the same number."""
    if not has_joined(home):
        return
    number, digest = _sequences(home).get(handoff.run, (0, ""))
    if handoff.sequence < number or (handoff.sequence == number and sha256_hex(to_bytes(handoff)) != digest):
        raise ProtocolError(
            f"hand-off {handoff.sequence} of run '{handoff.run}' comes after number {number}: it is stale or replayed"
        )


def note_sequence(home: SiteHome, handoff: HandOff) -> None:
    """Refuse every earlier hand-off of the run from now on; only one that is taken may have that done."""
    known = _sequences(home)
    if has_joined(home) and handoff.sequence > known.get(handoff.run, (0, ""))[0]:
        noted = {**known, handoff.run: (handoff.sequence, sha256_hex(to_bytes(handoff)))}
        write_atomic(home.spool / SEQUENCES, json.dumps(noted).encode())


def _sequences(home: SiteHome) -> dict[str, tuple[int, str]]:
    """Number and digest of the newest hand-off taken, by run."""
    file = home.spool / SEQUENCES
    return json.loads(file.read_bytes()) if file.exists() else {}


def sign_report(home: SiteHome, report: bytes) -> str:
    """This site's signature over a report; "" when it joined no consortium."""
    return sign(load_signing_key(home.root / "keys" / "signing.pem"), REPORT, report) if has_joined(home) else ""


def has_joined(home: SiteHome) -> bool:
    return (home.root / "join.json").exists()
