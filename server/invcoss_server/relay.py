"""The main path of the coordinator: the model goes from site to site, and is inverted after every visit. Start here.

    for stage in plan: deliver -> wait -> fetch -> accept -> invert -> audit at the same site
        -> evaluate at all earlier sites -> released

Every step is written to the run's state before the next one; a relay that was killed goes on when it is called again.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan
from invcoss_common.errors import InvcossError, PoolRefused, ReleaseMissing
from invcoss_common.model import MultiModalMAE, build_model, extend_model
from invcoss_common.records import Artefact, Pool
from invcoss_common.seeds import derive_seed
from invcoss_common.weights import read_model, write_model
from invcoss_server.courier import Courier
from invcoss_server.events import Events
from invcoss_server.hops import DRAFT, Run, do_hop, families, hand_off, learned, recast, task_for
from invcoss_server.inversion import InversionProgress
from invcoss_server.orders import HeedingCourier, SiteSkipped, heed
from invcoss_server.release import audit_stage, pool_of, released
from invcoss_server.report import write_report
from invcoss_server.state import RunState
from invcoss_server.synthesis import Job, Synthesise, synthesise_in_child


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
            audit_stage(run, number)
            evaluate_stage(run, number)
        except SiteSkipped:
            run.state.move(number, "skipped")
            run.events.add("skipped", stage=number, site=stage.site)
            continue
        except InvcossError as error:
            run.state.move(number, "failed", error=type(error).__name__)
            if isinstance(error, PoolRefused):
                write_report(plan, state, run.store, out)  # it has the figures that the operator needs
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
    """received -> inverting: the model becomes a pool of synthetic images for all later stages.

    A pool that its site refused is not made again: another seed makes another one.
    """
    stage, plan = run.state.stage(number), run.plan
    attempt, audited = run.state.refused_pools(number), run.state.audited(stage)
    if stage.pool is not None and (audited is None or audited.released):
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
        seed=derive_seed(plan.seed, "inversion", number, *([attempt] if attempt else [])),
        threads=plan.threads,
    )

    def tell(progress: InversionProgress) -> None:
        heed(run.state)
        run.events.add("inversion", stage=number, **asdict(progress))

    name = f"stage-{number:02d}" + (f"-{attempt}" if attempt else "")
    folder, began = run.out / "inversion" / name, time.monotonic()
    pool = run.store.adopt(run.synthesise(job, folder, tell))
    run.state.move(number, "inverting", pool=pool, inversion_s=time.monotonic() - began)
    shutil.rmtree(folder)


def evaluate_stage(run: Run, number: int) -> None:
    """auditing -> released: every earlier site evaluates the new model on its own held-out images."""
    model = run.state.stage(number).model
    assert model is not None
    for of in learned(run, number - 1):
        hop = f"s{number:02d}-eval-{of:02d}"
        if run.state.hop(hop) is None:
            task = task_for(run, of, "evaluate", upto=number)
            with suppress(SiteSkipped):
                handoff = hand_off(run, hop, task, model, ())
                do_hop(run, handoff, number, of)


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
    """The pools of all earlier stages, each as its site released it.

    One that older software left without a release is audited now. If its site is gone by then it goes nowhere.
    """
    pools = []
    for of in learned(run, number - 1):
        try:
            invert_stage(run, of)  # again, if it was refused when it was audited now
            audit_stage(run, of)
        except SiteSkipped:
            run.events.add("unreleased", stage=of, site=run.plan.stages[of].site)
        else:
            pools.append(pool_of(run, of, released(run, of)))
            publish_pool(run, of)
    return tuple(pools)


def publish(run: Run, number: int) -> None:
    """Put the model and pool of a released stage where people look for them, and write the report."""
    model = run.state.stage(number).model
    assert model
    link(run.store.path(model), run.out / "model.safetensors")
    with suppress(ReleaseMissing):  # of older software, and not audited yet
        publish_pool(run, number)
    write_report(run.plan, run.state, run.store, run.out)
    link(run.store.path(model), published(run, number))  # last: it tells that all is done


def publish_pool(run: Run, number: int) -> None:
    link(run.store.path(released(run, number)), run.out / "pools" / published(run, number).name)


def published(run: Run, number: int) -> Path:
    """Where people find the model of a stage."""
    return run.out / "models" / f"stage-{number:02d}-{run.plan.stages[number].modality}.safetensors"


def finish(run: Run, number: int) -> None:
    """Publish a released stage if a kill came before."""
    if run.state.stage(number).state == "released" and not published(run, number).exists():
        publish(run, number)


def link(source: Path, path: Path) -> None:
    """Make `path` another name of an artefact, replacing what was there at once."""
    if path.exists() and path.samefile(source):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(path)
