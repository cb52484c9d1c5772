"""Whether the work on a hand-off in the spool may begin: its signature, the policy, a person's word, and the hours.

What people say is kept out of the spool, which the network-facing side writes, in ROOT/approvals/DIGEST.json, DIGEST
being that of the hand-off, and in the journal: another hand-off of the same name needs another word.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.errors import DataError, InvcossError, NotApproved, OutsideHours, PolicyRefused
from invcoss_common.records import HandOff, Phase, Status, from_bytes, to_bytes
from invcoss_site import journal
from invcoss_site.handoffs import taken
from invcoss_site.home import SiteHome
from invcoss_site.permission import check, check_hours
from invcoss_site.policy import APPROVALS, SitePolicy, load_policy

Word = Literal["approved", "denied"]

BEGAN = "began"  # in a hop's folder: when its work first began, seconds since 1970
LOOK_S = 0.5
DIGITS = 12  # of a digest, where people look at it


@dataclass(frozen=True)
class Pending:
    """A hand-off that waits for a person since `since` (seconds since 1970); `verdict` is what the policy says."""

    handoff: HandOff
    digest: str
    since: float
    verdict: str


def admit(home: SiteHome, hop: str) -> tuple[HandOff, Phase | None]:
    """The hand-off of `hop`, verified, and what its work waits for: "approval", "hours", or None if it may begin.

    Raises CredentialError, ProtocolError, PolicyRefused (NotApproved where a person said no), DataError, OSError.
    """
    policy = load_policy(home.root)
    handoff = taken(home, policy, hop)
    check(policy, handoff)
    word = said(home, handoff)
    if word == "denied":
        raise NotApproved(f"{hop} of run '{handoff.run}' was refused here; invcoss-site approve would still allow it")
    if word is None and _needs_word(policy, handoff):
        return handoff, "approval"
    if not (home.hop_folder(hop) / BEGAN).exists():
        try:
            check_hours(policy, time.strftime("%H:%M"))
        except OutsideHours:
            return handoff, "hours"
    return handoff, None


def await_admission(home: SiteHome, hop: str) -> HandOff:
    """The hand-off of `hop` once its work may begin; raises as `admit`.

    Where an agent looks after the spool it has waited already; elsewhere the worker waits here.
    """
    told: Phase | None = None
    while True:
        handoff, waits = admit(home, hop)
        if waits is None:
            return handoff
        if waits != told:
            note_waiting(home, hop, waits)
        told = waits
        time.sleep(LOOK_S)


def note_waiting(home: SiteHome, hop: str, waits: Phase) -> None:
    """Leave in the spool what a hop waits for."""
    file, status = home.hop_folder(hop) / "status.json", to_bytes(Status(state="queued", phase=waits))
    if file.read_bytes() != status:
        write_atomic(file, status)


def pending(home: SiteHome) -> Iterator[Pending]:
    """The hand-offs that wait for a person, the oldest first."""
    policy = load_policy(home.root)
    for folder in sorted(home.spool.glob("s[0-9][0-9]-*"), key=lambda folder: folder.stat().st_ctime):
        with suppress(FileNotFoundError, InvcossError):  # what is not signed fails, as soon as the agent sees it
            state = from_bytes(Status, (folder / "status.json").read_bytes()).state
            handoff = taken(home, policy, folder.name)
            if state == "queued" and _needs_word(policy, handoff) and said(home, handoff) is None:
                since = (folder / "handoff.json").stat().st_mtime
                yield Pending(handoff, digest_of(handoff), since, _verdict(policy, handoff))


def decide(home: SiteHome, hop: str, word: Word, seen: str | None = None) -> HandOff:
    """Keep a person's word on the hand-off of `hop`, which begins or fails by it; `seen` begins its digest.

    Raises DataError when there is none, or it is at work or done, or is another one than that which was `seen`.
    """
    try:
        status = from_bytes(Status, (home.hop_folder(hop) / "status.json").read_bytes())
        handoff = taken(home, load_policy(home.root), hop)
    except FileNotFoundError:
        raise DataError(f"no hand-off {hop} is here; invcoss-site pending lists those that wait") from None
    digest = digest_of(handoff)
    if seen and not digest.startswith(seen):
        raise DataError(f"the hand-off {hop} is {digest[:DIGITS]} by now; look at it with invcoss-site pending")
    if status.state in ("running", "done"):
        raise DataError(f"{hop} is {status.state} already; only what waits or has failed can be approved or refused")
    journal.decided(home, word, handoff)
    values = {"word": word, "run": handoff.run, "hop": hop}
    write_atomic(home.root / APPROVALS / f"{digest}.json", json.dumps(values).encode())
    return handoff


def said(home: SiteHome, handoff: HandOff) -> Word | None:
    """What a person said to this very hand-off, None if nobody did."""
    file = home.root / APPROVALS / f"{digest_of(handoff)}.json"
    if not file.exists():
        return None
    return "approved" if json.loads(file.read_bytes())["word"] == "approved" else "denied"


def digest_of(handoff: HandOff) -> str:
    """What a hand-off is known by in journal, ledger and approvals."""
    return sha256_hex(to_bytes(handoff))


def _needs_word(policy: SitePolicy, handoff: HandOff) -> bool:
    return policy.trust.approval and handoff.task.kind in policy.trust.approve_kinds


def _verdict(policy: SitePolicy, handoff: HandOff) -> str:
    try:
        check(policy, handoff)
    except PolicyRefused as error:
        return f"{type(error).__name__}: {error}"
    return "allowed"
