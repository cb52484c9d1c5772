"""A pool goes first to the site it was learned from, which releases what of it may travel; nothing else is handed on.

The site's answer is in its signed report, which is kept in the run's state. It holds no image: the images that may not
travel are left out here, and what is left must be the file that the site names.
"""

from __future__ import annotations

from invcoss_common.errors import PoolRefused, ProtocolError, ReleaseMissing
from invcoss_common.records import PROTOCOL_VERSION, Artefact, Pool
from invcoss_server.hops import Run, do_hop, hand_off, task_for
from invcoss_server.state import Audited, Stage


def audit_stage(run: Run, number: int) -> None:
    """inverting -> auditing: the stage's site compares the pool with its images, and releases what of it may travel.

    Raises PoolRefused when that is nothing, ProtocolError when the site's software is too old to do it.
    """
    stage, site = run.state.stage(number), run.plan.stages[number].site
    if not run.plan.relay.audit:
        return
    audited = run.state.audited(stage) or _audit(run, stage, site)
    if audited.released is None:
        raise PoolRefused(
            f"site '{site}' refuses the pool of stage {number + 1}, number {run.state.refused_pools(number)} so far: "
            "too many of its images are too near to the site's own (figures: report.html). It is handed to nobody. "
            "Going on (invcoss-server resume; a simulation: the same command) inverts the model anew with another seed"
        )


def released(run: Run, number: int) -> Artefact:
    """The pool of a stage that may travel; raises ReleaseMissing unless the kept report of its site releases it."""
    stage, site = run.state.stage(number), run.plan.stages[number].site
    assert stage.pool
    if not run.plan.relay.audit:
        return stage.pool
    audited = run.state.audited(stage)
    if audited is None or audited.released is None or not _names(audited, audited.released, run, stage, site):
        raise ReleaseMissing(
            f"{run.out / 'state.db'}: there is no release of site '{site}' for the pool of stage {number + 1} as it is "
            "recorded; it is handed to nobody. Bring the run's folder back from a backup"
        )
    return audited.released


def pool_of(run: Run, number: int, artefact: Artefact) -> Pool:
    """What a hand-off says of the pool of a stage."""
    stage = run.plan.stages[number]
    return Pool(stage=number, modality=stage.modality, geometry=run.plan.geometry(number), artefact=artefact)


def _audit(run: Run, stage: Stage, site: str) -> Audited:
    """Ask the site, and keep its answer."""
    number = stage.number
    assert stage.model and stage.pool
    run.state.move(number, "auditing")
    protocol = run.courier.protocol(site)
    if protocol < 2:
        raise ProtocolError(
            f"site '{site}' speaks protocol {protocol}, the coordinator {PROTOCOL_VERSION}: it can't audit the pool of "
            "its stage, which is handed to nobody; upgrade the site's software, or run a plan with relay.audit = false"
        )
    kept: list[tuple[bytes, str]] = []
    task, pool = task_for(run, number, "audit"), pool_of(run, number, stage.pool)
    handoff = hand_off(run, _hop(number), task, stage.model, (pool,))
    report = do_hop(run, handoff, number, number, lambda content, signature: kept.append((content, signature)))
    release = report.release
    assert release
    audited = Audited(*kept[-1], release.released)
    run.state.keep_audit(number, audited)
    figures = {"images": release.figures.pool_images, "dropped": len(release.dropped), "refused": not release.released}
    run.events.add("audited", stage=number, site=site, **figures, membership=release.membership.value)
    return audited


def _names(audited: Audited, artefact: Artefact, run: Run, stage: Stage, site: str) -> bool:
    """Whether the kept report is of this run, stage and pool, and names the artefact."""
    try:
        report = audited.report
    except ProtocolError:
        return False
    if report.release is None or stage.pool is None:
        return False
    said = (report.run, report.hop, report.sender, report.release.pool, report.release.released)
    return said == (run.plan.name, _hop(stage.number), site, stage.pool.sha256, artefact)


def _hop(number: int) -> str:
    return f"s{number:02d}-audit"
