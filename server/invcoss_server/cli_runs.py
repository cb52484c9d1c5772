"""The operator's commands for a federation: start the service, run a plan, watch it, and change its course."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from invcoss_common.command import AsJson, service_says, tell
from invcoss_common.config import load_plan
from invcoss_common.verifier import KnownHead, Last, show, tell_verified

commands = typer.Typer()

ConsortiumFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="the consortium's folder")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="name of the run, which is its plan's")]


@commands.command()
def start(
    folder: ConsortiumFolder,
    listen: Annotated[str, typer.Option(help="address of the interface that the gate listens on")] = "0.0.0.0",  # noqa: S104
    as_json: AsJson = False,
) -> None:
    """Serve the consortium until interrupted: SuperLink on loopback, the gate for its sites, and the runs."""
    from invcoss_server.service import Service  # here and below, because they need seconds to import

    Service(folder, listen, service_says(as_json)).serve()


@commands.command()
def run(
    folder: ConsortiumFolder,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the plan, a TOML file")],
    detach: Annotated[bool, typer.Option("--detach", help="do not watch")] = False,
    as_json: AsJson = False,
) -> None:
    """Have the service run a plan with its enrolled sites, and watch; interrupting ends the watching, not the run."""
    from invcoss_server.runs import add_run

    _watch(folder, add_run(folder, load_plan(plan)).plan.name, detach, as_json)


@commands.command()
def add_stage(
    folder: ConsortiumFolder,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the run's plan with further stages at its end")],
    detach: Annotated[bool, typer.Option("--detach", help="do not watch")] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a finished run: a site or modality joins, and no earlier stage is trained again."""
    from invcoss_server.runs import add_stages

    _watch(folder, add_stages(folder, load_plan(plan)).plan.name, detach, as_json)


@commands.command()
def status(
    folder: ConsortiumFolder,
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="only this run")] = None,
    as_json: AsJson = False,
) -> None:
    """Say where the runs stand, and when each site was last heard."""
    from invcoss_server.follow import describe, describe_all, is_served

    lines = [describe(folder, name)] if name else describe_all(folder)
    if as_json:
        print(json.dumps({"served": is_served(folder), "runs": [line.as_json() for line in lines]}))
        return
    console = Console()
    if not is_served(folder):
        console.print("the service does not run; invcoss-server start", style="bold")
    for line in lines:
        stands = f"{line.state} (for run {line.waits_for})" if line.waits_for else line.state
        table = Table("stage", "modality", "site", "state", "site last heard", title=f"run {line.run}: {stands}")
        for stage in line.stages:
            heard = "never" if stage.heard_s is None else f"{stage.heard_s:.0f} s ago"
            state = f"{stage.state} ({stage.error})" if stage.error else stage.state
            table.add_row(str(stage.stage), stage.modality, stage.site, state, heard)
        console.print(table)
        for text in filter(None, (line.doing, line.error)):
            console.print(text, markup=False, highlight=False, soft_wrap=True)


@commands.command()
def doctor(folder: ConsortiumFolder, as_json: AsJson = False) -> None:
    """Check, step by step, what the service needs, and if it runs, whether it answers, and nothing else does."""
    from invcoss_common.checkup import report
    from invcoss_server.doctor import examine

    raise typer.Exit(report(partial(examine, folder), as_json))


@commands.command()
def pause(folder: ConsortiumFolder, name: RunName, as_json: AsJson = False) -> None:
    """Take no further step of a run; what a site works on now it finishes and keeps."""
    from invcoss_server.runs import open_run

    open_run(folder, name).state.want("paused")
    text = f"run {name} is paused; invcoss-server resume goes on with it"
    tell(as_json, {"run": name, "wanted": "paused"}, text)


@commands.command()
def resume(folder: ConsortiumFolder, name: RunName, as_json: AsJson = False) -> None:
    """Go on with a run that was paused, stopped, or failed."""
    from invcoss_server.runs import open_run, resume

    resume(open_run(folder, name))
    tell(as_json, {"run": name, "wanted": "running"}, f"run {name} goes on")


@commands.command()
def stop(folder: ConsortiumFolder, name: RunName, as_json: AsJson = False) -> None:
    """End a run, also the work at the site that it is at; what is done is kept, and resume goes on with it."""
    from invcoss_server.runs import open_run

    open_run(folder, name).state.want("stopped")
    tell(as_json, {"run": name, "wanted": "stopped"}, f"run {name} is stopped; all that is done is kept")


@commands.command()
def skip_site(
    folder: ConsortiumFolder,
    name: RunName,
    site: Annotated[str, typer.Argument(metavar="SITE", help="its name")],
    as_json: AsJson = False,
) -> None:
    """Go on without a site: its stages that are not done are left out, and it evaluates no more."""
    from invcoss_server.runs import open_run, skip_site

    skip_site(open_run(folder, name), site)
    text = f"run {name} goes on without site {site}; add-stage can bring it back at the end"
    tell(as_json, {"run": name, "skipped": site}, text)


@commands.command()
def logs(
    folder: ConsortiumFolder,
    name: RunName,
    follow: Annotated[bool, typer.Option("--follow", help="go on as the run does")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what happened in a run, the oldest first."""
    from invcoss_server.events import Tail, waiting
    from invcoss_server.follow import follow as follow_run
    from invcoss_server.runs import EVENTS, open_run

    def show(event: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(event), flush=True)
        else:
            words = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
            waits = waiting(event) if event["event"] == "status" else ""
            print(f"{at} {event['event']} {waits or words}", flush=True)

    found = open_run(folder, name)
    if follow:
        follow_run(found, show, from_start=True)
    else:
        for event in Tail(found.folder / EVENTS, from_start=True).new():
            show(event)


@commands.command()
def ledger(folder: ConsortiumFolder, name: RunName, last: Last = None, as_json: AsJson = False) -> None:
    """Show what happened to a run; nothing is verified."""
    from invcoss_server.ledger import LEDGER
    from invcoss_server.runs import open_run

    show(open_run(folder, name).folder / LEDGER, last, as_json)


@commands.command()
def verify(folder: ConsortiumFolder, name: RunName, head: KnownHead = None, as_json: AsJson = False) -> None:
    """Verify the ledger of a run."""
    from invcoss_server.ledger import LEDGER, coordinator_key
    from invcoss_server.runs import open_run

    path = open_run(folder, name).folder
    key = coordinator_key(path)
    tell_verified(path / LEDGER, [key.public_key()] if key else [], head, as_json)


def _watch(folder: Path, name: str, detach: bool, as_json: bool) -> None:
    from invcoss_server.cli import show_result
    from invcoss_server.follow import follow, is_served
    from invcoss_server.progress import ProgressView
    from invcoss_server.runs import in_the_way, open_run

    found = open_run(folder, name)
    if not is_served(folder):
        _say(f"run {name} begins when the service is up: invcoss-server start {folder}")
    elif not found.is_alive() and not found.is_done():
        other = in_the_way(folder, found)
        when = f"when run {other} is over, which is at one of its sites" if other else "in a moment"
        _say(f"run {name}: the service starts it {when}")
    if detach:
        return
    with nullcontext() if as_json else ProgressView(found.plan) as view:
        show = (lambda event: print(json.dumps(event), flush=True)) if view is None else view.show
        try:
            follow(found, show, from_start=False)
        except KeyboardInterrupt:
            _say(f"the run goes on; see it with: invcoss-server status {folder} {name}")
            return
    if found.is_done():
        show_result(found.plan, found.folder, as_json)
    else:
        _say(f"run {name} is {found.state.wanted()}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
