"""The runs of a consortium, each in a folder of its own: what the operator's commands and the service read and write.

FOLDER/runs/NAME/   state.db, events.jsonl, artefacts, models, pools, report.html (as a simulation's), and
    relay.lock      held by the process that runs the relay
    outcome.json    how the last attempt ended
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from invcoss_common import errors
from invcoss_common.canonical import write_atomic
from invcoss_common.config import Plan
from invcoss_common.errors import CredentialError, InvcossError, PlanError, SiteError, SiteUnreachable
from invcoss_common.supervise import is_locked
from invcoss_server.provision import load_consortium, sites
from invcoss_server.state import RunState

CONSORTIUM = "INVCOSS_CONSORTIUM"  # environment variable that names the consortium's folder to the ServerApp
RUNS = "runs"
LOCK = "relay.lock"
OUTCOME = "outcome.json"  # how the last attempt ended, left there by the ServerApp
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: class and text of the error, and the site it is about; all empty after a good end."""

    error: str = ""
    text: str = ""
    site: str = ""

    @property
    def needs_operator(self) -> bool:
        """Whether the run would fail the same way again; not when a site was away, or Flower or the machine failed."""
        ours = isinstance(getattr(errors, self.error, None), type)
        return bool(self.error) and ours and self.error != SiteUnreachable.__name__


@dataclass(frozen=True)
class Run:
    """One run: its folder, state and plan."""

    folder: Path
    state: RunState
    plan: Plan

    def outcome(self) -> Outcome | None:
        """How the last attempt ended, None if there was none or it goes on."""
        return read_outcome(self.folder)

    def is_alive(self) -> bool:
        """Whether a process runs the relay now."""
        return is_locked(self.folder / LOCK)

    def sites(self) -> set[str]:
        """The sites that the run still asks."""
        return set(self.plan.sites) - self.state.skipped_sites()

    def is_done(self) -> bool:
        """Whether the relay ended well: every stage is released or skipped, and published."""
        stages = range(len(self.plan.stages))
        done = all(self.state.stage(number).state in ("released", "skipped") for number in stages)
        return done and self.outcome() == Outcome()


def open_run(folder: Path, name: str) -> Run:
    """The run `name` of the consortium in `folder`; raises PlanError when there is none."""
    load_consortium(folder)
    path = folder / RUNS / name
    if not (path / "state.db").is_file():
        known = ", ".join(names(folder)) or "none"
        raise PlanError(f"there is no run '{name}' here; the runs are: {known}")
    return Run(path, *RunState.open(path / "state.db"))


def names(folder: Path) -> list[str]:
    """Names of all runs, the oldest first."""
    found = (folder / RUNS).glob("*/state.db")
    return [file.parent.name for file in sorted(found, key=lambda file: file.parent.stat().st_ctime)]


def add_run(folder: Path, plan: Plan) -> Run:
    """Enter a plan as a run that shall go on, or make a paused run of this very plan go on.

    Raises CredentialError when one of its sites is not enrolled, PlanError when the name is taken by another plan.
    """
    check_enrolled(folder, plan)
    path = folder / RUNS / plan.name
    if (path / "state.db").is_file():
        run = open_run(folder, plan.name)
        if run.plan != plan:
            raise PlanError(
                f"run '{plan.name}' is of another plan; give this one another name, "
                "or, if it only adds stages, use add-stage"
            )
    else:
        run = Run(path, RunState(path / "state.db", plan), plan)
    resume(run)
    return run


def add_stages(folder: Path, plan: Plan) -> Run:
    """Add the further stages of `plan` to the finished run of its name; raises CredentialError or PlanError."""
    check_enrolled(folder, plan)
    run = open_run(folder, plan.name)
    run.state.extend(run.plan, plan)
    run = Run(run.folder, run.state, plan)
    resume(run)
    return run


def resume(run: Run) -> None:
    """Have a run go on, also after an error that ended it; one that is done stays so."""
    run.state.want("running")
    if not run.is_alive() and not run.is_done():
        (run.folder / OUTCOME).unlink(missing_ok=True)


def skip_site(run: Run, site: str) -> None:
    """Have a run go on without `site`; raises PlanError when no stage is there."""
    if site not in run.plan.sites:
        raise PlanError(f"run '{run.plan.name}' has no stage at site '{site}'; its sites: {', '.join(run.plan.sites)}")
    run.state.skip(site)
    if run.state.wanted() == "running":
        resume(run)


def in_the_way(folder: Path, run: Run, is_busy: Callable[[Run], bool] = Run.is_alive) -> str:
    """Another run that is busy at one of this run's sites, "" if there is none: a site serves one run at a time."""
    for name in names(folder):
        if name != run.plan.name and is_busy(other := open_run(folder, name)) and other.sites() & run.sites():
            return name
    return ""


def check_enrolled(folder: Path, plan: Plan) -> None:
    """Raise CredentialError unless every site of `plan` is enrolled and not revoked."""
    valid = {site.name for site in sites(folder) if site.revoked is None}
    if missing := [site for site in plan.sites if site not in valid]:
        raise CredentialError(f"site '{missing[0]}' of this plan is not enrolled; enrol-site takes its request")


def write_outcome(folder: Path, outcome: Outcome) -> None:
    write_atomic(folder / OUTCOME, json.dumps(outcome.__dict__).encode())


def read_outcome(folder: Path) -> Outcome | None:
    with suppress(FileNotFoundError):
        return Outcome(**json.loads((folder / OUTCOME).read_bytes()))
    return None


def raise_outcome(outcome: Outcome, log: Path) -> None:
    """Raise the error that ended an attempt, if one did; `log` is where more stands."""
    if not outcome.error:
        return
    if outcome.site:
        raise SiteError(outcome.text, outcome.site)
    kind = getattr(errors, outcome.error, None)
    if kind is None:
        raise InvcossError(outcome.text or f"the coordinator failed with {outcome.error}; see {log}")
    raise kind(outcome.text)
