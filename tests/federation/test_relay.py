"""The relay and the visit together over the loopback courier: one whole run, killed runs, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load, save
from tests.federation.loopback import LoopbackCourier, lift_guard
from tests.federation.plans import tiny_plan

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file
from invcoss_common.config import RelayConfig
from invcoss_common.errors import PlanError, ProtocolError, SiteError, WeightsError
from invcoss_common.weights import model_from_bytes, model_to_bytes
from invcoss_server.relay import families, relay
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit


def run(plan, out, visit=visit, synthesise=synthesise_here, sites=None):
    sites = sites or out
    homes = {site: simulated_home(plan, site, None, sites) for site in plan.sites}
    courier = LoopbackCourier(homes, visit)
    relay(plan, courier, out, synthesise)
    return courier


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run over three families of stages, and its plan."""
    out = tmp_path_factory.mktemp("run")
    plan = tiny_plan(("xray", "ct", "pathology"))
    run(plan, out)
    return plan, out


def test_a_run_leaves_models_pools_matrix_and_report(finished):
    plan, out = finished
    state = RunState(out / "state.db", plan)
    assert [state.stage(number).state for number in range(3)] == ["released"] * 3
    assert set(state.losses()) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert {path.name for path in (out / "models").iterdir()} == {
        "stage-00-xray.safetensors",
        "stage-01-ct.safetensors",
        "stage-02-pathology.safetensors",
    }
    assert len(list((out / "pools").iterdir())) == 3
    assert (out / "model.safetensors").read_bytes() == (out / "models" / "stage-02-pathology.safetensors").read_bytes()
    assert (out / "report.html").stat().st_size > 10_000
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert [events.count(kind) for kind in ("stage", "hop", "audited", "released")] == [3, 9, 3, 3]


def test_a_site_keeps_the_artefacts_of_its_last_hop_only(finished):
    plan, out = finished
    state = RunState(out / "state.db", plan)
    for hop in state.hops():
        kept = {path.name for path in (out / "sites" / hop.site / "spool" / "artefacts").iterdir()}
        last = max((h for h in state.hops() if h.site == hop.site), key=lambda h: state.hand_off(h.hop).sequence)
        asked, made = state.hand_off(last.hop), last.report
        assert kept == {artefact.sha256 for artefact in (*asked.artefacts, *made.artefacts)}


def test_a_finished_run_is_not_run_again(finished):
    plan, out = finished
    assert run(plan, out).calls == []


def test_another_plan_in_the_same_folder_is_refused(finished):
    plan, out = finished
    with pytest.raises(PlanError, match="another plan"):
        run(plan.model_copy(update={"seed": 99}), out)


def test_same_plan_same_seed_same_weights_bit_for_bit(finished, tmp_path):
    plan, out = finished
    run(plan, tmp_path)
    for name in ("models/stage-00-xray", "models/stage-02-pathology", "pools/stage-01-ct"):
        assert sha256_file(tmp_path / f"{name}.safetensors") == sha256_file(out / f"{name}.safetensors")


def wire_bytes(plan, out):
    """Bytes of all hops (sent, received)."""
    hops = RunState(out / "state.db", plan).hops()
    return sum(hop.sent_bytes for hop in hops), sum(hop.received_bytes for hop in hops)


@pytest.fixture(scope="module")
def rounded(finished, tmp_path_factory):
    """The run of `finished` with models in bfloat16 on the wire."""
    out = tmp_path_factory.mktemp("rounded")
    plan = finished[0].model_copy(update={"relay": RelayConfig(poll_s=0.02, wire_dtype="bfloat16")})
    run(plan, out)
    return plan, out


