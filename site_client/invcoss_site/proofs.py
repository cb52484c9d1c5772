"""One hand-off of the evidence: its documents in the spool, verified against the journal and the keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field

from invcoss_common.canonical import sha256_file, sha256_hex
from invcoss_common.chain import OWN, Record
from invcoss_common.errors import CredentialError, ProtocolError, WeightsError
from invcoss_common.keys import check_signature, fingerprint, key_digest
from invcoss_common.metrics import METRICS
from invcoss_common.records import HANDOFF, REPORT, Artefact, DpSpent, HandOff, Release, Report, from_bytes
from invcoss_common.statistics import statistics_schema
from invcoss_common.weights import Schema, check_file, model_schema
from invcoss_site.home import SiteHome
from invcoss_site.trail import Sent, Trail, digests, text


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(Part):
    """One thing that was verified now. `open`: there is nothing here to verify it by, and `text` says why."""

    what: str
    result: Literal["verified", "failed", "open"]
    text: str


class TensorShape(Part):
    name: str
    shape: tuple[int, ...]
    dtype: str


class Left(Part):
    """An artefact that left. What it is, its size and `tensors` are unknown once the report is not held any more."""

    what: Literal["model", "statistics", "artefact"]
    sha256: str
    size_bytes: int | None = None
    tensors: tuple[TensorShape, ...] = ()
    sent: Sent

    @property
    def values(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


class Number(Part):
    """A metric of a report, as declared in the protocol."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    meaning: str


class Work(Part):
    """One hand-off, and all that left for it."""

    hop: str
    held: bool = Field(description="its documents are in the spool still, not in the journal only")
    accepted: str = Field(description="UTC; empty: not accepted yet")
    done: str = Field(description="UTC; empty: not done")
    handoff: str = Field(description="sha256, as are model, pools and plan")
    model: str = Field(description="what came in, as did the pools")
    pools: tuple[str, ...]
    policy: str | None = Field(description="sha256 of policy.toml when the work began; empty: there was none")
    plan: str = ""
    sequence: int | None = None
    signer: str = Field(default="", description="fingerprint of the coordinator's key that signed the hand-off")
    report: str = Field(description="sha256; empty: none yet")
    reports_sent: dict[str, Sent] = Field(description="by sha256: those of earlier attempts may have left too")
    progress_sent: Sent
    software: str = Field(default="", description="version that did the work")
    artefacts: tuple[Left, ...]
    numbers: tuple[Number, ...] = ()
    curve: tuple[float, ...] = ()
    release: Release | None = None
    dp: DpSpent | None = None
    decisions: tuple[dict[str, str | int], ...] = Field(description="records of the journal")
    checks: tuple[Check, ...]

    @property
    def kind(self) -> str:
        """train, evaluate or audit."""
        return {"train": "train", "audit": "audit"}.get(self.hop[4:], "evaluate")


def work_of(
    home: SiteHome, trail: Trail, latest: bool, signers: Sequence[Ed25519PublicKey], keys: Sequence[Ed25519PublicKey]
) -> Work:
    """What there is of one hand-off, which one of `signers` must have signed, and of its report, signed by `keys`.

    The spool holds the `latest` of each name only: other bytes where it should be were put there.
    """
    folder = home.hop_folder(trail.hop)
    given = _content(folder / "handoff.json")
    handoff = _parsed(HandOff, given)
    another = not latest or (handoff is not None and handoff.run != trail.run)
    if given is not None and sha256_hex(given) != trail.handoff and another:
        given = handoff = None
    made = _content(folder / "report.json") if given is not None else None
    report = _parsed(Report, made)
    signer, checks = "", list[Check]()
    if given is not None:
        known = text(trail.accepted, "handoff")
        if trail.accepted or made is not None:
            signer, check = _document(HANDOFF, trail.hop, given, known, folder / "handoff.signature", signers)
        else:
            check = _check(trail.hop, HANDOFF, "open", "not accepted; nothing has left for it")
        checks.append(check)
    if made is not None:
        known = text(trail.done, "report")
        checks.append(_document(REPORT, trail.hop, made, known, folder / "report.signature", keys)[1])
    artefacts = [*_reported(home, trail, handoff, report, checks)]
    named = {left.sha256 for left in artefacts}
    unnamed = [*digests(trail.done, "artefacts"), *trail.artefacts]  # a set would not keep their order
    artefacts += [_left("artefact", digest, trail) for digest in dict.fromkeys(unnamed) if digest not in named]
    return Work(
        hop=trail.hop,
        held=given is not None,
        accepted=str(trail.accepted.get("time", "")),
        done=str(trail.done.get("time", "")),
        handoff=trail.handoff if given is None else sha256_hex(given),
        model=handoff.model.sha256 if handoff else str(trail.accepted.get("model", "")),
        pools=tuple(p.artefact.sha256 for p in handoff.pools) if handoff else digests(trail.accepted, "pools"),
        policy=str(trail.begun["policy"]) if "policy" in trail.begun else None,
        plan=handoff.plan_digest if handoff else "",
        sequence=handoff.sequence if handoff else None,
        signer=signer,
        report=text(trail.done, "report") if made is None else sha256_hex(made),
        reports_sent=trail.reports,
        progress_sent=trail.progress,
        software=report.code_version if report else "",
        artefacts=tuple(artefacts),
        numbers=tuple(_number(name, value) for name, value in report.metrics.items()) if report else (),
        curve=report.curve if report else (),
        release=report.release if report else None,
        dp=report.dp if report else None,
        decisions=tuple(_decision(record) for record in trail.decisions),
        checks=tuple(checks),
    )


