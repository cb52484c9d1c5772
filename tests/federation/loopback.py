"""A courier that never leaves the process: messages cross the wire format, `start` answers when the work is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from flwr.app import RecordDict

from invcoss_common.records import Request, Response, negotiate
from invcoss_common.wire import decode_response, encode_request
from invcoss_server.courier import checked
from invcoss_site.app import reply
from invcoss_site.home import SiteHome
from invcoss_site.work import Visit, take_lock, work

StartWork = Callable[[SiteHome, str], None]
Site = Callable[[RecordDict, SiteHome, StartWork], RecordDict]


def work_here(visit: Visit) -> StartWork:
    """A `start_work` for the desk that runs `visit` to its end in this process."""

    def start(home: SiteHome, hop: str) -> None:
        lock = take_lock(home, hop)
        assert lock is not None
        try:
            work(home, hop, visit)
        finally:
            os.close(lock)

    return start


site_of_today: Site = reply  # what a site's Flower app does with a message


def lift_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sites let out whatever a visit makes up, as hostile ones would; the guard itself is in tests/site_client."""
    monkeypatch.setattr("invcoss_site.guard_report.released", lambda report, *_: report)
    monkeypatch.setattr("invcoss_site.desk.check_response", lambda *_: None)


class LoopbackCourier:
    """Reaches the sites in `homes`; `visit` is what they run. `calls` counts messages by site and verb.

    `others` are sites that run other software than today's.
    """

    def __init__(self, homes: dict[str, SiteHome], visit: Visit, others: dict[str, Site] | None = None) -> None:
        self.homes = homes
        self.start_work = work_here(visit)
        self.others = others or {}
        self.calls: list[tuple[str, str]] = []
        self.protocols: dict[str, int] = {}

    def call(self, site: str, request: Request) -> Response:
        self.calls.append((site, request.verb))
        return self.carry(site, replace(request, protocol=self.protocol(site)))

    def protocol(self, site: str) -> int:
        if site not in self.protocols:
            hello = self.carry(site, Request("hello"))
            self.protocols[site] = negotiate(int(hello.fields["protocol"]), site)
        return self.protocols[site]

    def sign(self, handoff: bytes) -> str:
        return ""

    def check(self, site: str, report: bytes, signature: str) -> None:
        pass

    def carry(self, site: str, request: Request) -> Response:
        software = self.others.get(site, site_of_today)
        answered = software(encode_request(request), self.homes[site], self.start_work)
        return checked(site, decode_response(answered, request))
