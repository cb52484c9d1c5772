"""Pools in the relay: they are audited where they come from, and nothing of them is handed on that was not released."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter

import numpy as np
import pytest
from tests.federation.loopback import LoopbackCourier
from tests.federation.plans import tiny_plan
from tests.federation.planted import Planting, training_images

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file
from invcoss_common.chain import records, verify
from invcoss_common.errors import PoolRefused, ProtocolError, ReleaseMissing
from invcoss_common.pools import mapped_images, pool_to_bytes
from invcoss_common.records import Artefact, to_bytes
from invcoss_common.seeds import derive_seed
from invcoss_server.relay import relay
from invcoss_server.runs import Outcome
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit

ONE = tiny_plan(("xray",))
PLAN = tiny_plan()
THREE = tiny_plan(("xray", "ct", "pathology"))


class Killed(BaseException):
    """Stands for the end of a process: nothing in the code catches it."""


def homes_of(plan, out):
    return {site: simulated_home(plan, site, None, out) for site in plan.sites}


def run(plan, out, rows=None, courier=LoopbackCourier, visit=visit, synthesise=None):
    """Run a plan with copies planted into `rows` by stage; the courier."""
    homes = homes_of(plan, out)
    carrier = courier(homes, visit)
    relay(plan, carrier, out, synthesise or Planting(plan, homes, rows or {}))
    return carrier


def state_of(out, plan=PLAN):
    return RunState(out / "state.db", plan), ArtefactStore(out / "artefacts")


def images_of(store, artefact):
    return mapped_images(store.path(artefact))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two stages, with a copy in row 2 of the pool of the first."""
    out = tmp_path_factory.mktemp("run")
    courier = run(PLAN, out, {0: (2,)})
    return out, courier


def test_the_next_site_gets_the_pool_without_the_copy_that_was_planted(finished):
    out, _ = finished
    state, store = state_of(out)
    raw, audited = state.stage(0).pool, state.audited(state.stage(0))
    release = audited.report.release
    assert (release.pool, release.dropped, release.figures.copies) == (raw.sha256, (2,), 1)
    handed = state.hand_off("s01-train")
    assert handed.audited and [pool.artefact for pool in handed.pools] == [audited.released]
    np.testing.assert_array_equal(images_of(store, audited.released), np.delete(images_of(store, raw), 2, axis=0))
    (copy,) = training_images(PLAN, 0, homes_of(PLAN, out)["xray-site"], 1)
    assert copy.tobytes() in store.path(raw).read_bytes()
    assert copy.tobytes() not in store.path(audited.released).read_bytes()
    assert sha256_file(out / "pools" / "stage-00-xray.safetensors") == audited.released.sha256
    assert state.hop("s01-train").sent_bytes < state.hand_off("s01-train").model.size_bytes + raw.size_bytes


def test_a_pool_of_which_all_may_travel_is_handed_on_as_it_is(finished):
    out, _ = finished
    state, _ = state_of(out)
    assert state.audited(state.stage(1)).released == state.stage(1).pool


def test_each_stage_is_audited_once_at_its_own_site_before_anybody_else_is_asked(finished):
    out, courier = finished
    state, _ = state_of(out)
    hops = {hop.hop: hop for hop in state.hops()}
    assert list(hops) == ["s00-train", "s00-audit", "s01-train", "s01-audit", "s01-eval-00"]
    assert [hops[f"s0{n}-audit"].site for n in range(2)] == ["xray-site", "ct-site"]
    started = [site for site, verb in courier.calls if verb == "start"]
    assert started == ["xray-site", "xray-site", "ct-site", "ct-site", "xray-site"]
    for name in ("s00-audit", "s01-audit"):
        assert not hops[name].report.artefacts and hops[name].received_bytes == 0
    assert set(state.losses()) == {(0, 0), (1, 0), (1, 1)}
    assert (out / "sites" / "xray-site" / "spool" / "s00-audit" / "audit.json").is_file()


def test_scores_of_single_images_are_nowhere_at_the_coordinator(finished):
    out, _ = finished
    audit = json.loads((out / "sites" / "xray-site" / "spool" / "s00-audit" / "audit.json").read_text())
    scores = [repr(item["structure"]["train"])[:10].encode() for item in audit["items"]]
    assert len(set(scores)) == 4
    files = [path for path in out.rglob("*") if path.is_file() and "sites" not in path.relative_to(out).parts]
    assert len(files) > 10
    assert not [path for path in files if any(score in path.read_bytes() for score in (*scores, b'"structure"'))]


