"""A site as a Flower ClientApp: every message goes to the desk, every answer back; wiring only."""

from __future__ import annotations

import os
import traceback
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from invcoss_common.config import load_plan
from invcoss_common.records import Response
from invcoss_common.wire import decode_request, encode_response
from invcoss_site.desk import answer
from invcoss_site.home import SiteHome, load_home
from invcoss_site.simulated import simulated_home
from invcoss_site.work import error_class, start_process

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer one request. Nothing is raised: Flower would send the text of the error to the coordinator."""
    try:
        home = _home(context)
        # In a simulation nobody is left to stop a worker, so it ends with the process that plays the site.
        start_work = partial(start_process, parent=None if "home" in context.node_config else os.getpid())
        response = answer(decode_request(message.content), home, start_work)
    except Exception as error:
        traceback.print_exc()
        response = Response({"error": error_class(error)})
    return Message(encode_response(response), reply_to=message)


def _home(context: Context) -> SiteHome:
    """The folder named in the node's config; in a simulation, the one made for this node's site of the plan."""
    if "home" in context.node_config:
        return load_home(Path(str(context.node_config["home"])))
    config = {name: str(context.run_config[name]) for name in ("plan", "data", "out")}
    plan = load_plan(Path(config["plan"]))
    site = plan.sites[int(context.node_config["partition-id"])]
    return simulated_home(plan, site, Path(config["data"]) if config["data"] else None, Path(config["out"]))
