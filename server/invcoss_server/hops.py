"""One piece of work at a site, from its hand-off to its accepted report: what every step of the relay is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from invcoss_common import __version__
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan, WireDtype
from invcoss_common.errors import CredentialError, ProtocolError, SiteError, WeightsError
from invcoss_common.modality import Geometry
from invcoss_common.records import Artefact, HandOff, Pool, Report, Status, Task
from invcoss_common.weights import recast_file
from invcoss_server.accept import check_model, check_report, check_statistics, store_released
from invcoss_server.courier import abort, deliver, fetch, wait
from invcoss_server.events import Events
from invcoss_server.orders import HeedingCourier, RunHalted, SiteSkipped
from invcoss_server.state import Hop, RunState
from invcoss_server.synthesis import Synthesise

DRAFT = "draft.safetensors"  # in the run's folder: a model that is being written


@dataclass(frozen=True)
class Run:
    """What every step of a relay works with."""

    plan: Plan
    courier: HeedingCourier
    state: RunState
    store: ArtefactStore
    events: Events
    out: Path
    synthesise: Synthesise


def do_hop(
    run: Run,
    handoff: HandOff,
    number: int,
    of: int,
    keep: Callable[[bytes, str], None] = lambda _report, _signature: None,
) -> Report:
    """Deliver a hand-off, wait until its work is done, fetch and accept what it made; all of it may be repeated.

    `keep` is given the report as the site signed it, and the checked signature.
    """
    site, config = handoff.receiver, run.plan.relay

    def tell(status: Status) -> None:
        run.events.add("status", hop=handoff.hop, site=site, **status.model_dump())

    def closed() -> None:
        run.events.add("closed", hop=handoff.hop, site=site)

    began = time.monotonic()
    sent = deliver(run.courier, site, handoff, run.store, config, closed)
    delivered = time.monotonic()
    report: Report | None = None
    fetched_now: list[Artefact] = []
    try:
        report = wait(run.courier, site, handoff, config, tell, keep)
        check_report(report, handoff)
        worked = time.monotonic()
        fetched_now = [artefact for artefact in report.artefacts if not run.store.has(artefact)]
        received = sum(fetch(run.courier, site, artefact, run.store, config, closed) for artefact in report.artefacts)
        if report.model and report.statistics:
            check_model(run.store.path(report.model), handoff)
            check_statistics(run.store.path(report.statistics), report, handoff.task)
        if report.release:
            store_released(run.store, handoff.pools[0].artefact, report.release)
    except (RunHalted, SiteSkipped):
        if report is None:
            call_off(run, handoff)
        raise
    except (ProtocolError, WeightsError, CredentialError) as error:
        for artefact in fetched_now:  # nothing else names them
            run.store.path(artefact).unlink(missing_ok=True)
        run.state.refuse(handoff, report, type(error).__name__)
        raise
    fetched = time.monotonic()
    seconds = (delivered - began, worked - delivered, fetched - worked)
    run.state.record(Hop(handoff.hop, number, of, site, report, sent, received, *seconds))
    loss = report.metrics.get("heldout_mim_loss")  # an audit has none
    run.events.add("hop", hop=handoff.hop, site=site, loss=loss, sent_bytes=sent)
    return report


def hand_off(run: Run, hop: str, task: Task, model: Artefact, pools: tuple[Pool, ...]) -> HandOff:
    """The hand-off of a task in the version that its site speaks; an old site gets neither bfloat16 nor compression.

    Once made it stays the same, also when either side's software is upgraded during a visit, unless the pools are
    others: older software may have put pools into it that were not released.
    """
    known = run.state.hand_off(hop)
    if known is not None and known.pools == pools:
        return known
    site, config = run.plan.stages[task.stage].site, run.plan.relay
    protocol = run.courier.protocol(site)
    wire_dtype = config.wire_dtype if protocol >= 2 else "float32"
    if protocol < 2 and (config.compress or config.wire_dtype != wire_dtype):
        run.events.add("fallback", hop=hop, site=site, protocol=protocol)
    dp = run.plan.dp if task.kind == "train" else None
    if dp is not None and protocol < 2:
        raise ProtocolError(
            f"the plan asks for differential privacy, and site '{site}' speaks protocol {protocol}, which has none; it "
            f"came with protocol 2: upgrade the site's software"
        )
    made = HandOff(
        protocol=protocol,
        run=run.plan.name,
        hop=hop,
        receiver=site,
        plan_digest=run.plan.digest(),
        code_version=__version__,
        task=task,
        model=recast(run, model, task, "float32", wire_dtype),
        pools=pools,
        wire_dtype=wire_dtype,
        sequence=run.state.last_sequence() + 1 if protocol >= 2 else 0,
        audited=config.audit and protocol >= 2,
        dp=dp,
    )
    run.state.keep_hand_off(made)
    return made


def recast(run: Run, model: Artefact, task: Task, old: WireDtype, new: WireDtype) -> Artefact:
    """The task's model in another type of number: a run keeps models as float32, whatever they travel as."""
    if old == new:
        return model
    recast_file(run.store.path(model), run.out / DRAFT, new)
    return run.store.adopt(run.out / DRAFT)


def task_for(run: Run, number: int, kind: str, upto: int | None = None) -> Task:
    """The work of stage `number`; `upto` is the stage whose model it is done with, if a later one."""
    plan = run.plan
    return Task.model_validate(
        {
            "kind": kind,
            "stage": number,
            "modality_name": plan.stages[number].modality,
            "modality": plan.modality(number),
            "geometry": plan.geometry(number),
            "spacing_mm": plan.stages[number].spacing_mm,
            "model": plan.model_shape,
            "families": families(plan, learned(run, number if upto is None else upto)),
            "train": plan.train_for(number),
            "replay": plan.replay,
            "evaluate": plan.evaluate,
            "seed": plan.seed,
            "threads": plan.threads,
        }
    )


def learned(run: Run, number: int) -> list[int]:
    """The stages up to `number` that the operator did not leave out."""
    return [of for of in range(number + 1) if run.state.stage(of).state != "skipped"]


def families(plan: Plan, stages: Iterable[int]) -> tuple[Geometry, ...]:
    """One geometry for each family that a model which learned `stages` has, in order of appearance."""
    found: dict[str, Geometry] = {}
    for geometry in map(plan.geometry, stages):
        found.setdefault(geometry.family, geometry)
    return tuple(found.values())


def call_off(run: Run, handoff: HandOff) -> None:
    """Have a site end the work on a hop that is not wanted any more; a run that is only paused lets it go on."""
    if run.state.wanted() != "paused":
        with suppress(SiteError):
            abort(run.courier.courier, handoff.receiver, handoff.hop)
