"""Where a run stands, in one SQLite file: every step is written before it is acted on, so that a killed run goes on.

A stage goes waiting -> visiting -> received -> inverting -> released; `failed` names a stage whose last attempt broke
off, and starting the run again goes on with it. Artefacts are named here and lie in the artefact store.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from invcoss_common.config import Plan
from invcoss_common.errors import PlanError
from invcoss_common.records import Artefact, Report, from_bytes, to_bytes

StageState = Literal["waiting", "visiting", "received", "inverting", "released", "failed"]

_TABLES = """
CREATE TABLE IF NOT EXISTS run (plan_digest TEXT NOT NULL, plan TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS stage (
    stage INTEGER PRIMARY KEY, state TEXT NOT NULL, error TEXT NOT NULL DEFAULT '', changed REAL NOT NULL,
    model TEXT, statistics TEXT, pool TEXT, inversion_s REAL
);
CREATE TABLE IF NOT EXISTS hop (
    hop TEXT PRIMARY KEY, stage INTEGER NOT NULL, of_stage INTEGER NOT NULL, site TEXT NOT NULL, report TEXT NOT NULL,
    sent_bytes INTEGER NOT NULL, received_bytes INTEGER NOT NULL,
    deliver_s REAL NOT NULL, work_s REAL NOT NULL, fetch_s REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Stage:
    """One stage: its state and what it has produced so far; `inversion_s` is the time its pool took."""

    number: int
    state: StageState = "waiting"
    error: str = ""
    model: Artefact | None = None
    statistics: Artefact | None = None
    pool: Artefact | None = None
    inversion_s: float = 0.0


@dataclass(frozen=True)
class Hop:
    """One finished piece of work at a site, in stage `stage`, on the modality of stage `of_stage`."""

    hop: str
    stage: int
    of_stage: int
    site: str
    report: Report
    sent_bytes: int
    received_bytes: int
    deliver_s: float
    work_s: float
    fetch_s: float


class RunState:
    """The state of the run in `path`, made for `plan` if it is new; raises PlanError if it belongs to another plan."""

    def __init__(self, path: Path, plan: Plan) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._transaction() as db:
            db.executescript(_TABLES)
            known = db.execute("SELECT plan_digest FROM run").fetchone()
            if known is None:
                row = (plan.digest(), plan.model_dump_json(), time.time())
                db.execute("INSERT INTO run VALUES (?, ?, ?)", row)
            elif known[0] != plan.digest():
                raise PlanError(f"{path.parent} holds a run of another plan; choose another --out, or remove it")

    def stage(self, number: int) -> Stage:
        with self._transaction() as db:
            row = db.execute(
                "SELECT state, error, model, statistics, pool, inversion_s FROM stage WHERE stage = ?", (number,)
            ).fetchone()
        if row is None:
            return Stage(number)
        model, statistics, pool = (Artefact.model_validate_json(text) if text else None for text in row[2:5])
        return Stage(number, row[0], row[1], model, statistics, pool, row[5] or 0.0)

    def move(self, number: int, state: StageState, error: str = "", **produced: Artefact | float) -> None:
        """Set the state of a stage, and what it has produced by then (`model`, `statistics`, `pool`, `inversion_s`)."""
        assert state in get_args(StageState)
        values = {
            name: value.model_dump_json() if isinstance(value, Artefact) else value for name, value in produced.items()
        }
        columns = {"state": state, "error": error, "changed": time.time(), **values}
        names = ", ".join(columns)
        update = ", ".join(f"{name} = excluded.{name}" for name in columns)
        marks = ", ".join("?" * len(columns))
        with self._transaction() as db:
            db.execute(
                f"INSERT INTO stage (stage, {names}) VALUES (?, {marks}) ON CONFLICT (stage) DO UPDATE SET {update}",  # noqa: S608 - names are ours
                (number, *columns.values()),
            )

    def record(self, hop: Hop) -> None:
        """Note a finished hop."""
        row = (
            hop.hop,
            hop.stage,
            hop.of_stage,
            hop.site,
            to_bytes(hop.report).decode(),
            hop.sent_bytes,
            hop.received_bytes,
            hop.deliver_s,
            hop.work_s,
            hop.fetch_s,
        )
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO hop VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def hops(self) -> list[Hop]:
        """Every finished hop, by stage."""
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM hop ORDER BY stage, of_stage = stage DESC, of_stage").fetchall()
        return [
            Hop(hop, stage, of_stage, site, from_bytes(Report, report.encode()), *numbers)
            for hop, stage, of_stage, site, report, *numbers in rows
        ]

    def hop(self, name: str) -> Hop | None:
        return next((hop for hop in self.hops() if hop.hop == name), None)

    def losses(self) -> dict[tuple[int, int], float]:
        """The forgetting matrix: held-out loss by (after stage, modality of stage)."""
        return {(hop.stage, hop.of_stage): hop.report.metrics["heldout_mim_loss"] for hop in self.hops()}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # A connection each time: it is cheap, holds no lock between steps, and works from any thread.
        with closing(sqlite3.connect(self._path, timeout=30)) as db, db:
            db.execute("PRAGMA synchronous = FULL")
            yield db