def test_bfloat16_halves_what_crosses_and_the_run_keeps_float32(finished, rounded):
    plan, out = rounded
    state, store = RunState(out / "state.db", plan), ArtefactStore(out / "artefacts")
    for number in range(3):
        hop, stage = state.hop(f"s{number:02d}-train"), state.stage(number)
        assert hop.report.model.size_bytes < 0.55 * stage.model.size_bytes
        shape = (plan.model_shape, families(plan, range(number + 1)))
        kept = model_from_bytes(store.path(stage.model).read_bytes(), *shape)
        came = model_from_bytes(store.path(hop.report.model).read_bytes(), *shape, "bfloat16")
        assert model_to_bytes(kept) == model_to_bytes(came)
    for rounded_bytes, exact_bytes in zip(wire_bytes(*rounded), wire_bytes(*finished), strict=True):
        assert 0.45 < rounded_bytes / exact_bytes < 0.6
    exact, lossy = RunState(finished[1] / "state.db", finished[0]).losses(), state.losses()
    assert lossy.keys() == exact.keys()
    assert all(abs(lossy[key] - exact[key]) < 0.02 * exact[key] for key in exact)


def test_bfloat16_is_deterministic_and_compression_changes_no_bit(rounded, tmp_path):
    plan, out = rounded
    config = plan.relay.model_copy(update={"compress": True, "part_mib": 1})
    compressed = plan.model_copy(update={"relay": config})
    run(compressed, tmp_path)
    for name in ("model", "models/stage-01-ct", "pools/stage-02-pathology"):
        assert sha256_file(tmp_path / f"{name}.safetensors") == sha256_file(out / f"{name}.safetensors")
    for less, more in zip(wire_bytes(compressed, tmp_path), wire_bytes(plan, out), strict=True):
        assert less < 0.8 * more


def test_a_model_in_a_type_that_was_not_agreed_on_is_refused(tmp_path, monkeypatch):
    """Half the values in twice the width have the size of the right file, so it is looked into."""
    lift_guard(monkeypatch)

    def widened(data, handoff):
        return data if handoff.wire_dtype == "float32" else half_as_float32(data)

    plan = tiny_plan(("xray",), relay={"poll_s": 0.02, "wire_dtype": "bfloat16"})
    with pytest.raises(WeightsError, match="bfloat16"):
        run(plan, tmp_path, visit=spoiling(widened))


def half_as_float32(data):
    """The tensors of a bfloat16 file with their bytes read as half as many float32 values."""
    return save({name: tensor.reshape(-1).view(torch.float32) for name, tensor in load(data).items()})


class Killed(BaseException):
    """Stands for the end of a process: nothing in the code catches it."""


@pytest.mark.parametrize("at", ["put", "start", "status", "get"])
@pytest.mark.parametrize("acted_on", [True, False])
def test_a_coordinator_killed_at_any_message_goes_on_and_ends_the_same(finished, tmp_path, at, acted_on):
    plan, out = finished

    class Dies(LoopbackCourier):
        left = dict.fromkeys(("put", "start", "status", "get"), 1)

        def call(self, site, request):
            dying = request.verb == at and self.left[at] > 0
            if dying and not acted_on:
                self.left[at] -= 1
                raise Killed
            response = super().call(site, request)
            if dying:
                self.left[at] -= 1
                raise Killed
            return response

    homes = {site: simulated_home(plan, site, None, tmp_path) for site in plan.sites}
    courier = Dies(homes, visit)
    with pytest.raises(Killed):
        relay(plan, courier, tmp_path, synthesise_here)
    relay(plan, courier, tmp_path, synthesise_here)
    assert sha256_file(tmp_path / "model.safetensors") == sha256_file(out / "model.safetensors")
    assert courier.calls.count(("xray-site", "start")) <= 5  # four hops, one of them asked for twice at most


@pytest.mark.parametrize("stage", [0, 1])
def test_a_coordinator_killed_while_inverting_goes_on_and_ends_the_same(finished, tmp_path, stage):
    plan, out = finished
    plan_inversions = []

    def dies_within(job, folder, on_progress):
        plan_inversions.append(folder.name)

        def tell(progress):
            on_progress(progress)
            if len(plan_inversions) == stage + 1 and progress.step == 4:
                raise Killed

        return synthesise_here(job, folder, tell)

    with pytest.raises(Killed):
        run(plan, tmp_path, synthesise=dies_within)
    assert RunState(tmp_path / "state.db", plan).stage(stage).state == "inverting"
    run(plan, tmp_path)
    assert sha256_file(tmp_path / "pools/stage-00-xray.safetensors") == sha256_file(
        out / "pools/stage-00-xray.safetensors"
    )
    assert sha256_file(tmp_path / "model.safetensors") == sha256_file(out / "model.safetensors")