def _document(
    kind: str, hop: str, content: bytes, known: str, file: Path, keys: Sequence[Ed25519PublicKey]
) -> tuple[str, Check]:
    """Whether a hand-off or report is the one of the journal and signed with one of `keys`: that one, and the finding.

    Only a hand-off may lack the file of its signature: earlier releases verified but did not keep it.
    """
    signer = _signer(kind, content, _content(file), keys)
    if sha256_hex(content) != known:
        return signer, _check(hop, kind, "failed", "is not the one in the journal: altered or exchanged")
    if signer:
        return signer, _check(hop, kind, "verified", f"as in the journal; signed with key {signer}")
    if not keys:
        return signer, _check(hop, kind, "open", "as in the journal; in a simulation nobody signs")
    if kind == HANDOFF and not file.exists():
        return signer, _check(hop, kind, "open", "as in the journal; its signature was verified then, but not kept")
    return signer, _check(hop, kind, "failed", "lacks its signature: altered, or signed with another key")


def _check(hop: str, what: str, result: Literal["verified", "failed", "open"], text: str) -> Check:
    return Check(what=f"{hop}: {what}", result=result, text=text)


def _signer(kind: str, content: bytes, signature: bytes | None, keys: Sequence[Ed25519PublicKey]) -> str:
    """The fingerprint of the one of `keys` that signed it; "" if none did."""
    for key in keys:
        with suppress(CredentialError):
            check_signature(key, kind, content, (signature or b"").decode(errors="replace").strip(), "its owner")
            return fingerprint(key_digest(key))
    return ""


def _reported(
    home: SiteHome, trail: Trail, handoff: HandOff | None, report: Report | None, checks: list[Check]
) -> list[Left]:
    """The artefacts of a report with the tensors that they must have; what is held of them is added to `checks`."""
    if handoff is None or report is None:
        return []
    found, task = [], handoff.task
    if report.model:
        schema = model_schema(task.model, task.families, handoff.wire_dtype)
        found.append(_named("model", home, trail, report.model, schema, checks))
    if report.statistics:
        found.append(_named("statistics", home, trail, report.statistics, statistics_schema(task.model), checks))
    return found


def _named(
    what: Literal["model", "statistics"],
    home: SiteHome,
    trail: Trail,
    artefact: Artefact,
    schema: Schema,
    checks: list[Check],
) -> Left:
    if home.artefacts.has(artefact):
        path = home.artefacts.path(artefact)
        try:
            check_file(path, schema)
            same = sha256_file(path) == artefact.sha256
        except WeightsError:
            same = False
        text = (
            "the file holds these tensors, all finite, and nothing else"
            if same
            else "the file is not what was reported"
        )
        checks.append(_check(trail.hop, what, "verified" if same else "failed", text))
    tensors = (TensorShape(name=n, shape=s, dtype=str(t).removeprefix("torch.")) for n, (s, t) in schema.items())
    left = _left(what, artefact.sha256, trail)
    return left.model_copy(update={"size_bytes": artefact.size_bytes, "tensors": tuple(tensors)})


def _left(what: Literal["model", "statistics", "artefact"], digest: str, trail: Trail) -> Left:
    return Left(what=what, sha256=digest, sent=trail.artefacts.get(digest, Sent()))


def _number(name: str, value: float) -> Number:
    metric = METRICS[name]  # a report with others is not parsed
    return Number(name=name, value=value, unit=metric.unit, low=metric.low, high=metric.high, meaning=metric.meaning)


def _decision(record: Record) -> dict[str, str | int]:
    """A record of the journal for people: what the chain put in is left out, and a list becomes how many it has."""
    values = {name: value for name, value in record.items() if name not in OWN - {"time"}}
    return {k: len(v) if isinstance(v, list) else v if isinstance(v, int) else str(v) for k, v in values.items()}


R = TypeVar("R", HandOff, Report)


def _parsed(kind: type[R], content: bytes | None) -> R | None:
    with suppress(ProtocolError):
        return None if content is None else from_bytes(kind, content)
    return None


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
