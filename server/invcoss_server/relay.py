"""The main path of the coordinator: the model goes from site to site, and is inverted after every visit. Start here.

    for stage in plan: deliver -> wait -> fetch -> accept -> invert -> evaluate at all earlier sites -> released

Every step is written to the run's state before the next one; a relay that was killed goes on when it is called again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from invcoss_common import __version__
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan, WireDtype
from invcoss_common.errors import CredentialError, InvcossError, ProtocolError, SiteError, WeightsError
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, build_model, extend_model
from invcoss_common.records import Artefact, HandOff, Pool, Report, Status, Task
from invcoss_common.seeds import derive_seed
from invcoss_common.weights import read_model, recast_file, write_model
from invcoss_server.accept import check_model, check_report, check_statistics
from invcoss_server.courier import Courier, abort, deliver, fetch, wait
from invcoss_server.events import Events
from invcoss_server.inversion import InversionProgress
from invcoss_server.orders import HeedingCourier, RunHalted, SiteSkipped, heed
from invcoss_server.report import write_report
from invcoss_server.state import Hop, RunState
from invcoss_server.synthesis import Job, Synthesise, synthesise_in_child

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


def relay(plan: Plan, courier: Courier, out: Path, synthesise: Synthesise = synthesise_in_child) -> None:
    """Run `plan` to its end in the folder `out`, or go on with it there.

    Raises InvcossError when a stage fails, RunHalted when the operator asked to pause or stop.
    """
    state = RunState(out / "state.db", plan)
    state.write_ledger()
    run = Run(
        plan,
        HeedingCourier(courier, state),
        state,
        ArtefactStore(out / "artefacts"),
        Events(out / "events.jsonl"),
        out,
        synthesise,
    )
    for number, stage in enumerate(plan.stages):
        if run.state.stage(number).state in ("released", "skipped"):
            finish(run, number)
            continue
        run.events.add("stage", stage=number, stages=len(plan.stages), site=stage.site, modality=stage.modality)
        try:
            visit_site(run, number)
            invert_stage(run, number)
            evaluate_stage(run, number)
        except SiteSkipped:
            run.state.move(number, "skipped")
            run.events.add("skipped", stage=number, site=stage.site)
            continue
        except InvcossError as error:
            run.state.move(number, "failed", error=type(error).__name__)
            raise
        run.state.move(number, "released")
        publish(run, number)
        losses = {of: loss for (after, of), loss in run.state.losses().items() if after == number}
        run.events.add("released", stage=number, losses=[losses.get(of) for of in range(number + 1)])


def visit_site(run: Run, number: int) -> None:
    """waiting -> visiting -> received: the site trains the model; what it returns is checked and stored."""
    if run.state.stage(number).model is not None:
        return
    run.state.move(number, "visiting")
    model, pools = starting_model(run, number), earlier_pools(run, number)
    handoff = hand_off(run, f"s{number:02d}-train", task_for(run, number, "train"), model, pools)
    report = do_hop(run, handoff, number, number)
    assert report.model and report.statistics
    model = recast(run, report.model, handoff.task, handoff.wire_dtype, "float32")
    run.state.move(number, "received", model=model, statistics=report.statistics)


def invert_stage(run: Run, number: int) -> None:
    """received -> inverting: the model becomes a pool of synthetic images for all later stages."""
    stage, plan = run.state.stage(number), run.plan
    if stage.pool is not None:
        return
    assert stage.model and stage.statistics
    run.state.move(number, "inverting")
    job = Job(
        model=run.store.path(stage.model).resolve(),
        statistics=run.store.path(stage.statistics).resolve(),
        shape=plan.model_shape,
        families=families(plan, learned(run, number)),
        geometry=plan.geometry(number),
        inversion=plan.inversion,
        mask_ratio=plan.train.mask_ratio,
        seed=derive_seed(plan.seed, "inversion", number),
        threads=plan.threads,
    )

    def tell(progress: InversionProgress) -> None:
        heed(run.state)
        run.events.add("inversion", stage=number, **asdict(progress))

    folder, began = run.out / "inversion" / f"stage-{number:02d}", time.monotonic()
    pool = run.store.adopt(run.synthesise(job, folder, tell))
    run.state.move(number, "inverting", pool=pool, inversion_s=time.monotonic() - began)
    shutil.rmtree(folder)


def evaluate_stage(run: Run, number: int) -> None:
    """inverting -> released: every earlier site evaluates the new model on its own held-out images."""
    model = run.state.stage(number).model
    assert model is not None
    for of in learned(run, number - 1):
        hop = f"s{number:02d}-eval-{of:02d}"
        if run.state.hop(hop) is None:
            task = task_for(run, of, "evaluate", upto=number)
            with suppress(SiteSkipped):
                handoff = hand_off(run, hop, task, model, ())
                do_hop(run, handoff, number, of)


def do_hop(run: Run, handoff: HandOff, number: int, of: int) -> Report:
    """Deliver a hand-off, wait until its work is done, fetch and accept what it made; all of it may be repeated."""
    site, config = handoff.receiver, run.plan.relay

    def tell(status: Status) -> None:
        run.events.add("status", hop=handoff.hop, site=site, **status.model_dump())

    def closed() -> None:
        run.events.add("closed", hop=handoff.hop, site=site)

    began = time.monotonic()
    sent = deliver(run.courier, site, handoff, run.store, config, closed)
    delivered = time.monotonic()
    report: Report | None = None
    try:
        report = wait(run.courier, site, handoff, config, tell)
        check_report(report, handoff)
        worked = time.monotonic()
        received = sum(fetch(run.courier, site, artefact, run.store, config, closed) for artefact in report.artefacts)
        if report.model and report.statistics:
            check_model(run.store.path(report.model), handoff)
            check_statistics(run.store.path(report.statistics), report, handoff.task)
    except (RunHalted, SiteSkipped):
        if report is None:
            call_off(run, handoff)
        raise
    except (ProtocolError, WeightsError, CredentialError) as error:
        run.state.refuse(handoff, report, type(error).__name__)
        raise
    fetched = time.monotonic()
    seconds = (delivered - began, worked - delivered, fetched - worked)
    run.state.record(Hop(handoff.hop, number, of, site, report, sent, received, *seconds))
    run.events.add("hop", hop=handoff.hop, site=site, loss=report.metrics["heldout_mim_loss"], sent_bytes=sent)
    return report


def hand_off(run: Run, hop: str, task: Task, model: Artefact, pools: tuple[Pool, ...]) -> HandOff:
    """The hand-off of a task in the version that its site speaks; an old site gets neither bfloat16 nor compression.

    Once made it stays the same, also when either side's software is upgraded during a visit.
    """
    known = run.state.hand_off(hop)
    if known is not None:
        return known
    site, config = run.plan.stages[task.stage].site, run.plan.relay
    protocol = run.courier.protocol(site)
    wire_dtype = config.wire_dtype if protocol >= 2 else "float32"
    if protocol < 2 and (config.compress or config.wire_dtype != wire_dtype):
        run.events.add("fallback", hop=hop, site=site, protocol=protocol)
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
        sequence=run.state.count_hand_offs() + 1 if protocol >= 2 else 0,
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


def starting_model(run: Run, number: int) -> Artefact:
    """The model that stage `number` starts from: fresh, or the previous stage's, with the new stage's family."""
    plan, seed = run.plan, derive_seed(run.plan.seed, "model")
    earlier, now = learned(run, number - 1), families(run.plan, learned(run, number))
    if not earlier:
        return keep(run, build_model(plan.model_shape, now, seed))
    before, known = run.state.stage(earlier[-1]).model, families(plan, earlier)
    assert before is not None
    if now == known:
        return before
    model = read_model(run.store.path(before), plan.model_shape, known)
    extend_model(model, plan.geometry(number), seed)
    return keep(run, model)


def keep(run: Run, model: MultiModalMAE) -> Artefact:
    """Put a model into the run's store, by way of a file: as bytes it would be in memory three times."""
    write_model(run.out / DRAFT, model)
    return run.store.adopt(run.out / DRAFT)