def test_a_visit_that_dies_is_taken_up_again_by_the_same_relay(finished, tmp_path):
    plan, out = finished
    died = []

    def dies_once(handoff, home, on_status):
        def tell(status):
            on_status(status)
            if status.step == 2 and not died:
                died.append(handoff.hop)
                raise OSError("the machine went away")

        return visit(handoff, home, tell)

    with pytest.raises(SiteError, match="OSError"):
        run(plan, tmp_path, visit=dies_once)
    assert RunState(tmp_path / "state.db", plan).stage(0).state == "failed"
    run(plan, tmp_path, visit=dies_once)
    assert died == ["s00-train"]
    assert sha256_file(tmp_path / "model.safetensors") == sha256_file(out / "model.safetensors")


def spoiling(change):
    """A visit whose trained model is changed before it is offered."""

    def spoiled(handoff, home, on_status):
        report = visit(handoff, home, on_status)
        if report.model is None:
            return report
        tensors = change(home.artefacts.path(report.model).read_bytes(), handoff)
        return report.model_copy(update={"model": home.artefacts.put(tensors)})

    return spoiled


def with_nan(data, handoff):
    model = model_from_bytes(data, handoff.task.model, handoff.task.families)
    model.cls_token.data[0, 0, 0] = float("nan")
    return model_to_bytes(model)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (with_nan, WeightsError, "cls_token"),
        (lambda data, handoff: data[:-4], WeightsError, "safetensors"),
        (lambda data, handoff: data[: len(data) // 2], ProtocolError, "bytes"),
        (lambda data, handoff: data * 2, ProtocolError, "bytes"),
    ],
)
def test_what_a_site_returns_is_checked_before_it_is_used(tmp_path, monkeypatch, change, error, says):
    lift_guard(monkeypatch)
    plan = tiny_plan(("xray",))
    with pytest.raises(error, match=says) as caught:
        run(plan, tmp_path, visit=spoiling(change))
    assert "\n" not in str(caught.value)
    state = RunState(tmp_path / "state.db", plan)
    assert state.stage(0).state == "failed"
    assert state.stage(0).model is None


def test_a_metric_that_was_not_asked_for_is_refused(tmp_path, monkeypatch):
    lift_guard(monkeypatch)

    def talkative(handoff, home, on_status):
        report = visit(handoff, home, on_status)
        return report.model_copy(update={"metrics": report.metrics | {"patients": 7.0}})

    with pytest.raises(ProtocolError, match="patients"):
        run(tiny_plan(("xray",)), tmp_path, visit=talkative)


def test_the_coordinator_stores_nothing_of_the_sites_images(finished):
    """Canary: no 64-byte stretch of any training image's pixels is in any file of the coordinator."""
    _, out = finished
    from PIL import Image

    stretches = []
    for path in (out / "sites" / "xray-site" / "data").glob("*.png"):
        with Image.open(path) as film:
            pixels = film.tobytes()
        stretches.append(pixels[len(pixels) // 2 : len(pixels) // 2 + 64])
    assert len(set(stretches)) == 12
    files = [path for path in out.rglob("*") if path.is_file() and "sites" not in path.relative_to(out).parts]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not any(stretch in content for stretch in stretches), path
        assert b"xray-0001" not in content, "a file name of the site"


def test_families_appear_once_in_order():
    plan = tiny_plan(("ct", "xray", "mri", "pathology"))
    assert [geometry.family for geometry in families(plan, range(4))] == [
        plan.geometry(0).family,
        plan.geometry(1).family,
    ]
    assert families(plan, [0]) == (plan.geometry(0),)


def test_artefacts_are_fetched_whole(finished):
    plan, out = finished
    store = ArtefactStore(out / "artefacts")
    for number in range(3):
        stage = RunState(out / "state.db", plan).stage(number)
        for artefact in (stage.model, stage.statistics, stage.pool):
            assert sha256_file(store.path(artefact)) == artefact.sha256
