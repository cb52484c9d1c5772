"""A whole federation on one machine: the coordinator and the sites of a plan in one private Flower run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import DataError, InvcossError, PlanError
from invcoss_common.supervise import alone
from invcoss_server.events import Tail
from invcoss_server.flower_run import MARK, FlowerRun, end_marked
from invcoss_server.runs import EVENTS, OUTCOME, raise_outcome, read_outcome

LOG = "flower.log"

LOOK_S = 0.2  # pause between two looks at the events
ASK_FLOWER_S = 30.0  # pause between two questions whether the run ended without an outcome; each costs a second of CPU
WIND_DOWN_S = 60.0  # longest that Flower takes to end a run whose relay has ended
TAIL_LINES = 60

OnEvent = Callable[[dict[str, Any]], None]


def simulate(plan_path: Path, data: Path | None, out: Path, on_event: OnEvent) -> None:
    """Run a plan with every site on this machine; `on_event` gets each line that the relay adds to its events.

    A run that was interrupted goes on where it stood when started again with the same `out`. Raises InvcossError: what
    the relay raised, after printing the log of the site or coordinator that failed. No process is left behind.
    """
    plan = load_plan(plan_path)
    check_sources(plan, data)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = {"plan": str(plan_path.resolve()), "data": str(data.resolve()) if data else "", "out": str(out)}
    complaint = f"{out}: another simulation is running here; wait for it, or choose another --out"
    with (
        alone(out / "simulate.lock", complaint),
        _signals_as_exceptions(),
        tempfile.TemporaryDirectory(prefix="invcoss-") as scratch,
    ):
        end_marked(str(out))  # what a killed simulation left
        (out / OUTCOME).unlink(missing_ok=True)
        (out / LOG).unlink(missing_ok=True)
        try:
            _make_sites(plan, config, on_event)
            _follow(FlowerRun(Path(scratch), out / LOG, str(out), len(plan.sites), config), out, on_event)
        finally:
            end_marked(str(out))
    _raise_failure(out)


def check_sources(plan: Plan, data: Path | None) -> None:
    """Raise PlanError or DataError unless the plan and `data` say where every site's images are."""
    for site in plan.sites:
        source = plan.simulation.get(site)
        if source is None:
            raise PlanError(f"site '{site}' has no images; add [simulation.{site}] with phantoms or folder to the plan")
        if source.folder is None:
            continue
        if data is None:
            raise DataError(f"site '{site}' reads its images from '{source.folder}'; say with --data where that is")
        if not (data / source.folder).is_dir():
            raise DataError(f"{data / source.folder}: no such folder; site '{site}' reads its images from there")


def _make_sites(plan: Plan, config: dict[str, str], on_event: OnEvent) -> None:
    """Make the sites' folders before Flower starts, in processes of their own: phantoms take a while.

    The sites' package is called by name, as Flower does it: the coordinator's code does not stand on it.
    """
    command = [sys.executable, "-m", "invcoss_site.simulated", config["plan"], config["out"]]
    command += [config["data"]] if config["data"] else []
    env = {**os.environ, MARK: config["out"]}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stderr
        on_event({"event": "sites", "done": 0, "of": len(plan.sites)})
        for done, _ in enumerate(child.stdout, start=1):
            on_event({"event": "sites", "done": done, "of": len(plan.sites)})
        complaint = child.stderr.read().strip()
    if child.returncode != 0:
        kinds = {kind.exit_code: kind for kind in (PlanError, DataError)}
        raise kinds.get(child.returncode, InvcossError)(complaint.splitlines()[-1] if complaint else "no site folders")


def _follow(run: FlowerRun, out: Path, on_event: OnEvent) -> None:
    """Pass on events until the relay has left its outcome and Flower has ended the run, or Flower alone has."""
    events, next_question = Tail(out / EVENTS), time.monotonic() + ASK_FLOWER_S
    while not (out / OUTCOME).exists():
        for event in events.new():
            on_event(event)
        if time.monotonic() > next_question:
            if run.ended():
                break
            next_question = time.monotonic() + ASK_FLOWER_S
        time.sleep(LOOK_S)
    for event in events.new():
        on_event(event)
    deadline = time.monotonic() + WIND_DOWN_S
    while not run.ended() and time.monotonic() < deadline:
        time.sleep(1.0)


def _raise_failure(out: Path) -> None:
    """Raise what the relay raised, if it did; the log that explains it goes to stderr first."""
    outcome = read_outcome(out)
    if outcome is None:
        _print_tail(out / LOG)
        raise InvcossError(f"the coordinator ended without a word; see {out / LOG}")
    if outcome.site:
        logs = (out / "sites" / outcome.site / "log").glob("*.log")
        _print_tail(max(logs, key=lambda log: log.stat().st_mtime, default=out / LOG))
    elif outcome.error and not outcome.text:
        _print_tail(out / LOG)
    raise_outcome(outcome, out / LOG)


def _print_tail(log: Path) -> None:
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        print(f"--- end of {log}", *lines, "---", sep="\n", file=sys.stderr)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that what was started is ended, as KeyboardInterrupt does for SIGINT."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
