"""A site's release of a pool: copies are dropped, all else may travel, what tells about single images stays here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.federation.plans import tiny_plan
from tests.federation.planted import training_images

from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.chain import records
from invcoss_common.errors import ProtocolError
from invcoss_common.metrics import REPORTED
from invcoss_common.model import build_model
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import HandOff, Pool, Status, Task, to_bytes
from invcoss_common.weights import model_to_bytes
from invcoss_site.audit import Audit
from invcoss_site.policy import POLICY
from invcoss_site.release import AUDIT
from invcoss_site.simulated import SMALL, simulated_home
from invcoss_site.visit import visit

torch.set_num_threads(1)

PLAN = tiny_plan(("xray",), simulation={"xray-site": {"phantoms": 30}}, evaluate={"mask_draws": 2})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return simulated_home(PLAN, "xray-site", None, tmp_path_factory.mktemp("site"))


def pool_images(seed=0, count=8):
    """Smooth blobs that no training image is near to."""
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=PLAN.geometry(0).size, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8).numpy()


def hand_off(home, images, plan=PLAN, **changes):
    task = Task(
        kind="audit",
        stage=0,
        modality_name="xray",
        modality=plan.modality(0),
        geometry=plan.geometry(0),
        spacing_mm=None,
        model=plan.model_shape,
        families=(plan.geometry(0),),
        train=plan.train,
        replay=plan.replay,
        evaluate=plan.evaluate,
        seed=plan.seed,
        threads=1,
    )
    pool = Pool(stage=0, modality="xray", geometry=plan.geometry(0), artefact=home.artefacts.put(pool_to_bytes(images)))
    model = home.artefacts.put(model_to_bytes(build_model(plan.model_shape, task.families, 0)))
    values = {
        "run": "tiny",
        "hop": "s00-audit",
        "receiver": home.name,
        "plan_digest": "0" * 64,
        "code_version": "0.1.0",
    }
    return HandOff.model_validate(
        {**values, "task": task, "model": model, "pools": (pool,), "audited": True, **changes}
    )


def audited(home, images, on_status=lambda status: None, **changes):
    return visit(hand_off(home, images, **changes), home, on_status)


def test_copies_are_dropped_and_the_pool_without_them_is_named(home):
    images = pool_images()
    images[[1, 6]] = training_images(PLAN, 0, home, 2)
    seen: list[Status] = []
    report = audited(home, images, seen.append)
    release = report.release
    left = pool_to_bytes(np.delete(images, [1, 6], axis=0))
    assert (release.stage, release.pool, release.dropped) == (0, sha256_hex(pool_to_bytes(images)), (1, 6))
    assert (release.released.sha256, release.released.size_bytes) == (sha256_hex(left), len(left))
    assert (release.figures.copies, release.figures.pool_images, release.figures.beyond.value) == (2, 8, 0.25)
    assert release.figures.train_images == report.metrics["train_images"]
    assert set(report.metrics) == REPORTED["audit"] and not report.artefacts and not report.curve
    assert release.membership.low <= release.membership.value <= release.membership.high
    audits = [status for status in seen if status.phase == "auditing"]
    assert len(audits) > 5 and {status.phase for status in seen} <= {"reading", "auditing"}
    assert all(0 < status.step <= status.steps for status in audits)
    assert not home.artefacts.has(release.released)  # the coordinator makes it


def test_a_pool_without_copies_is_released_as_it_is_and_always_the_same(home):
    handoff = hand_off(home, pool_images())
    once, again = (visit(handoff, home, lambda status: None) for _ in range(2))
    assert once.release.released == handoff.pools[0].artefact and once.release.dropped == ()
    assert to_bytes(once) == to_bytes(again)


def test_a_pool_of_copies_is_refused_without_a_word_on_single_images(home):
    release = audited(home, training_images(PLAN, 0, home, 8)).release
    assert release.released is None and release.dropped == ()
    assert (release.figures.copies, release.figures.beyond.value) == (8, 1.0)


def test_scores_of_single_images_stay_in_the_hops_folder_and_the_decision_is_journalled(home):
    images = pool_images(seed=1)
    images[3] = training_images(PLAN, 0, home, 1)[0]
    report = audited(home, images)
    audit = Audit.model_validate_json((home.hop_folder("s00-audit") / AUDIT).read_bytes())
    assert len(audit.items) == 8 and audit.flagged == (False, False, False, True, False, False, False, False)
    assert audit.items[3].score < min(item.score for row, item in enumerate(audit.items) if row != 3)
    assert "items" not in json.loads(to_bytes(report))["release"]["figures"]
    (record,) = [r for r in records(home.root / "journal.jsonl") if r["kind"] == "audited"][-1:]
    assert {name: record[name] for name in ("run", "hop", "model", "pool", "released", "dropped", "images")} == {
        "run": "tiny",
        "hop": "s00-audit",
        "model": hand_off(home, images).model.sha256,
        "pool": report.release.pool,
        "released": report.release.released.sha256,
        "dropped": 1,
        "images": 8,
    }


def test_the_sites_own_settings_decide(home):
    """Whether a mirrored copy is looked for, here."""
    images = pool_images(seed=2)
    images[0] = training_images(PLAN, 0, home, 1)[0][..., ::-1]
    assert audited(home, images).release.figures.copies == 1
    write_atomic(home.root / POLICY, SMALL.replace(b"[audit]", b"[audit]\nmirrored = false\nscales = [1.0]"))
    try:
        mild = audited(home, images).release
    finally:
        write_atomic(home.root / POLICY, SMALL)
    assert mild.figures.copies == 0


ODD_HAND_OFFS = {
    "no pool": lambda home: hand_off(home, pool_images(), pools=()),
    "two pools": lambda home: hand_off(home, pool_images(), pools=2 * hand_off(home, pool_images()).pools),
    "a pool of another stage": lambda home: hand_off(
        home, pool_images(), pools=(hand_off(home, pool_images()).pools[0].model_copy(update={"stage": 1}),)
    ),
    "images of another size": lambda home: hand_off(home, pool_images()[..., :8]),
    "not a pool": lambda home: hand_off(
        home,
        pool_images(),
        pools=(
            hand_off(home, pool_images()).pools[0].model_copy(update={"artefact": home.artefacts.put(b"not a pool")}),
        ),
    ),
}


@pytest.mark.parametrize("odd", ODD_HAND_OFFS)
def test_hand_offs_that_are_not_for_an_audit(home, odd):
    with pytest.raises(ProtocolError):
        visit(ODD_HAND_OFFS[odd](home), home, lambda status: None)


def test_protocol_1_knows_of_no_audit(home):
    handoff = hand_off(home, pool_images())
    old = handoff.model_copy(update={"protocol": 1, "audited": False})
    with pytest.raises(ProtocolError, match="an audit has one pool"):
        visit(old, home, lambda status: None)
