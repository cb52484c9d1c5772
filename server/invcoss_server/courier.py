"""What the relay asks of a courier, and how a hand-off is delivered, waited for and fetched through one.

A courier carries one small message to a site and its answer back. Everything here may be repeated after a crash:
a transfer goes on where it stands, and a hop that runs or is done is not started again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Protocol

from invcoss_common import errors
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import RelayConfig
from invcoss_common.encoding import FOR_IMAGES, FOR_WEIGHTS, decode, encode
from invcoss_common.errors import (
    InvcossError,
    PolicyRefused,
    ProtocolError,
    SiteError,
    SiteUnreachable,
    TransferClosed,
)
from invcoss_common.records import Artefact, HandOff, Report, Request, Response, Status, from_bytes, to_bytes

Fields = dict[str, str | int]

LONGEST_PAUSE_S = 30.0  # between two tries while a site lets nothing cross, or two looks at a long visit
LOOKS = 50  # a visit is looked at so many times in its first part, and more rarely the longer it takes
SMALL_BYTES = 1 << 20  # what is not larger is sent without asking first whether the site has it


class Courier(Protocol):
    """Carries messages to sites by name."""

    def call(self, site: str, request: Request) -> Response:
        """The answer of `site` to a request, sent in the version that the site speaks.

        Raises SiteError on an error answer, SiteUnreachable after the tries of the plan.
        """

    def protocol(self, site: str) -> int:
        """The version of the protocol that is spoken with `site` (`negotiate`); raises SiteUnreachable."""

    def sign(self, handoff: bytes) -> str:
        """The coordinator's signature over a hand-off; "" where nothing is signed (a simulation)."""

    def check(self, site: str, report: bytes, signature: str) -> None:
        """Raise CredentialError unless `site` signed the report; a simulation takes any."""


def deliver(
    courier: Courier,
    site: str,
    handoff: HandOff,
    store: ArtefactStore,
    config: RelayConfig,
    on_closed: Callable[[], None] = lambda: None,
) -> int:
    """Bring a hand-off and its artefacts to `site` and start the hop there; the bytes sent in this call.

    A hop that runs or is done stays so; one that failed is started again. While the site lets nothing cross it is
    asked again and again; `on_closed` is called the first time. Raises SiteError.
    """
    door, sent = _Door(courier, site, config, on_closed), 0
    for artefact in handoff.artefacts:
        encoding = FOR_WEIGHTS if artefact == handoff.model else FOR_IMAGES
        held = _held(door, artefact) if artefact.size_bytes > SMALL_BYTES else 0
        while held < artefact.size_bytes:
            part = store.read(artefact, held, config.part_mib << 20)
            fields: Fields = {**_name(artefact), "offset": held}
            if courier.protocol(site) >= 2:
                fields["encoding"], part = encode(part, encoding if config.compress else "")
            sent += len(part)
            try:
                answer = courier.call(site, Request("put", fields, part))
                held = _checked_held(answer, site, artefact)
                closed = held < artefact.size_bytes and bool(answer.fields.get("closed"))
            except TransferClosed:  # this part crossed in vain
                closed = True
            if closed:
                held = _held(door, artefact)
    _start(courier, site, handoff)
    return sent + len(to_bytes(handoff))


def wait(
    courier: Courier,
    site: str,
    handoff: HandOff,
    config: RelayConfig,
    on_status: Callable[[Status], None],
    keep: Callable[[bytes, str], None] = lambda _report, _signature: None,
) -> Report:
    """Ask for the status of a delivered hop until it is done; its report, checked to answer `handoff`.

    `keep` is given the report as it was signed, and the checked signature. A worker that was killed is started again.
    Raises SiteError with the site's error class when the hop failed, SiteUnreachable when nothing new was heard for
    `stall_timeout_s`; time in which the site was away does not count where the courier waits for it, nor that in which
    the hop waits for people or hours of the site.
    """
    last, silent_s, restarts, began = Status(state="unknown"), 0.0, 0, time.monotonic()
    while True:
        asked, waits = time.monotonic(), False
        try:
            answer = courier.call(site, Request("status", {"hop": handoff.hop}))
            status = from_bytes(Status, str(answer.fields["status"]).encode())
            waits = status.waits
            if status != last:
                last, silent_s = status, 0.0
                on_status(status)
            if status.state == "done":
                report = str(answer.fields["report"]).encode()
                signature = str(answer.fields.get("signature", ""))
                courier.check(site, report, signature)
                keep(report, signature)
                return _accept(from_bytes(Report, report), site, handoff)
            if status.state == "failed" and (status.error != "WorkerKilled" or restarts >= config.attempts):
                raise site_error(site, status.error)
            if status.state in ("failed", "unknown"):
                restarts += 1
                _start(courier, site, handoff)
        except SiteUnreachable:
            pass
        if silent_s > config.stall_timeout_s:
            raise SiteUnreachable(
                f"site '{site}' showed no progress on {handoff.hop} for {config.stall_timeout_s:g} s "
                "(relay.stall_timeout_s); see whether it is up, then start the run again",
                site,
            )
        pause = min(max(config.poll_s, (time.monotonic() - began) / LOOKS), max(config.poll_s, LONGEST_PAUSE_S))
        time.sleep(pause)
        silent_s = 0.0 if waits else silent_s + min(time.monotonic() - asked, pause + LONGEST_PAUSE_S)


