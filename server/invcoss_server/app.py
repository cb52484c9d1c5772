"""The coordinator as a Flower ServerApp: a courier over Flower messages, and the relay started with it; wiring only."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from invcoss_common.canonical import write_atomic
from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import InvcossError, ProtocolError, SiteError, SiteUnreachable
from invcoss_common.records import PROTOCOL_VERSION, Request, Response
from invcoss_common.wire import decode_response, encode_request
from invcoss_server.courier import checked
from invcoss_server.relay import relay
from invcoss_server.simulate import OUTCOME

POLL_S = 0.05  # Flower's own send_and_receive looks for replies every 3 s
TTL_S = 600.0  # Flower's life time of one message
RETRY_S = 1.0


class FlowerCourier:
    """Carries messages to the Flower nodes that say which of the plan's sites they are."""

    def __init__(self, grid: Grid, plan: Plan) -> None:
        self.grid = grid
        self.plan = plan
        self.nodes: dict[str, int] = {}

    def call(self, site: str, request: Request) -> Response:
        for tried in range(self.plan.relay.attempts):
            time.sleep(RETRY_S if tried else 0)
            if site not in self.nodes:
                self.nodes = self._greet_all()
            if site in self.nodes and (response := self._ask(self.nodes[site], request)):
                return checked(site, response)
            self.nodes.pop(site, None)  # a site that is back may be another node
        raise SiteUnreachable(
            f"site '{site}' did not answer in {self.plan.relay.attempts} tries (relay.attempts); see whether its "
            f"service is up. In a simulation, num-supernodes must be {len(self.plan.sites)} for this plan",
            site,
        )

    def _greet_all(self) -> dict[str, int]:
        """Node id by name of site; raises ProtocolError when a site speaks another protocol."""
        nodes: dict[str, int] = {}
        for info in self.grid.get_nodes():
            response = self._ask(info.node_id, Request("hello"))
            if response is None or "error" in response.fields:
                continue
            site, protocol = str(response.fields["site"]), response.fields["protocol"]
            if site not in self.plan.sites or (info.name and info.name != site):
                continue  # in a deployment the name that the operator registered must agree
            if protocol != PROTOCOL_VERSION:
                raise ProtocolError(f"site '{site}' speaks protocol {protocol}, the coordinator {PROTOCOL_VERSION}")
            if site in nodes:
                raise SiteError(f"two nodes say that they are site '{site}'; stop one of them", site)
            nodes[site] = info.node_id
        return nodes

    def _ask(self, node: int, request: Request) -> Response | None:
        """The answer of a node, or None when Flower reports an error or nothing comes."""
        message = Message(encode_request(request), node, "query", ttl=TTL_S)
        sent = list(self.grid.push_messages([message]))
        deadline = time.monotonic() + TTL_S
        while sent and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(sent):
                return None if reply.has_error() else decode_response(reply.content, request.verb)
            time.sleep(POLL_S)
        return None


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the relay of the plan named in the run's config, and leave in its folder how it ended."""
    out = Path(str(context.run_config["out"])).resolve()
    try:
        plan = load_plan(Path(str(context.run_config["plan"])))
        relay(plan, FlowerCourier(grid, plan), out)
    except Exception as error:
        text = str(error) if isinstance(error, InvcossError) else ""
        site = error.site if isinstance(error, SiteError) else ""
        _leave_outcome(out, {"error": type(error).__name__, "text": text, "site": site})
        raise
    _leave_outcome(out, {"error": "", "text": "", "site": ""})


def _leave_outcome(out: Path, outcome: dict[str, str]) -> None:
    write_atomic(out / OUTCOME, json.dumps(outcome).encode())
