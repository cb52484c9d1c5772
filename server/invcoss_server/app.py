"""The coordinator as a Flower ServerApp: a courier over Flower messages, and the relay started with it; wiring only."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import InvcossError, ProtocolError, SiteError, SiteUnreachable
from invcoss_common.records import Request, Response, negotiate
from invcoss_common.supervise import alone
from invcoss_common.wire import decode_response, encode_request
from invcoss_server.courier import checked
from invcoss_server.events import Events
from invcoss_server.orders import RunHalted, SiteSkipped, heed
from invcoss_server.registry import Registry
from invcoss_server.relay import relay
from invcoss_server.runs import CONSORTIUM, EVENTS, LOCK, Outcome, open_run, write_outcome
from invcoss_server.signatures import Signatures, load_signatures
from invcoss_server.state import RunState

POLL_S = 0.05  # Flower's own send_and_receive looks for replies every 3 s
RETRY_S = 1.0
SLOWEST_BYTES_PER_S = 16 << 10  # a part that crosses more slowly is sent again
RAISED = 2  # Flower's code of an app that raised; ours never does, so it is the launcher that refused


class NodeInfo(Protocol):
    """What Flower says of a node that is online; all but the id comes from its registration."""

    node_id: int
    name: str
    public_key: bytes


class _Node(NamedTuple):
    id: int
    protocol: int


Identify = Callable[[NodeInfo], str | None]
OnAbsent = Callable[[str, int, float], None]


class FlowerCourier:
    """Carries messages to the Flower nodes of the plan's sites.

    `identify(node)` says which site a node is, None if it is none of ours, "" if it may say so itself.
    `on_absent(site, tries so far, seconds since the first)` is called between two tries; it raises what shall end them.
    """

    def __init__(
        self, grid: Grid, plan: Plan, identify: Identify, on_absent: OnAbsent, signatures: Signatures | None
    ) -> None:
        self.grid = grid
        self.plan = plan
        self.identify = identify
        self.on_absent = on_absent
        self.signatures = signatures
        self.nodes: dict[str, _Node] = {}

    def call(self, site: str, request: Request) -> Response:
        began, tried = time.monotonic(), 0
        while True:
            if site not in self.nodes:
                self.nodes |= self._greet(site)
            if node := self.nodes.get(site):
                response = self._ask(node.id, replace(request, protocol=node.protocol), site)
                if response is not None:
                    return checked(site, response)
            self.nodes.pop(site, None)  # a site that is back may be another node
            tried += 1
            self.on_absent(site, tried, time.monotonic() - began)
            time.sleep(RETRY_S)

    def protocol(self, site: str) -> int:
        if site not in self.nodes:
            self.call(site, Request("hello"))
        return self.nodes[site].protocol

    def sign(self, handoff: bytes) -> str:
        return self.signatures.sign(handoff) if self.signatures else ""

    def check(self, site: str, report: bytes, signature: str) -> None:
        if self.signatures:
            self.signatures.check(site, report, signature)

    def _greet(self, wanted: str) -> dict[str, _Node]:
        """Node by name of site, of `wanted` and of those that must be asked who they are.

        Raises ProtocolError when no version of the protocol is spoken by both sides, or a node says that it is another
        site than the one whose key it has.
        """
        nodes: dict[str, _Node] = {}
        for info in self.grid.get_nodes():
            known = self.identify(info)
            if known is None or (known and known != wanted):
                continue
            response = self._ask(info.node_id, Request("hello"), known or f"node {info.node_id}")
            if response is None or "error" in response.fields:
                continue
            site = str(response.fields["site"])
            if known and site != known:
                raise ProtocolError(
                    f"the node with the key of site '{known}' says that it is site '{_printable(site, 48)}'"
                )
            if site in nodes:
                raise SiteError(f"two nodes say that they are site '{site}'; stop one of them", site)
            if site in self.plan.sites:
                nodes[site] = _Node(info.node_id, negotiate(int(response.fields["protocol"]), site))
        return nodes

    def _ask(self, node: int, request: Request, who: str) -> Response | None:
        """The answer of a node, or None when Flower reports that it is away or nothing comes.

        Raises SiteError when the site refuses our app bundle.
        """
        size = len(request.blob) + int(request.fields.get("length", 0))
        patience_s = self.plan.relay.answer_s + size / SLOWEST_BYTES_PER_S
        message = Message(encode_request(request), node, "query", ttl=patience_s)
        sent = list(self.grid.push_messages([message]))
        deadline = time.monotonic() + patience_s
        while sent and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(sent):
                if not reply.has_error():
                    return decode_response(reply.content, request)
                if reply.error.code == RAISED:
                    raise SiteError(f"site '{who}' refuses our app: {_printable(reply.error.reason or '')}", who)
                return None
            time.sleep(POLL_S)
        return None


def by_word(info: NodeInfo) -> str | None:
    """A simulation's nodes are ours: each is the site that it says it is."""
    return ""


def by_key(registry: Registry) -> Identify:
    """A federation's node is the site whose key Flower checked."""

    def identify(info: NodeInfo) -> str | None:
        found = registry.find(info.public_key.decode("ascii"))
        return found.name if found is not None and not found.revoked else None

    return identify


def give_up(plan: Plan) -> OnAbsent:
    """A simulation's sites are there or broken: raise SiteUnreachable after the tries of the plan."""

    def on_absent(site: str, tried: int, seconds: float) -> None:
        if tried >= plan.relay.attempts:
            raise SiteUnreachable(
                f"site '{site}' did not answer in {tried} tries (relay.attempts); see whether its service is up. "
                f"In a simulation, num-supernodes must be {len(plan.sites)} for this plan",
                site,
            )

    return on_absent


def wait_for(plan: Plan, state: RunState, events: Events) -> OnAbsent:
    """A federation waits for a site as long as the operator and the plan want it to."""

    def on_absent(site: str, tried: int, seconds: float) -> None:
        heed(state)
        if tried == 1:
            events.add("absent", site=site)
        limit = plan.relay.skip_absent_s
        if site in state.skipped_sites() or (limit is not None and seconds > limit):
            raise SiteSkipped(site)

    return on_absent


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the relay that the run's config names, and leave in its folder how it ended."""
    if run_name := str(context.run_config.get("run", "")):
        folder = Path(os.environ[CONSORTIUM])
        run = open_run(folder, run_name)
        out, plan = run.folder, run.plan
        signatures = load_signatures(folder)
        identify = by_key(signatures.registry)
        on_absent = wait_for(plan, run.state, Events(out / EVENTS))
    else:
        out, plan = Path(str(context.run_config["out"])).resolve(), load_plan(Path(str(context.run_config["plan"])))
        identify, on_absent, signatures = by_word, give_up(plan), None
    with alone(out / LOCK, f"{out}: another process runs this relay"):
        try:
            relay(plan, FlowerCourier(grid, plan, identify, on_absent, signatures), out)
        except RunHalted as halt:
            write_outcome(out, Outcome(type(halt).__name__, str(halt)))
        except Exception as error:
            text = str(error) if isinstance(error, InvcossError) else ""
            site = error.site if isinstance(error, SiteError) else ""
            write_outcome(out, Outcome(type(error).__name__, text, site))
            raise
        else:
            write_outcome(out, Outcome())


def _printable(text: str, most: int = 300) -> str:
    found = re.search(r"<'(.*)'>", text, re.DOTALL)
    return "".join(c for c in (found[1] if found else text)[:most] if c.isprintable())
