"""Where a run stands, in one SQLite file: every step is written before it is acted on, so that a killed run goes on.

A stage goes waiting -> visiting -> received -> inverting -> auditing -> released; `failed` names a stage whose last
attempt broke off, and starting the run again goes on with it; `skipped` one that the operator left out. Artefacts are
named here and lie in the artefact store. What the origin site said of a pool is here as it signed it. What the operator
wants of the run stands here too. Whatever changes is entered in the run's ledger: state first, then ledger.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from invcoss_common.canonical import sha256_hex
from invcoss_common.chain import Value, now
from invcoss_common.config import Plan, parse_plan
from invcoss_common.errors import PlanError
from invcoss_common.records import Artefact, HandOff, Report, from_bytes, to_bytes
from invcoss_server.ledger import Entry, write_ledger

StageState = Literal["waiting", "visiting", "received", "inverting", "auditing", "released", "failed", "skipped"]
Wanted = Literal["running", "paused", "stopped"]

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
CREATE TABLE IF NOT EXISTS audit (
    stage INTEGER NOT NULL, pool TEXT NOT NULL, released TEXT, report TEXT NOT NULL, signature TEXT NOT NULL,
    PRIMARY KEY (stage, pool)
);
CREATE TABLE IF NOT EXISTS hand_off (hop TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS wanted (one INTEGER PRIMARY KEY CHECK (one = 1), wanted TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS skipped (site TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS ledger (
    entry INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, content TEXT NOT NULL
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


@dataclass(frozen=True)
class Audited:
    """A site's report on a pool, as it signed it, and the artefact made after it that may travel; None: nothing may."""

    content: bytes
    signature: str
    released: Artefact | None

    @property
    def report(self) -> Report:
        return from_bytes(Report, self.content)


