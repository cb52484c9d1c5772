"""What an operator sees of a run: its events as they come, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from invcoss_common.supervise import is_locked
from invcoss_server.events import Tail, waiting
from invcoss_server.gate import read_seen
from invcoss_server.runs import EVENTS, Run, in_the_way, names, open_run, raise_outcome

LOOK_S = 0.3


@dataclass(frozen=True)
class StageLine:
    """One stage; `heard_s` is how long ago its site was last heard, None if never since the service was made."""

    stage: int
    site: str
    modality: str
    state: str
    error: str
    heard_s: float | None


@dataclass(frozen=True)
class RunLine:
    """Where a run stands. `state`: running, waiting (to be started), failed, finished, (being) paused or stopped.

    `waits_for` names the run that a waiting one waits for, because it is at one of its sites.
    """

    run: str
    state: str
    waits_for: str
    doing: str
    error: str
    stages: tuple[StageLine, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def follow(run: Run, on_event: Callable[[dict[str, Any]], None], from_start: bool) -> None:
    """Pass on the events of a run until it is done, halted or failed; raises InvcossError as the relay did."""
    events = Tail(run.folder / EVENTS, from_start)
    while True:
        over = _is_over(run)  # first, so that the last events are seen
        for event in events.new():
            on_event(event)
        if over:
            break
        time.sleep(LOOK_S)
    outcome = run.outcome()
    if outcome is not None and not run.is_done() and outcome.error != "RunHalted":
        raise_outcome(outcome, run.folder / EVENTS)


def describe(folder: Path, name: str) -> RunLine:
    """Where the run `name` stands; raises PlanError when there is none."""
    run, seen, now = open_run(folder, name), read_seen(folder), time.time()
    outcome, last = run.outcome(), _last_event(run)
    failed = outcome is not None and outcome.needs_operator
    stages = []
    for number, planned in enumerate(run.plan.stages):
        stage, heard = run.state.stage(number), seen.get(planned.site)
        ago = None if heard is None else round(max(now - heard, 0.0), 1)
        stages.append(StageLine(number + 1, planned.site, planned.modality, stage.state, stage.error, ago))
    if run.is_done():
        state = "finished"
    elif run.state.wanted() != "running":
        state = run.state.wanted() if not run.is_alive() else f"being {run.state.wanted()}"
    else:
        state = "running" if run.is_alive() else "failed" if failed else "waiting"
    text = outcome.text or outcome.error if outcome is not None and outcome.error != "RunHalted" else ""
    waits_for = in_the_way(folder, run) if state == "waiting" else ""
    return RunLine(name, state, waits_for, _words(last) if state == "running" else "", text, tuple(stages))


def describe_all(folder: Path) -> list[RunLine]:
    """Where every run of the consortium stands, the oldest first."""
    return [describe(folder, name) for name in names(folder)]


def is_served(folder: Path) -> bool:
    """Whether `invcoss-server start` runs for this consortium."""
    return is_locked(folder / "service.lock")


def _is_over(run: Run) -> bool:
    if run.is_alive():
        return False
    outcome = run.outcome()
    if run.is_done() or (outcome is not None and outcome.needs_operator):
        return True
    return run.state.wanted() != "running"


def _last_event(run: Run) -> dict[str, Any]:
    events = Tail(run.folder / EVENTS, from_start=True).new()
    return events[-1] if events else {}


def _words(event: dict[str, Any]) -> str:
    match event.get("event"):
        case "status":
            if waits := waiting(event):
                return waits
            step = f" {event['step']}/{event['steps']}" if event["steps"] else ""
            return f"{event['hop']} at {event['site']}: {event['state']}, {event['phase']}{step}"
        case "inversion":
            return f"inversion of stage {event['stage'] + 1}: step {event['step']}/{event['steps']}"
        case "absent":
            return f"waiting for site {event['site']}, which is away"
        case "closed":
            return f"{event['hop']}: site {event['site']} lets no artefact cross now"
        case "stage":
            return f"stage {event['stage'] + 1} begins at {event['site']}"
        case _:
            return ""
