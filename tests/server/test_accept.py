"""What of a site's answer to an audit is accepted: the release of this very pool, and the very file that it names."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation.plans import tiny_plan
from tests.server.releases import DATA, release_of

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file
from invcoss_common.errors import ProtocolError
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import Artefact, HandOff, Interval, Pool, Report, Task
from invcoss_server.accept import check_report, store_released

PLAN = tiny_plan(("xray",))
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
OTHER = Artefact(sha256="b" * 64, size_bytes=7)


@pytest.fixture
def store(tmp_path):
    return ArtefactStore(tmp_path / "store")


@pytest.fixture
def pool(store):
    return store.put(pool_to_bytes(IMAGES))


def hand_off(pool, kind="audit"):
    task = Task(
        kind=kind,
        stage=0,
        modality_name="xray",
        modality=PLAN.modality(0),
        geometry=PLAN.geometry(0),
        spacing_mm=None,
        model=PLAN.model_shape,
        families=(PLAN.geometry(0),),
        train=PLAN.train,
        replay=PLAN.replay,
        evaluate=PLAN.evaluate,
        seed=0,
        threads=1,
    )
    return HandOff(
        run="tiny",
        hop="s00-audit" if kind == "audit" else "s01-eval-00",
        receiver="xray-site",
        plan_digest="0" * 64,
        code_version="0.1.0",
        task=task,
        model=OTHER,
        pools=(Pool(stage=0, modality="xray", geometry=PLAN.geometry(0), artefact=pool),) if kind == "audit" else (),
        audited=True,
    )


def report(release, **changes):
    values = {"run": "tiny", "hop": "s00-audit", "sender": "xray-site", "plan_digest": "0" * 64, "metrics": DATA}
    return Report.model_validate({**values, "code_version": "0.1.0", "release": release, **changes})


@pytest.mark.parametrize("dropped", [(), (3,), (0, 4, 9), tuple(range(9))])
def test_a_release_is_accepted_with_the_pool_made_after_it(store, pool, dropped):
    release = release_of(store, pool, dropped)
    check_report(report(release), hand_off(pool))
    store_released(store, pool, release)
    assert store.has(release.released)
    assert sha256_file(store.path(release.released)) == release.released.sha256
    assert store.path(release.released).read_bytes() == pool_to_bytes(np.delete(IMAGES, dropped, axis=0))
    assert {path.name for path in store.folder.iterdir()} == {pool.sha256, release.released.sha256}


def test_a_refusal_is_accepted_and_makes_nothing(store, pool):
    release = release_of(store, pool, refused=True)
    check_report(report(release), hand_off(pool))
    store_released(store, pool, release)
    assert [path.name for path in store.folder.iterdir()] == [pool.sha256]


ODD_REPORTS = {
    "no release": (lambda r: report(None), "lacks a release"),
    "a loss": (lambda r: report(r, metrics={**DATA, "heldout_mim_loss": 0.5}), "heldout_mim_loss"),
    "no counts": (lambda r: report(r, metrics={}), "train_images"),
    "an artefact": (lambda r: report(r, model=OTHER), "brings artefacts"),
    "a curve": (lambda r: report(r, curve=(1.0,)), "brings artefacts"),
    "another stage": (lambda r: report(r.model_copy(update={"stage": 1})), "another pool"),
    "another pool": (lambda r: report(r.model_copy(update={"pool": "c" * 64})), "another pool"),
    "a row twice": (lambda r: report(r.model_copy(update={"dropped": (3, 3)})), "ascending"),
    "rows not in order": (lambda r: report(r.model_copy(update={"dropped": (4, 3)})), "ascending"),
    "nothing dropped, another file": (lambda r: report(r.model_copy(update={"dropped": ()})), "names another file"),
    "dropped, and refused": (lambda r: report(r.model_copy(update={"released": None})), "or none"),
}


@pytest.mark.parametrize("odd", ODD_REPORTS)
def test_odd_answers_to_an_audit_are_refused(store, pool, odd):
    change, says = ODD_REPORTS[odd]
    with pytest.raises(ProtocolError, match=says):
        check_report(change(release_of(store, pool, (3,))), hand_off(pool))


def test_dropped_rows_with_the_raw_pool_as_released_are_refused(store, pool):
    release = release_of(store, pool, (3,)).model_copy(update={"released": pool})
    with pytest.raises(ProtocolError, match="names the pool with them"):
        check_report(report(release), hand_off(pool))


def test_a_release_that_nobody_asked_for_is_refused(store, pool):
    evaluated = report(release_of(store, pool), metrics={**DATA, "heldout_mim_loss": 0.5})
    with pytest.raises(ProtocolError, match="not asked for"):
        check_report(evaluated, hand_off(pool, "evaluate"))


def figures(release, **changes):
    return release.model_copy(update={"figures": release.figures.model_copy(update=changes)})


ODD_RELEASES = {
    "a row behind the end": (lambda r: r.model_copy(update={"dropped": (3, 10)}), "say something else"),
    "the last row behind the end": (lambda r: r.model_copy(update={"dropped": (10,)}), "no such rows"),
    "another row": (lambda r: r.model_copy(update={"dropped": (4,)}), "not the file"),
    "another digest": (lambda r: r.model_copy(update={"released": OTHER}), "not the file"),
    "another size": (
        lambda r: r.model_copy(update={"released": r.released.model_copy(update={"size_bytes": 5})}),
        "not the file",
    ),
    "all rows": (lambda r: r.model_copy(update={"dropped": tuple(range(10))}), "drops 10 of 10"),
    "another count": (lambda r: figures(r, pool_images=11), "counts 11"),
    "more copies than dropped": (lambda r: figures(r, copies=2), "say something else"),
    "another share": (lambda r: figures(r, beyond=Interval(value=0.5, low=0, high=1)), "say something else"),
    "a share, and nothing dropped": (
        lambda r: r.model_copy(update={"dropped": (), "figures": r.figures.model_copy(update={"copies": 0})}),
        "say something else",
    ),
}


@pytest.mark.parametrize("odd", ODD_RELEASES)
def test_a_release_that_does_not_fit_the_pool_makes_nothing(store, pool, odd):
    change, says = ODD_RELEASES[odd]
    with pytest.raises(ProtocolError, match=says):
        store_released(store, pool, change(release_of(store, pool, (3,))))
    assert [path.name for path in store.folder.iterdir()] == [pool.sha256]
