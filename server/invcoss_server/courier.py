"""What the relay asks of a courier, and how a hand-off is delivered, waited for and fetched through one.

A courier carries one small message to a site and its answer back. Everything here may be repeated after a crash:
a transfer goes on where it stands, and a hop that runs or is done is not started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import RelayConfig
from invcoss_common.errors import ProtocolError, SiteError, SiteUnreachable
from invcoss_common.records import Artefact, HandOff, Report, Request, Response, Status, from_bytes, to_bytes


class Courier(Protocol):
    """Carries messages to sites by name."""

    def call(self, site: str, request: Request) -> Response:
        """The answer of `site`; raises SiteError on an error answer, SiteUnreachable after the tries of the plan."""


def deliver(courier: Courier, site: str, handoff: HandOff, store: ArtefactStore, part_bytes: int) -> int:
    """Bring a hand-off and its artefacts to `site` and start the hop there; the bytes sent in this call.

    A hop that runs or is done stays so; one that failed is started again. Raises SiteError.
    """
    sent = 0
    for artefact in handoff.artefacts:
        held = _number(site, courier.call(site, Request("have", _name(artefact))), artefact)
        while held < artefact.size_bytes:
            part = store.read(artefact, held, part_bytes)
            request = Request("put", {**_name(artefact), "offset": held}, part)
            held = _number(site, courier.call(site, request), artefact)
            sent += len(part)
    _start(courier, site, handoff)
    return sent + len(to_bytes(handoff))


def wait(
    courier: Courier, site: str, handoff: HandOff, config: RelayConfig, on_status: Callable[[Status], None]
) -> Report:
    """Ask for the status of a delivered hop until it is done; its report, checked to answer `handoff`.

    A worker that was killed is started again, and a site that is away may come back: both until nothing new was heard
    for `stall_timeout_s`. Raises SiteError with the site's error class when the hop failed.
    """
    last, heard, restarts = Status(state="unknown"), time.monotonic(), 0
    while True:
        try:
            answer = courier.call(site, Request("status", {"hop": handoff.hop}))
            status = from_bytes(Status, str(answer.fields["status"]).encode())
            if status != last:
                last, heard = status, time.monotonic()
                on_status(status)
            if status.state == "done":
                return _accept(from_bytes(Report, str(answer.fields["report"]).encode()), site, handoff)
            if status.state == "failed" and (status.error != "WorkerKilled" or restarts >= config.attempts):
                raise site_error(site, status.error)
            if status.state in ("failed", "unknown"):
                restarts += 1
                _start(courier, site, handoff)
        except SiteUnreachable:
            pass
        if time.monotonic() - heard > config.stall_timeout_s:
            raise SiteError(
                f"site '{site}' showed no progress on {handoff.hop} for {config.stall_timeout_s:g} s "
                "(relay.stall_timeout_s); see whether it is up, then start the run again",
                site,
            )
        time.sleep(config.poll_s)


def fetch(courier: Courier, site: str, artefact: Artefact, store: ArtefactStore, part_bytes: int) -> int:
    """Bring an artefact that a report of `site` names into `store`; the bytes received in this call.

    Raises SiteError.
    """
    before = held = store.received_bytes(artefact)
    while held < artefact.size_bytes:
        request = Request("get", {**_name(artefact), "offset": held, "length": part_bytes})
        held = store.append(artefact, held, courier.call(site, request).blob)
    return held - before


def purge(courier: Courier, site: str, keep: set[str]) -> None:
    """Have `site` remove every artefact in its spool whose digest is not in `keep`."""
    courier.call(site, Request("purge", {"keep": ",".join(sorted(keep))}))


def checked(site: str, response: Response) -> Response:
    """`response`, unless it is an error answer: then raises SiteError. For couriers."""
    if "error" in response.fields:
        raise site_error(site, str(response.fields["error"]))
    return response


def site_error(site: str, error: str) -> SiteError:
    name = error if error.isascii() and error.isalpha() and len(error) <= 48 else "Error"
    text = f"site '{site}' failed with {name}; the site's own log (log/visit.log, log/desk.log) says why"
    return SiteError(text, site)


def _start(courier: Courier, site: str, handoff: HandOff) -> None:
    # Any number that was not used before marks a deliberate new attempt; a message sent twice carries the same.
    fields: dict[str, str | int] = {"handoff": to_bytes(handoff).decode(), "attempt": time.time_ns()}
    courier.call(site, Request("start", fields))


def _accept(report: Report, site: str, handoff: HandOff) -> Report:
    asked = (handoff.run, handoff.hop, site, handoff.plan_digest)
    if (report.run, report.hop, report.sender, report.plan_digest) != asked:
        raise ProtocolError(f"the report of site '{site}' does not answer hand-off {handoff.hop}")
    return report


def _name(artefact: Artefact) -> dict[str, str | int]:
    return {"sha256": artefact.sha256, "size": artefact.size_bytes}


def _number(site: str, response: Response, artefact: Artefact) -> int:
    held = int(response.fields["received"])
    if not 0 <= held <= artefact.size_bytes:
        raise ProtocolError(f"site '{site}' says it holds {held} of {artefact.size_bytes} bytes")
    return held