class RunState:
    """The state of the run in `path`, made for `plan` if it is new; raises PlanError if it belongs to another plan."""

    def __init__(self, path: Path, plan: Plan) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._name = path, plan.name
        with self._transaction() as db:
            db.executescript(_TABLES)
            known = db.execute("SELECT plan FROM run").fetchone()
            if known is None:
                row = (plan.digest(), plan.model_dump_json(), time.time())
                db.execute("INSERT INTO run VALUES (?, ?, ?)", row)
                _enter(db, "run", plan=plan.digest(), sites=[stage.site for stage in plan.stages])
            elif _parse(known[0], path) != plan:  # not by digest: newer software may have added a field
                raise PlanError(f"{path.parent} holds a run of another plan; choose another --out, or remove it")

    @classmethod
    def open(cls, path: Path) -> tuple[RunState, Plan]:
        """The state in `path` and the plan that it is of; raises PlanError if there is none."""
        if not path.is_file():
            raise PlanError(f"{path.parent}: there is no run here")
        with closing(sqlite3.connect(path, timeout=30)) as db:
            row = db.execute("SELECT plan FROM run").fetchone()
        plan = _parse(row[0], path)
        return cls(path, plan), plan

    def extend(self, old: Plan, new: Plan) -> None:
        """Make `new`, which has further stages at its end, the plan of this run of `old`, when all of `old` is done.

        Raises PlanError when it is not done, or `new` differs in anything else.
        """
        known = len(old.stages)
        undone = [n + 1 for n in range(known) if self.stage(n).state not in ("released", "skipped")]
        if undone:
            raise PlanError(f"stage {undone[0]} of run '{old.name}' is not done; stages are added to a finished run")
        if len(new.stages) <= known or new.stages[:known] != old.stages:
            raise PlanError(f"the plan must begin with the {known} stages that are done, and add some")
        same = {"stages": old.stages, "modalities": old.modalities, "simulation": old.simulation}
        if new.model_copy(update=same) != old or not old.modalities.items() <= new.modalities.items():
            raise PlanError("besides further stages and modalities the plan must be the one of the run")
        with self._change() as db:
            db.execute("UPDATE run SET plan_digest = ?, plan = ?", (new.digest(), new.model_dump_json()))
            sites = [stage.site for stage in new.stages[known:]]
            _enter(db, "order", order="add-stage", plan=new.digest(), sites=sites)

    def wanted(self) -> Wanted:
        """What the operator wants of the run."""
        with self._transaction() as db:
            row = db.execute("SELECT wanted FROM wanted").fetchone()
        return row[0] if row else "running"

    def want(self, wanted: Wanted) -> None:
        assert wanted in get_args(Wanted)
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO wanted VALUES (1, ?)", (wanted,))
            _enter(db, "order", order=wanted)

    def skipped_sites(self) -> set[str]:
        """Sites that the run goes on without."""
        with self._transaction() as db:
            return {row[0] for row in db.execute("SELECT site FROM skipped")}

    def skip(self, site: str) -> None:
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO skipped VALUES (?)", (site,))
            _enter(db, "order", order="skip-site", site=site)

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
        """Set the state of a stage, and what it has produced by then (`model`, `statistics`, `pool`, `inversion_s`).

        A released stage stays so, whatever is made of it later: older software released pools without an audit.
        """
        assert state in get_args(StageState)
        values = {
            name: value.model_dump_json() if isinstance(value, Artefact) else value for name, value in produced.items()
        }
        digests = {name: value.sha256 for name, value in produced.items() if isinstance(value, Artefact)}
        with self._change() as db:
            before = db.execute("SELECT state FROM stage WHERE stage = ?", (number,)).fetchone()
            state = "released" if before == ("released",) else state
            columns = {"state": state, "error": error, "changed": time.time(), **values}
            names = ", ".join(columns)
            update = ", ".join(f"{name} = excluded.{name}" for name in columns)
            marks = ", ".join("?" * len(columns))
            db.execute(
                f"INSERT INTO stage (stage, {names}) VALUES (?, {marks}) ON CONFLICT (stage) DO UPDATE SET {update}",  # noqa: S608 - names are ours
                (number, *columns.values()),
            )
            if before != (state,) or error:
                failed = {"error": error} if error else {}
                _enter(db, "stage", stage=number, state=state, **failed, **digests)
            elif digests:
                _enter(db, "produced", stage=number, **digests)

    def audited(self, stage: Stage) -> Audited | None:
        """What the origin site said of the pool that the stage has now; None if it was not asked."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT report, signature, released FROM audit WHERE stage = ? AND pool = ?",
                (stage.number, stage.pool.sha256 if stage.pool else ""),
            ).fetchone()
        if row is None:
            return None
        return Audited(row[0].encode(), row[1], Artefact.model_validate_json(row[2]) if row[2] else None)

    def refused_pools(self, number: int) -> int:
        """How many pools of a stage its site refused."""
        with self._transaction() as db:
            query = "SELECT count(*) FROM audit WHERE stage = ? AND released IS NULL"
            return int(db.execute(query, (number,)).fetchone()[0])

    def keep_audit(self, number: int, audited: Audited) -> None:
        """Note what the site of a stage said of its pool."""
        release, artefact = audited.report.release, audited.released
        assert release is not None
        row = (
            number,
            release.pool,
            artefact.model_dump_json() if artefact else None,
            audited.content.decode(),
            audited.signature,
        )
        values: dict[str, Value] = {"stage": number, "pool": release.pool, "report": sha256_hex(audited.content)}
        with self._change() as db:
            db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", row)
            if artefact:
                _enter(db, "released-pool", released=artefact.sha256, dropped=len(release.dropped), **values)
            else:
                _enter(db, "refused-pool", **values)

    def hand_off(self, hop: str) -> HandOff | None:
        """The hand-off of `hop`, if it was made before."""
        with self._transaction() as db:
            row = db.execute("SELECT content FROM hand_off WHERE hop = ?", (hop,)).fetchone()
        return from_bytes(HandOff, row[0].encode()) if row else None

    def last_sequence(self) -> int:
        """The highest number of a hand-off of this run, 0 if there is none."""
        with self._transaction() as db:
            return int(db.execute("SELECT max(json_extract(content, '$.sequence')) FROM hand_off").fetchone()[0] or 0)

    def keep_hand_off(self, handoff: HandOff) -> None:
        """Note a hand-off that was made, in place of an earlier one of this hop."""
        content = to_bytes(handoff)
        pools = [pool.artefact.sha256 for pool in handoff.pools]
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO hand_off VALUES (?, ?)", (handoff.hop, content.decode()))
            values: dict[str, Value] = {"handoff": sha256_hex(content), "model": handoff.model.sha256, "pools": pools}
            _enter(db, "hand-off", hop=handoff.hop, site=handoff.receiver, sequence=handoff.sequence, **values)

    def record(self, hop: Hop) -> None:
        """Note a finished hop, whose report was accepted."""
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
        with self._change() as db:
            before = db.execute("SELECT report FROM hop WHERE hop = ?", (hop.hop,)).fetchone()
            db.execute("INSERT OR REPLACE INTO hop VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            if before != (row[4],):  # not when it was fetched again after a kill
                values = {"sent_bytes": hop.sent_bytes, "received_bytes": hop.received_bytes}
                _enter(
                    db, "accepted", hop=hop.hop, site=hop.site, **_digests(hop.report), **values, **_spent(hop.report)
                )

    def refuse(self, handoff: HandOff, report: Report | None, error: str) -> None:
        """Enter that the answer to a hand-off was refused, and why: the class of the error."""
        digests = _digests(report) if report else {}
        with self._change() as db:
            _enter(db, "refused", hop=handoff.hop, site=handoff.receiver, error=error, **digests)

    def hops(self) -> list[Hop]:
        """Every finished hop, by stage: training, audit, evaluations."""
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM hop ORDER BY stage, of_stage = stage DESC, of_stage, hop DESC").fetchall()
        return [
            Hop(hop, stage, of_stage, site, from_bytes(Report, report.encode()), *numbers)
            for hop, stage, of_stage, site, report, *numbers in rows
        ]

    def hop(self, name: str) -> Hop | None:
        return next((hop for hop in self.hops() if hop.hop == name), None)

    def losses(self) -> dict[tuple[int, int], float]:
        """The forgetting matrix: held-out loss by (after stage, modality of stage)."""
        hops = [hop for hop in self.hops() if "heldout_mim_loss" in hop.report.metrics]  # an audit has none
        return {(hop.stage, hop.of_stage): hop.report.metrics["heldout_mim_loss"] for hop in hops}

    def write_ledger(self) -> None:
        """Bring the ledger up to this state, if a kill came in between; raises ChainError, OSError."""
        write_ledger(self._path.parent, self._name, self._entries_from)

    def _entries_from(self, number: int) -> list[Entry]:
        query = "SELECT entry, time, kind, content FROM ledger WHERE entry >= ? ORDER BY entry"
        with self._transaction() as db:
            rows = db.execute(query, (number,)).fetchall()
        return [Entry(entry, time, kind, json.loads(content)) for entry, time, kind, content in rows]

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that makes entries for the ledger."""
        with self._transaction() as db:
            yield db
        self.write_ledger()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # A connection each time: it is cheap, holds no lock between steps, and works from any thread.
        with closing(sqlite3.connect(self._path, timeout=30)) as db, db:
            db.execute("PRAGMA synchronous = FULL")
            yield db


def _enter(db: sqlite3.Connection, kind: str, **values: Value) -> None:
    db.execute("INSERT INTO ledger (time, kind, content) VALUES (?, ?, ?)", (now(), kind, json.dumps(values)))


def _digests(report: Report) -> dict[str, Value]:
    artefacts: Value = [artefact.sha256 for artefact in report.artefacts]
    return {"report": sha256_hex(to_bytes(report)), "artefacts": artefacts}


def _spent(report: Report) -> dict[str, Value]:
    """The privacy that a site says it has spent, as texts; nothing without differential privacy."""
    return {"epsilon": repr(report.dp.epsilon), "delta": repr(report.dp.delta)} if report.dp else {}


def _parse(plan: str, path: Path) -> Plan:
    return parse_plan(json.loads(plan), str(path))