def earlier_pools(run: Run, number: int) -> tuple[Pool, ...]:
    pools = []
    for of in learned(run, number - 1):
        artefact = run.state.stage(of).pool
        assert artefact is not None
        modality, geometry = run.plan.stages[of].modality, run.plan.geometry(of)
        pools.append(Pool(stage=of, modality=modality, geometry=geometry, artefact=artefact))
    return tuple(pools)


def call_off(run: Run, handoff: HandOff) -> None:
    """Have a site end the work on a hop that is not wanted any more; a run that is only paused lets it go on."""
    if run.state.wanted() != "paused":
        with suppress(SiteError):
            abort(run.courier.courier, handoff.receiver, handoff.hop)


def publish(run: Run, number: int) -> None:
    """Put the model and pool of a released stage where people look for them, and write the report."""
    stage = run.state.stage(number)
    assert stage.model and stage.pool
    link(run.store.path(stage.model), run.out / "model.safetensors")
    link(run.store.path(stage.pool), run.out / "pools" / published(run, number).name)
    write_report(run.plan, run.state, run.store, run.out)
    link(run.store.path(stage.model), published(run, number))  # last: it tells that all is done


def published(run: Run, number: int) -> Path:
    """Where people find the model of a stage."""
    return run.out / "models" / f"stage-{number:02d}-{run.plan.stages[number].modality}.safetensors"


def finish(run: Run, number: int) -> None:
    """Publish a released stage if a kill came before."""
    if run.state.stage(number).state == "released" and not published(run, number).exists():
        publish(run, number)


def link(source: Path, path: Path) -> None:
    """Make `path` another name of an artefact, replacing what was there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(path)
