"""What the operator asked of a run meanwhile: pause, stop, skip a site; a courier that heeds it at every message."""

from __future__ import annotations

from dataclasses import dataclass

from invcoss_common.records import Request, Response
from invcoss_server.courier import Courier
from invcoss_server.state import RunState


class RunHalted(Exception):
    """The operator asked to pause or stop the run."""


class SiteSkipped(Exception):
    """The operator asked to go on without this site."""


@dataclass(frozen=True)
class HeedingCourier:
    """`courier`, unless the operator asked for something else before the message."""

    courier: Courier
    state: RunState

    def call(self, site: str, request: Request) -> Response:
        self._heed(site)
        return self.courier.call(site, request)

    def protocol(self, site: str) -> int:
        self._heed(site)
        return self.courier.protocol(site)

    def sign(self, handoff: bytes) -> str:
        return self.courier.sign(handoff)

    def check(self, site: str, report: bytes, signature: str) -> None:
        self.courier.check(site, report, signature)

    def _heed(self, site: str) -> None:
        heed(self.state)
        if site in self.state.skipped_sites():
            raise SiteSkipped(site)


def heed(state: RunState) -> None:
    """Raise RunHalted if the run shall not go on now."""
    if state.wanted() != "running":
        raise RunHalted(state.wanted())
