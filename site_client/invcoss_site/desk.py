"""A site's side of every verb: takes seconds at most, only reads and writes the spool, and may be asked twice.

Errors leave as the name of their class; their text and traceback stay in the site's own log.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress

from pydantic import TypeAdapter, ValidationError

from invcoss_common import __version__
from invcoss_common.canonical import write_atomic
from invcoss_common.encoding import decode, encode
from invcoss_common.errors import HopBusy, ProtocolError, TransferClosed, error_class
from invcoss_common.records import (
    PROTOCOL_VERSION,
    Artefact,
    HandOff,
    HopId,
    Report,
    Request,
    Response,
    Status,
    from_bytes,
    to_bytes,
)
from invcoss_common.wire import MAX_PART_BYTES
from invcoss_site import journal
from invcoss_site.guard import check_response
from invcoss_site.handoffs import check_coordinator, check_sequence, keep, kept, note_sequence
from invcoss_site.home import SiteHome
from invcoss_site.permission import check, check_size
from invcoss_site.policy import readable_policy
from invcoss_site.rounding import egress_policy, rounded_status
from invcoss_site.transfer import check_open, count, is_open
from invcoss_site.uploads import count_upload
from invcoss_site.work import AGENT_LOCK, is_idle, log_error

_HOP: TypeAdapter[str] = TypeAdapter(HopId)


def answer(request: Request, home: SiteHome, start_work: Callable[[SiteHome, str], object]) -> Response:
    """The site's answer to `request`; `start_work(home, hop)` begins the work of a hop and must not wait for it."""
    try:
        response = _answer(request, home, start_work)
        check_response(request, response, home)
        journal.answered(home, request, response)
        return response
    except TransferClosed as error:  # not a failure, and may be asked for all night: not for the log
        return refuse(home, request, error)
    except Exception as error:
        with suppress(OSError):
            log_error(home, "desk.log")
        return refuse(home, request, error)


def refuse(home: SiteHome, request: Request | None, error: Exception) -> Response:
    """The class of an error as an answer, or of the error that keeps it from being journalled, and then nothing else.

    `request` is None when it could not be read.
    """
    try:
        journal.refused(home, request, error_class(error))
    except Exception as unwritten:
        with suppress(OSError):
            log_error(home, "desk.log")
        error = unwritten
    return Response({"error": error_class(error)})


def _answer(request: Request, home: SiteHome, start_work: Callable[[SiteHome, str], object]) -> Response:
    fields = request.fields
    match request.verb:
        case "hello":
            return Response({"site": home.name, "protocol": PROTOCOL_VERSION, "code_version": __version__})
        case "have":
            artefact = _artefact(request)
            if not home.artefacts.has(artefact):
                _check_room(home, artefact)
                check_open(home)  # here too, so that nobody sends a large part in vain
            return Response({"received": home.artefacts.received_bytes(artefact)})
        case "put":
            check_open(home)
            put: dict[str, str | int] = {"received": _add(request, home)}
            if request.protocol >= 2:
                put["closed"] = int(not is_open(home))
            return Response(put)
        case "start":
            return Response({"state": _start(request, home, start_work)})
        case "status":
            hop = _hop(request)
            status = hop_status(home, hop)
            if status.waits and request.protocol < 2:  # which has no word for it
                status = Status(state="queued")
            told = rounded_status(status, egress_policy(home.root))
            answer: dict[str, str | int] = {"status": to_bytes(told).decode(), "report": ""}
            if status.state == "done":
                answer["report"] = (home.hop_folder(hop) / "report.json").read_text("utf-8")
            if request.protocol >= 2:
                answer["signature"] = _signature(home, hop) if status.state == "done" else ""
            return Response(answer)
        case "get":
            check_open(home)
            encoding, blob = encode(_part(request, home), str(fields.get("encoding", "")))
            count_upload(home, egress_policy(home.root), len(blob))
            count(home, len(blob))
            return Response({"encoding": encoding} if request.protocol >= 2 else {}, blob)
        case "purge":
            home.artefacts.keep_only(set(str(fields["keep"]).split(",")))
            return Response()
        case "abort":
            hop = _hop(request)
            state = hop_status(home, hop).state
            if state != "unknown":
                write_atomic(home.hop_folder(hop) / "abort", b"")  # who tends the work sees it and stops
            return Response({"state": state})


