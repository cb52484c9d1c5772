"""The site's journal: everything that left the site and every decision, in ROOT/journal.jsonl; never content itself.

It holds verbs, names of runs and hops, digests, counts and classes of errors: no file name, path, identifier or text of
an error. Whoever writes it does so before an answer leaves; what can't be journalled doesn't leave. Records are signed
with the site's key; those of a simulated site, which has none, are chained only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from invcoss_common.canonical import canonical_json, sha256_hex
from invcoss_common.chain import OWN, Value, writing
from invcoss_common.keys import load_signing_key
from invcoss_common.records import Digest, HandOff, HopId, Release, Report, Request, Response, to_bytes
from invcoss_site.handoffs import has_joined
from invcoss_site.home import SiteHome
from invcoss_site.policy import policy_digest

JOURNAL = "journal.jsonl"

_HOP: TypeAdapter[str] = TypeAdapter(HopId)
_DIGEST: TypeAdapter[str] = TypeAdapter(Digest)


def note(home: SiteHome, kind: str, values: dict[str, Value], again: bool = True) -> None:
    """Add a record; without `again` not one that says the same as the newest. Raises OSError, ChainError."""
    with writing(home.root / JOURNAL, f"journal of site {home.name}", journal_key(home)) as journal:
        newest = {name: value for name, value in journal.last.items() if name not in OWN}
        if again or newest != {"kind": kind, **values}:
            journal.add(kind, values)


def journal_key(home: SiteHome) -> Ed25519PrivateKey | None:
    """The key that signs the journal, None for a simulated site; raises CredentialError."""
    return load_signing_key(home.root / "keys" / "signing.pem") if has_joined(home) else None


def answered(home: SiteHome, request: Request, response: Response) -> None:
    """An answer that is about to leave: to what, and the digests and size of what leaves with it."""
    small = canonical_json(response.fields)
    values = _asked(request) | {"fields": sha256_hex(small), "bytes": len(small) + len(response.blob)}
    if response.blob:
        values["part"] = sha256_hex(response.blob)
    if report := response.fields.get("report"):
        values["report"] = sha256_hex(str(report).encode())
    if request.verb == "status":
        values["state"] = json.loads(str(response.fields["status"]))["state"]
    elif "state" in response.fields:
        values["state"] = response.fields["state"]
    note(home, "answered", values, again=False)


def refused(home: SiteHome, request: Request | None, error: str) -> None:
    """A request that is about to be refused with the class of an error; None is one that could not be read."""
    note(home, "refused", (_asked(request) if request else {}) | {"error": error}, again=False)


def accepted(home: SiteHome, handoff: HandOff) -> None:
    """The decision to do what a hand-off asks for."""
    note(
        home,
        "accepted",
        {
            "run": handoff.run,
            "hop": handoff.hop,
            "task": handoff.task.kind,
            "handoff": sha256_hex(to_bytes(handoff)),
            "model": handoff.model.sha256,
            "pools": [pool.artefact.sha256 for pool in handoff.pools],
        },
    )


def decided(home: SiteHome, word: Literal["approved", "denied"], handoff: HandOff) -> None:
    """A person's word on a hand-off, in nobody's name."""
    note(home, word, {"run": handoff.run, "hop": handoff.hop, "handoff": sha256_hex(to_bytes(handoff))})


def begun(home: SiteHome, handoff: HandOff) -> None:
    """The work of a hop begins, or goes on after its worker was killed, under the policy of this moment."""
    values: dict[str, Value] = {"run": handoff.run, "hop": handoff.hop, "handoff": sha256_hex(to_bytes(handoff))}
    note(home, "begun", values | {"policy": policy_digest(home.root)})


def audited(home: SiteHome, handoff: HandOff, release: Release) -> None:
    """The decision what of a pool, made of this model, may travel."""
    note(
        home,
        "audited",
        {
            "run": handoff.run,
            "hop": handoff.hop,
            "model": handoff.model.sha256,
            "pool": release.pool,
            "released": release.released.sha256 if release.released else "",
            "dropped": len(release.dropped),
            "images": release.figures.pool_images,
        },
    )


def charged(home: SiteHome, spends: Mapping[str, object], epsilon: float, delta: float) -> None:
    """What a visit spends of the site's privacy, and the epsilon of it alone; fractions are texts."""
    values: dict[str, Value] = {name: value if isinstance(value, int) else str(value) for name, value in spends.items()}
    note(home, "charged", values | {"epsilon": repr(epsilon), "delta": repr(delta)})


def done(home: SiteHome, report: Report) -> None:
    """The work of a hop is done; its report, with these artefacts, may be fetched from now on."""
    values: dict[str, Value] = {"run": report.run, "hop": report.hop, "report": sha256_hex(to_bytes(report))}
    note(home, "done", values | {"artefacts": [artefact.sha256 for artefact in report.artefacts]})


def failed(home: SiteHome, hop: str, error: str) -> None:
    """The work of a hop has failed, with this class of error."""
    note(home, "failed", {"hop": hop, "error": error})


def _asked(request: Request) -> dict[str, Value]:
    """What was asked for, as far as it is in the form of the protocol: a coordinator can't write texts of its own."""
    values: dict[str, Value] = {"verb": request.verb}
    for field, name, form in (("hop", "hop", _HOP), ("sha256", "artefact", _DIGEST)):
        with suppress(ValidationError):
            values[name] = form.validate_python(request.fields.get(field))
    if isinstance(offset := request.fields.get("offset"), int):
        values["offset"] = offset
    if "handoff" in request.fields:
        values["handoff"] = sha256_hex(str(request.fields["handoff"]).encode())
    return values
