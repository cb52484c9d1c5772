"""A site as a Flower ClientApp: every message goes to the desk, every answer back; wiring only."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from invcoss_common.config import load_plan
from invcoss_common.errors import EgressRefused, ProtocolError, error_class
from invcoss_common.records import Request, Response
from invcoss_common.wire import decode_request, decode_response, encode_response
from invcoss_site.desk import answer, refuse
from invcoss_site.home import SiteHome, load_home
from invcoss_site.node import remember_node
from invcoss_site.simulated import simulated_home
from invcoss_site.work import start_process

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer one request. Nothing is raised: Flower would send the text of the error to the coordinator."""
    try:
        if "home" in context.node_config:
            home, start_work = load_home(Path(str(context.node_config["home"]))), leave_to_agent
            remember_node(home, context.node_id)
        else:  # nobody is left to stop a worker, so it ends with the process that plays the site
            home, start_work = _simulated(context), start_beside
        content = reply(message.content, home, start_work)
    except Exception as error:
        traceback.print_exc()
        content = encode_response(Response({"error": error_class(error)}))
    return Message(content, reply_to=message)


def reply(record: RecordDict, home: SiteHome, start_work: Callable[[SiteHome, str], object]) -> RecordDict:
    """The record that answers `record`: that of the desk, which the guard has seen, and as it leaves nothing else."""
    request = None
    try:
        request = decode_request(record)
        response = answer(request, home, start_work)
    except ProtocolError as error:
        response = refuse(home, None, error)
    leaving = encode_response(response)
    seen = decode_response(leaving, request or Request("hello"))  # an error has the same form in all answers
    if seen != response:
        refused = EgressRefused("the record that would leave is not what the guard has seen")
        return encode_response(refuse(home, request, refused))
    return leaving


def start_beside(home: SiteHome, hop: str) -> None:
    """Start the worker of a hop here; it ends with this process."""
    start_process(home, hop, parent=os.getpid())


def leave_to_agent(home: SiteHome, hop: str) -> None:
    """The site agent sees in the spool that a hop waits; this process must not read the site's images."""


def _simulated(context: Context) -> SiteHome:
    """The folder made for this node's site of the plan."""
    config = {name: str(context.run_config[name]) for name in ("plan", "data", "out")}
    plan = load_plan(Path(config["plan"]))
    site = plan.sites[int(context.node_config["partition-id"])]
    return simulated_home(plan, site, Path(config["data"]) if config["data"] else None, Path(config["out"]))