def test_without_audits_pools_are_handed_on_as_made_and_hand_offs_say_so(tmp_path):
    plan = tiny_plan(relay={"poll_s": 0.02, "audit": False})
    run(plan, tmp_path, {0: (2,)})
    state, _ = state_of(tmp_path, plan)
    handed = state.hand_off("s01-train")
    assert not handed.audited and [pool.artefact for pool in handed.pools] == [state.stage(0).pool]
    assert [hop.hop for hop in state.hops()] == ["s00-train", "s01-train", "s01-eval-00"]
    assert sha256_file(tmp_path / "pools" / "stage-00-xray.safetensors") == state.stage(0).pool.sha256
    moved = [r["state"] for r in records(tmp_path / "ledger.jsonl") if r["kind"] == "stage" and r["stage"] == 0]
    assert moved == ["visiting", "received", "inverting", "released"]


def test_a_refused_pool_goes_nowhere_and_is_inverted_anew_with_another_seed(tmp_path):
    homes = homes_of(PLAN, tmp_path)
    planting = Planting(PLAN, homes, {0: (0, 1, 2, 3)})
    courier = LoopbackCourier(homes, visit)
    with pytest.raises(PoolRefused, match=r"'xray-site' refuses the pool of stage 1, .*another seed") as refused:
        relay(PLAN, courier, tmp_path, planting)
    assert Outcome(type(refused.value).__name__, str(refused.value)).needs_operator
    state, store = state_of(tmp_path)
    first = state.stage(0).pool
    assert (state.stage(0).state, state.stage(0).error, state.refused_pools(0)) == ("failed", "PoolRefused", 1)
    assert {site for site, _ in courier.calls} == {"xray-site"}
    assert not (tmp_path / "pools").exists() and state.audited(state.stage(0)).released is None
    assert "the whole pool" in (tmp_path / "report.html").read_text(encoding="utf-8")

    relay(PLAN, courier, tmp_path, planting)
    assert planting.seeds[0] == [derive_seed(3, "inversion", 0), derive_seed(3, "inversion", 0, 1)]
    assert planting.seeds[1] == [derive_seed(3, "inversion", 1)]
    second, audited = state.stage(0).pool, state.audited(state.stage(0))
    assert second != first and audited.released
    assert [pool.artefact for pool in state.hand_off("s01-train").pools] == [audited.released]
    sequence = [state.hand_off(hop.hop).sequence for hop in state.hops()]
    assert sorted(sequence) == [1, 3, 4, 5, 6]  # 2 was the audit of the refused pool
    kinds = Counter(r["kind"] for r in records(tmp_path / "ledger.jsonl"))
    assert (kinds["refused-pool"], kinds["released-pool"], kinds["hand-off"]) == (1, 2, 6)
    verify(tmp_path / "ledger.jsonl")
    copies = training_images(PLAN, 0, homes["xray-site"], 4)
    handed = store.path(audited.released).read_bytes()
    assert not any(copy.tobytes() in handed for copy in copies)


def test_every_refused_pool_takes_another_seed(tmp_path):
    homes = homes_of(ONE, tmp_path)
    planting = Planting(ONE, homes, {0: (0, 1, 2, 3)}, always=True)
    for attempt in range(2):
        with pytest.raises(PoolRefused, match=f"number {attempt + 1} so far"):
            relay(ONE, LoopbackCourier(homes, visit), tmp_path, with_mark(planting, attempt))
    assert planting.seeds[0] == [derive_seed(3, "inversion", 0), derive_seed(3, "inversion", 0, 1)]


def with_mark(synthesise, mark):
    """`synthesise` with one pixel set, so that pools of nothing but copies differ as real ones would."""

    def marked(job, folder, on_progress):
        path = synthesise(job, folder, on_progress)
        images = mapped_images(path).copy()
        images.flat[0] = mark
        path.write_bytes(pool_to_bytes(images))
        return path

    return marked


