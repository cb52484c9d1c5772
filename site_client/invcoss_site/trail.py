"""The site's journal read by hand-off: what was asked for, what was decided about it, and what left for it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import BaseModel, TypeAdapter, ValidationError

from invcoss_common.chain import Record
from invcoss_common.config import Name
from invcoss_common.records import Digest, HopId

FORMS: dict[str, TypeAdapter[str]] = {
    name: TypeAdapter(form)
    for name, form in (("run", Name), ("hop", HopId), ("handoff", Digest), ("artefact", Digest), ("report", Digest))
}
DECISIONS = ("approved", "denied", "refused", "audited", "charged", "failed")


class Sent(BaseModel):
    """Answers that left with the same content: how many, their bytes, and the times (UTC) of the first and last."""

    answers: int = 0
    bytes: int = 0
    first: str = ""
    last: str = ""

    def add(self, record: Record) -> None:
        self.answers += 1
        self.bytes += record["bytes"] if isinstance(record.get("bytes"), int) else 0
        self.first, self.last = self.first or record["time"], record["time"]


@dataclass
class Trail:
    """One hand-off in the journal; what left by its sha256. `progress` are answers on where the work stands."""

    run: str
    hop: str
    handoff: str = ""
    accepted: Record = field(default_factory=dict)
    begun: Record = field(default_factory=dict)
    done: Record = field(default_factory=dict)
    decisions: list[Record] = field(default_factory=list)
    reports: dict[str, Sent] = field(default_factory=dict)
    artefacts: dict[str, Sent] = field(default_factory=dict)
    progress: Sent = field(default_factory=Sent)


def stage_of(hop: str) -> int:
    """The stage whose images a hop works with: s03-eval-01 is of stage 1."""
    last = hop.rpartition("-")[2]
    return int(last if last.isdecimal() else hop[1:3])


def follow(records: Iterable[Record]) -> list[Trail]:
    """The trails of a journal, oldest first. Records that name no run are those of the newest hand-off they fit."""
    found: list[Trail] = []
    newest: dict[str, Trail] = {}  # by name of a hop, digest of a hand-off or of an artefact that was made for it
    for record in records:
        run, hop, handoff = text(record, "run"), text(record, "hop"), text(record, "handoff")
        trail = newest.get(handoff or text(record, "artefact") or hop)
        if run and hop:
            trail = trail or newest.get(hop)
            if trail is None or trail.run != run or (handoff and trail.handoff not in ("", handoff)):
                found.append(trail := Trail(run, hop))
            trail.handoff = trail.handoff or handoff
            newest[hop] = trail
            if handoff:
                newest[handoff] = trail
        if trail is not None:
            _add(trail, record)
        if trail is not None and record["kind"] == "done":
            newest.update(dict.fromkeys(digests(record, "artefacts"), trail))
    return found


def text(record: Record, name: str) -> str:
    """A name or digest of a record; "" if it has none of the form it is written in: it may have been tampered with."""
    with suppress(ValidationError):
        return FORMS[name].validate_python(record.get(name), strict=True)
    return ""


def digests(record: Record, name: str) -> tuple[str, ...]:
    values = record.get(name)
    return tuple(map(str, values)) if isinstance(values, list) else ()


def _add(trail: Trail, record: Record) -> None:
    match record["kind"], record.get("verb"):
        case "accepted", _:
            trail.accepted = record
        case "begun", _:
            trail.begun = record
        case "done", _:
            trail.done = record
        case "answered", "get":
            trail.artefacts.setdefault(text(record, "artefact"), Sent()).add(record)
        case "answered", "status" if "report" in record:
            trail.reports.setdefault(text(record, "report"), Sent()).add(record)
        case "answered", "status":
            trail.progress.add(record)
        case kind, _ if kind in DECISIONS:
            trail.decisions.append(record)
