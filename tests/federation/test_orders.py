"""What an operator asks of a run meanwhile, over the loopback courier: pause, stop, skip a site, add stages."""

import pytest
from tests.federation.loopback import LoopbackCourier
from tests.federation.plans import tiny_plan

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file
from invcoss_common.errors import PlanError
from invcoss_server.orders import RunHalted
from invcoss_server.relay import relay
from invcoss_server.report import write_report
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit


class Interrupted(LoopbackCourier):
    """Does `act` once, before message number `at`."""

    def __init__(self, homes, act, at):
        super().__init__(homes, visit)
        self.act, self.at = act, at

    def call(self, site, request):
        if len(self.calls) == self.at:
            self.act()
            self.at = -1
        return super().call(site, request)


def run(plan, out, act=lambda: None, at=-1):
    homes = {site: simulated_home(plan, site, None, out) for site in plan.sites}
    courier = Interrupted(homes, act, at)
    relay(plan, courier, out, synthesise_here)
    return courier


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An undisturbed run of two stages."""
    out = tmp_path_factory.mktemp("plain")
    run(tiny_plan(), out)
    return out


@pytest.mark.parametrize("wanted", ["paused", "stopped"])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_halted_run_goes_on_and_ends_with_the_same_model(plain, tmp_path, wanted, at):
    plan = tiny_plan()
    state = RunState(tmp_path / "state.db", plan)
    with pytest.raises(RunHalted, match=wanted):
        run(plan, tmp_path, lambda: state.want(wanted), at)
    with pytest.raises(RunHalted):
        run(plan, tmp_path)
    state.want("running")
    run(plan, tmp_path)
    assert sha256_file(tmp_path / "model.safetensors") == sha256_file(plain / "model.safetensors")
    assert [hop.stage for hop in state.hops()] == [0, 0, 1, 1, 1]


def test_a_run_goes_on_without_a_site_that_is_skipped(tmp_path):
    plan = tiny_plan(("xray", "ct", "pathology"))
    state = RunState(tmp_path / "state.db", plan)
    state.skip("ct-site")
    courier = run(plan, tmp_path)
    assert [state.stage(number).state for number in range(3)] == ["released", "skipped", "released"]
    assert set(state.losses()) == {(0, 0), (2, 0), (2, 2)}
    assert {site for site, _ in courier.calls} == {"xray-site", "pathology-site"}
    write_report(plan, state, ArtefactStore(tmp_path / "artefacts"), tmp_path)


def test_the_model_is_that_of_a_plan_without_the_skipped_stage(plain, tmp_path):
    plan = tiny_plan(("xray", "pathology", "ct"))
    state = RunState(tmp_path / "state.db", plan)
    state.skip("pathology-site")
    run(plan, tmp_path)
    two = RunState(plain / "state.db", tiny_plan())
    assert state.stage(0).pool == two.stage(0).pool
    assert state.losses()[0, 0] == two.losses()[0, 0]


def test_a_site_that_is_skipped_later_evaluates_no_more(tmp_path):
    plan = tiny_plan()
    state = RunState(tmp_path / "state.db", plan)
    run_until_second = len(run(tiny_plan(("xray",)), tmp_path / "first").calls)
    run(plan, tmp_path, lambda: state.skip("xray-site"), run_until_second + 2)
    assert [state.stage(number).state for number in range(2)] == ["released", "released"]
    assert set(state.losses()) == {(0, 0), (1, 1)}


def test_stages_are_added_to_a_finished_run_and_nothing_is_trained_again(tmp_path):
    old, new = tiny_plan(), tiny_plan(("xray", "ct", "pathology"))
    run(old, tmp_path)
    before = sha256_file(tmp_path / "models" / "stage-01-ct.safetensors")
    state, known = RunState.open(tmp_path / "state.db")
    assert known == old
    state.extend(old, new)
    courier = run(new, tmp_path)
    assert sha256_file(tmp_path / "models" / "stage-01-ct.safetensors") == before
    assert (tmp_path / "models" / "stage-02-pathology.safetensors").is_file()
    assert set(state.losses()) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert next(site for site, verb in courier.calls if verb == "start") == "pathology-site"


def test_a_run_that_got_its_last_stage_later_has_the_weights_of_one_that_had_it_from_the_start(tmp_path):
    old, new = tiny_plan(("xray",)), tiny_plan()
    run(old, tmp_path / "grown")
    RunState(tmp_path / "grown" / "state.db", old).extend(old, new)
    run(new, tmp_path / "grown")
    run(new, tmp_path / "whole")
    assert sha256_file(tmp_path / "grown" / "model.safetensors") == sha256_file(
        tmp_path / "whole" / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("new", "match"),
    [
        (tiny_plan(), "add some"),
        (tiny_plan(("ct", "xray", "pathology")), "must begin with"),
        (tiny_plan(("xray", "ct", "pathology"), seed=9), "must be the one of the run"),
    ],
)
def test_a_plan_that_changes_what_is_done_is_refused(plain, new, match):
    state, old = RunState.open(plain / "state.db")
    with pytest.raises(PlanError, match=match):
        state.extend(old, new)


def test_no_stage_is_added_to_a_run_that_is_not_done(tmp_path):
    old = tiny_plan()
    with pytest.raises(PlanError, match="stage 1 of run 'tiny' is not done"):
        RunState(tmp_path / "state.db", old).extend(old, tiny_plan(("xray", "ct", "pathology")))