def hop_status(home: SiteHome, hop: str) -> Status:
    """Where a hop stands; one whose worker is gone without a word has failed, or its site's agent will see to it."""
    folder = home.hop_folder(hop)
    if not (folder / "status.json").is_file():
        return Status(state="unknown")
    idle = is_idle(home, hop)  # first, or a worker that ends between the two questions would seem killed
    status = from_bytes(Status, (folder / "status.json").read_bytes())
    tended = (home.spool / AGENT_LOCK).exists()
    if idle and not tended and status.state in ("queued", "running"):
        return status.model_copy(update={"state": "failed", "error": "WorkerKilled"})
    return status


def _start(request: Request, home: SiteHome, start_work: Callable[[SiteHome, str], object]) -> str:
    """Begin the work of a hand-off, unless it runs, is done, or failed in this very attempt; the hop's state.

    The policy is asked here so that the coordinator soon knows, as far as this process may read it; what counts is
    what the worker finds.
    """
    content, signature = str(request.fields["handoff"]).encode(), str(request.fields.get("signature", ""))
    policy, attempt = readable_policy(home.root), str(request.fields["attempt"])
    check_coordinator(home, policy, content, signature)
    handoff = from_bytes(HandOff, content)
    check_sequence(home, handoff)
    if handoff.receiver != home.name:
        raise ProtocolError("the hand-off is for another site")
    if not all(home.artefacts.has(artefact) for artefact in handoff.artefacts):
        raise ProtocolError("the hand-off names artefacts that were not delivered")
    folder, is_known = home.hop_folder(handoff.hop), kept(home, handoff.hop) == handoff
    attempt_file = folder / "attempt"
    if is_known:
        state = hop_status(home, handoff.hop).state
        (folder / "abort").unlink(missing_ok=True)
        if (
            state in ("queued", "running")
            or (state == "done" and all(map(home.artefacts.has, _report(home, handoff.hop).artefacts)))
            or (state == "failed" and attempt_file.read_text("utf-8") == attempt)
        ):
            return state
    if policy:
        check(policy, handoff)
    if not is_known and folder.is_dir():
        if not is_idle(home, handoff.hop):
            raise HopBusy("another hand-off of this name is being worked on")
        shutil.rmtree(folder)
    note_sequence(home, handoff)
    keep(home, handoff, content, signature)
    journal.accepted(home, handoff)
    home.artefacts.keep_only({artefact.sha256 for artefact in handoff.artefacts})  # earlier hops are done
    write_atomic(attempt_file, attempt.encode())
    write_atomic(folder / "status.json", to_bytes(Status(state="queued")))
    start_work(home, handoff.hop)
    return hop_status(home, handoff.hop).state


def _check_room(home: SiteHome, artefact: Artefact) -> None:
    """Raise LimitExceeded when no hand-off may bring so much here; nothing of it needs to be sent."""
    if policy := readable_policy(home.root):
        check_size(policy, artefact.size_bytes)


def _add(request: Request, home: SiteHome) -> int:
    """Store a part of an artefact; the bytes of it now held."""
    count(home, len(request.blob))
    artefact, offset = _artefact(request), int(request.fields["offset"])
    _check_room(home, artefact)
    limit = min(artefact.size_bytes - offset, MAX_PART_BYTES)
    part = decode(request.blob, str(request.fields.get("encoding", "")), limit)
    return home.artefacts.append(artefact, offset, part)


def _part(request: Request, home: SiteHome) -> bytes:
    """A part of an artefact that a finished report of this site names; nothing else can be asked for."""
    artefact = _artefact(request)
    hops = (file.parent.name for file in home.spool.glob("*/report.json"))
    if not any(artefact in _report(home, hop).artefacts for hop in hops if hop_status(home, hop).state == "done"):
        raise ProtocolError("no finished report of this site names the artefact")
    offset, length = int(request.fields["offset"]), int(request.fields["length"])
    if not (0 <= offset < artefact.size_bytes and 0 < length <= MAX_PART_BYTES):
        raise ProtocolError("the part asked for is outside the artefact")
    return home.artefacts.read(artefact, offset, length)


def _signature(home: SiteHome, hop: str) -> str:
    """That of the report of a hop that is done, made by the worker; "" in a simulation."""
    file = home.hop_folder(hop) / "report.signature"
    return file.read_text("ascii") if file.exists() else ""


def _report(home: SiteHome, hop: str) -> Report:
    return from_bytes(Report, (home.hop_folder(hop) / "report.json").read_bytes())


def _artefact(request: Request) -> Artefact:
    try:
        return Artefact.model_validate({"sha256": request.fields["sha256"], "size_bytes": request.fields["size"]})
    except ValidationError:
        raise ProtocolError("not the name and size of an artefact") from None


def _hop(request: Request) -> str:
    try:
        return _HOP.validate_python(request.fields["hop"])
    except ValidationError:
        raise ProtocolError("not the name of a hop") from None