def fetch(
    courier: Courier,
    site: str,
    artefact: Artefact,
    store: ArtefactStore,
    config: RelayConfig,
    on_closed: Callable[[], None] = lambda: None,
) -> int:
    """Bring an artefact that a report of `site` names into `store`; the bytes received in this call.

    Waits while the site lets nothing cross, as `deliver` does. Raises SiteError, and ProtocolError on a part that is
    not what was asked for.
    """
    door, received = _Door(courier, site, config, on_closed), 0
    held = store.received_bytes(artefact)
    while held < artefact.size_bytes:
        length = min(config.part_mib << 20, artefact.size_bytes - held)
        fields: Fields = {**_name(artefact), "offset": held, "length": length}
        if courier.protocol(site) >= 2:
            fields["encoding"] = FOR_WEIGHTS if config.compress else ""
        answer = door.pass_through(Request("get", fields))
        received += len(answer.blob)
        held = store.append(artefact, held, decode(answer.blob, str(answer.fields.get("encoding", "")), length))
    return received


def abort(courier: Courier, site: str, hop: str) -> str | None:
    """Have `site` stop working on a hop; the hop's state there, None if the site is too old to be told so."""
    if courier.protocol(site) < 2:
        return None
    return str(courier.call(site, Request("abort", {"hop": hop})).fields["state"])


def checked(site: str, response: Response) -> Response:
    """`response`, unless it is an error answer: then raises SiteError. For couriers."""
    if "error" in response.fields:
        raise site_error(site, str(response.fields["error"]))
    return response


def site_error(site: str, error: str) -> SiteError:
    """What an error class that a site answered means here, in our own words: none of the site's ever come along."""
    name = error if error in errors.ERROR_CODES else "Error"
    if name == TransferClosed.__name__:
        return TransferClosed(f"site '{site}' lets no artefact cross now ([transfer] in its site.toml)", site)
    kind, means = getattr(errors, name, None), name
    known = kind if isinstance(kind, type) and issubclass(kind, InvcossError) else None
    if known:
        means += ": " + (inspect.getdoc(known) or "").partition("\n")[0].rstrip(".")
    if known and issubclass(known, PolicyRefused):
        text = f"site '{site}' refused by its own policy, {means}; agree with the site, then go on with the run"
    else:
        text = f"site '{site}' failed with {means}; the site's own log (log/visit.log, log/desk.log) says why"
    return SiteError(text, site)


class _Door:
    """Asks a site that lets nothing cross again until it does; there is no limit, its hours may begin tomorrow."""

    def __init__(self, courier: Courier, site: str, config: RelayConfig, on_closed: Callable[[], None]) -> None:
        self.courier = courier
        self.site = site
        self.config = config
        self.on_closed = on_closed
        self.told = False

    def pass_through(self, request: Request) -> Response:
        pause = self.config.poll_s
        while True:
            try:
                return self.courier.call(self.site, request)
            except TransferClosed:
                if not self.told:
                    self.told = True
                    self.on_closed()
            time.sleep(pause)
            pause = min(2 * pause, max(self.config.poll_s, LONGEST_PAUSE_S))


def _start(courier: Courier, site: str, handoff: HandOff) -> None:
    # Any number that was not used before marks a deliberate new attempt; a message sent twice carries the same.
    content = to_bytes(handoff)
    fields: Fields = {"handoff": content.decode(), "attempt": time.time_ns()}
    if courier.protocol(site) >= 2:
        fields["signature"] = courier.sign(content)
    courier.call(site, Request("start", fields))


def _accept(report: Report, site: str, handoff: HandOff) -> Report:
    asked = (handoff.protocol, handoff.run, handoff.hop, site, handoff.plan_digest)
    if (report.protocol, report.run, report.hop, report.sender, report.plan_digest) != asked:
        raise ProtocolError(f"the report of site '{site}' does not answer hand-off {handoff.hop}")
    return report


def _name(artefact: Artefact) -> Fields:
    return {"sha256": artefact.sha256, "size": artefact.size_bytes}


def _held(door: _Door, artefact: Artefact) -> int:
    """How much of an artefact the site holds; answered once it lets the rest cross, so that no part goes in vain."""
    return _checked_held(door.pass_through(Request("have", _name(artefact))), door.site, artefact)


def _checked_held(answer: Response, site: str, artefact: Artefact) -> int:
    held = int(answer.fields["received"])
    if not 0 <= held <= artefact.size_bytes:
        raise ProtocolError(f"site '{site}' says it holds {held} of {artefact.size_bytes} bytes")
    return held