class EndsBeforeTheSecondSite(LoopbackCourier):
    def call(self, site, request):
        if site == "ct-site":
            raise Killed
        return super().call(site, request)


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run whose coordinator was killed just before it asked the second site, a copy in the pool of the first."""
    out = tmp_path_factory.mktemp("half")
    with pytest.raises(Killed):
        run(PLAN, out, {0: (2,)}, courier=EndsBeforeTheSecondSite)
    assert state_of(out)[0].stage(0).state == "released"
    return out


def altered(out, statement, *values):
    with sqlite3.connect(out / "state.db") as db:
        assert db.execute(statement, values).rowcount == 1


def exchange_artefact(out, state):
    altered(out, "UPDATE audit SET released = ?", state.stage(0).pool.model_dump_json())


def exchange_digest_in_report(out, state):
    audited = state.audited(state.stage(0))
    text = audited.content.decode().replace(audited.released.sha256, state.stage(0).pool.sha256)
    altered(out, "UPDATE audit SET report = ?", text)


def report_of_another_run(out, state):
    text = state.audited(state.stage(0)).content.decode().replace('"run":"tiny"', '"run":"tidy"')
    altered(out, "UPDATE audit SET report = ?", text)


def report_of_another_site(out, state):
    text = state.audited(state.stage(0)).content.decode().replace('"sender":"xray-site"', '"sender":"ct-site"')
    altered(out, "UPDATE audit SET report = ?", text)


def no_report(out, state):
    altered(out, "UPDATE audit SET report = 'x'")


def a_report_without_a_release(out, state):
    altered(out, "UPDATE audit SET report = ?", to_bytes(state.hop("s00-train").report).decode())


@pytest.mark.parametrize(
    "tamper",
    [
        exchange_artefact,
        exchange_digest_in_report,
        report_of_another_run,
        report_of_another_site,
        no_report,
        a_report_without_a_release,
    ],
)
def test_a_release_that_was_tampered_with_releases_nothing(half_way, tmp_path, tamper):
    out = shutil.copytree(half_way, tmp_path / "run")
    state, _ = state_of(out)
    tamper(out, state)
    courier = LoopbackCourier(homes_of(PLAN, out), visit)
    with pytest.raises(ReleaseMissing, match=r"no release of site 'xray-site' for the pool of stage 1"):
        relay(PLAN, courier, out, synthesise_here)
    assert (state.stage(1).state, state.stage(1).error) == ("failed", "ReleaseMissing")
    assert courier.calls == []


def test_another_pool_in_the_state_is_audited_before_it_is_handed_on(half_way, tmp_path):
    out = shutil.copytree(half_way, tmp_path / "run")
    state, store = state_of(out)
    images = images_of(store, state.stage(0).pool).copy()
    images[1] = images[2]  # the copy
    other = store.put(pool_to_bytes(images))
    altered(out, "UPDATE stage SET pool = ? WHERE stage = 0", other.model_dump_json())
    run(PLAN, out)
    (pool,) = state.hand_off("s01-train").pools
    np.testing.assert_array_equal(images_of(store, pool.artefact), np.delete(images, [1, 2], axis=0))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", ["move", "keep_hand_off", "record", "keep_audit"])
def test_killed_at_any_step_of_the_audit_it_is_audited_once(finished, tmp_path, monkeypatch, step, late):
    """Before or, `late`, just after the step was written."""
    real, killed, audits = getattr(RunState, step), [], []

    def dies(self, *arguments, **values):
        of_audit = any("audit" in str(getattr(argument, "hop", argument)) for argument in arguments)
        dying = not killed and (of_audit or step == "keep_audit")
        if dying and not late:
            killed.append(step)
            raise Killed
        real(self, *arguments, **values)
        if dying:
            killed.append(step)
            raise Killed

    def counted(handoff, home, on_status):
        if handoff.task.kind == "audit":
            audits.append(handoff.hop)
        return visit(handoff, home, on_status)

    monkeypatch.setattr(RunState, step, dies)
    with pytest.raises(Killed):
        run(ONE, tmp_path, {0: (2,)}, visit=counted)
    assert killed == [step]
    run(ONE, tmp_path, {0: (2,)}, visit=counted)
    assert audits == ["s00-audit"]
    for name in ("models", "pools"):
        file = f"{name}/stage-00-xray.safetensors"
        assert sha256_file(tmp_path / file) == sha256_file(finished[0] / file)
    found = [*records(tmp_path / "ledger.jsonl")]
    assert [r["stage"] for r in found if r["kind"] == "released-pool"] == [0]
    for kind in ("hand-off", "accepted"):
        assert [r["hop"] for r in found if r["kind"] == kind] == ["s00-train", "s00-audit"]
    assert RunState(tmp_path / "state.db", ONE).stage(0).state == "released"


@pytest.fixture
def old(finished, tmp_path):
    """The run of `finished` as older software would have left it: without any audit."""
    out = shutil.copytree(finished[0], tmp_path / "old")
    state, store = state_of(out)
    shutil.copyfile(store.path(state.stage(0).pool), out / "pools" / "stage-00-xray.safetensors")
    with sqlite3.connect(out / "state.db") as db:
        db.execute("DROP TABLE audit")
        db.execute("DELETE FROM hop WHERE hop LIKE '%-audit'")
        db.execute("DELETE FROM hand_off WHERE hop LIKE '%-audit'")
    return out


def test_a_finished_run_of_older_software_stays_as_it_is(old):
    assert run(PLAN, old).calls == []
    assert [state_of(old)[0].stage(number).state for number in range(2)] == ["released"] * 2


def test_pools_of_older_software_are_audited_before_they_are_handed_on(old):
    models = {path.name: sha256_file(path) for path in (old / "models").iterdir()}
    state, store = state_of(old)
    state.extend(PLAN, THREE)
    courier = run(THREE, old)
    started = [site for site, verb in courier.calls if verb == "start"]
    assert started[:3] == ["xray-site", "ct-site", "pathology-site"]
    state, _ = state_of(old, THREE)
    released = [state.audited(state.stage(number)).released for number in range(2)]
    assert [pool.artefact for pool in state.hand_off("s02-train").pools] == released
    np.testing.assert_array_equal(
        images_of(store, released[0]), np.delete(images_of(store, state.stage(0).pool), 2, axis=0)
    )
    assert sha256_file(old / "pools" / "stage-00-xray.safetensors") == released[0].sha256
    assert {name: sha256_file(old / "models" / name) for name in models} == models
    assert sha256_file(old / "model.safetensors") == state.stage(2).model.sha256
    moved = [(r["stage"], r["state"]) for r in records(old / "ledger.jsonl") if r["kind"] == "stage"]
    assert moved[10:] == [(2, s) for s in ("visiting", "received", "inverting", "auditing", "released")]


def test_a_hand_off_that_older_software_made_with_a_raw_pool_is_made_anew(old):
    state, _ = state_of(old)
    state.extend(PLAN, THREE)
    before = state.hand_off("s01-train")
    raw = before.pools[0].model_copy(update={"artefact": state.stage(0).pool})
    state.keep_hand_off(
        before.model_copy(update={"hop": "s02-train", "receiver": "pathology-site", "pools": (raw,), "sequence": 7})
    )
    run(THREE, old)
    made = RunState(old / "state.db", THREE).hand_off("s02-train")
    assert (len(made.pools), made.sequence) == (2, 10) and raw.artefact not in made.artefacts


def test_a_pool_of_older_software_that_is_refused_is_inverted_anew_and_the_models_stay(old):
    models = {path.name: sha256_file(path) for path in (old / "models").iterdir()}
    state, store = state_of(old)
    images = training_images(PLAN, 0, homes_of(PLAN, old)["xray-site"], 4)
    altered(old, "UPDATE stage SET pool = ? WHERE stage = 0", store.put(pool_to_bytes(images)).model_dump_json())
    state.extend(PLAN, THREE)
    with pytest.raises(PoolRefused, match="the pool of stage 1"):
        run(THREE, old)
    state, _ = state_of(old, THREE)
    assert [state.stage(number).state for number in range(3)] == ["released", "released", "failed"]
    assert state.hand_off("s02-train") is None
    run(THREE, old)
    assert [state.stage(number).state for number in range(3)] == ["released"] * 3
    assert {name: sha256_file(old / "models" / name) for name in models} == models
    assert len(state.hand_off("s02-train").pools) == 2


def test_the_pool_of_a_site_that_is_gone_before_it_released_it_goes_nowhere(old):
    state, _ = state_of(old)
    state.extend(PLAN, THREE)
    state.skip("xray-site")
    courier = run(THREE, old)
    state, _ = state_of(old, THREE)
    assert [pool.stage for pool in state.hand_off("s02-train").pools] == [1]
    assert [state.stage(number).state for number in range(3)] == ["released"] * 3
    assert "xray-site" not in {site for site, _ in courier.calls}
    events = [json.loads(line) for line in (old / "events.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["site"]) for e in events if e["event"] == "unreleased"] == [(0, "xray-site")]


def test_a_stage_whose_site_is_skipped_before_its_audit_is_left_out(tmp_path):
    class SkippedAtTheAudit(LoopbackCourier):
        def call(self, site, request):
            if "s00-audit" in str(request.fields):
                state_of(tmp_path)[0].skip("xray-site")
            return super().call(site, request)

    run(PLAN, tmp_path, courier=SkippedAtTheAudit)
    state, _ = state_of(tmp_path)
    assert [state.stage(number).state for number in range(2)] == ["skipped", "released"]
    assert state.hand_off("s01-train").pools == ()


def test_a_site_that_names_another_file_than_the_pool_without_the_dropped_images_is_not_believed(tmp_path):
    def wrong(handoff, home, on_status):
        report = visit(handoff, home, on_status)
        if report.release is None:
            return report
        other = Artefact(sha256="a" * 64, size_bytes=report.release.released.size_bytes)
        return report.model_copy(update={"release": report.release.model_copy(update={"released": other})})

    with pytest.raises(ProtocolError, match="not the file that its release names"):
        run(PLAN, tmp_path, {0: (2,)}, visit=wrong)
    state, store = state_of(tmp_path)
    assert (state.stage(0).state, state.audited(state.stage(0))) == ("failed", None)
    assert not (store.folder / ("a" * 64)).exists() and not (tmp_path / "pools").exists()
    refused = [r for r in records(tmp_path / "ledger.jsonl") if r["kind"] == "refused"]
    assert [(r["hop"], r["error"]) for r in refused] == [("s00-audit", "ProtocolError")]
