"""A courier that never leaves the process: messages cross the wire format, `start` answers when the work is done."""

from __future__ import annotations

import os
from collections.abc import Callable

from invcoss_common.records import Request, Response
from invcoss_common.wire import decode_request, decode_response, encode_request, encode_response
from invcoss_server.courier import checked
from invcoss_site.desk import answer
from invcoss_site.home import SiteHome
from invcoss_site.work import Visit, take_lock, work


def work_here(visit: Visit) -> Callable[[SiteHome, str], None]:
    """A `start_work` for the desk that runs `visit` to its end in this process."""

    def start(home: SiteHome, hop: str) -> None:
        lock = take_lock(home, hop)
        assert lock is not None
        try:
            work(home, hop, visit)
        finally:
            os.close(lock)

    return start


class LoopbackCourier:
    """Reaches the sites in `homes`; `visit` is what they run. `calls` counts messages by site and verb."""

    def __init__(self, homes: dict[str, SiteHome], visit: Visit) -> None:
        self.homes = homes
        self.start_work = work_here(visit)
        self.calls: list[tuple[str, str]] = []

    def call(self, site: str, request: Request) -> Response:
        self.calls.append((site, request.verb))
        arrived = decode_request(encode_request(request))
        response = answer(arrived, self.homes[site], self.start_work)
        return checked(site, decode_response(encode_response(response), request.verb))
