"""Releases as a site would report them, made up."""

from __future__ import annotations

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan
from invcoss_common.pools import artefact_of, pool_shape, without_rows
from invcoss_common.records import Artefact, AuditFigures, Interval, Release, Report, to_bytes
from invcoss_server.state import Audited

DATA = {"heldout_images": 40.0, "train_images": 1234.0, "train_cases": 600.0, "quarantined_files": 2.0}


def release_of(
    store: ArtefactStore, pool: Artefact, dropped: tuple[int, ...] = (), refused: bool = False, stage: int = 0
) -> Release:
    """The release of `pool` in `store` without the rows `dropped`."""
    images = pool_shape(store.path(pool))[0]
    share = 1.0 if refused else len(dropped) / images
    left = artefact_of(without_rows(store.path(pool), dropped)) if dropped else pool
    figures = AuditFigures(
        pool_images=images,
        train_images=60,
        heldout_images=39,
        copies=images if refused else len(dropped),
        beyond=Interval(value=share, low=share / 2, high=share),
        refuse_share=0.1,
        closer=Interval(value=0.5, low=0.25, high=0.75),
        closer_by_chance=0.625,
        median_ratio=1.0,
        null_median_ratio=1.0,
        features_beyond=0.0,
        threshold=0.5,
        false_positive_rate=0.05,
    )
    return Release(
        stage=stage,
        pool=pool.sha256,
        released=None if refused else left,
        dropped=dropped,
        figures=figures,
        membership=Interval(value=0.53, low=0.42, high=0.65),
    )


def audited_of(plan: Plan, release: Release) -> Audited:
    """What the state of a run of `plan` keeps of it."""
    report = Report(
        run=plan.name,
        hop=f"s{release.stage:02d}-audit",
        sender=plan.stages[release.stage].site,
        plan_digest=plan.digest(),
        code_version="0.1.0",
        metrics=DATA,
        release=release,
    )
    return Audited(to_bytes(report), "", release.released)
