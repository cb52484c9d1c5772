"""The real thing: SuperLink, gate and four sites over TLS with node authentication give what the loopback gives."""

import json

import pytest
from tests.federation.deployment import FEW_CASES, Deployment, plan_toml
from tests.federation.loopback import LoopbackCourier
from tests.federation.plans import tiny_plan

from invcoss_common.canonical import sha256_file, write_atomic
from invcoss_server.relay import relay
from invcoss_server.synthesis import synthesise_here
from invcoss_site.home import write_home
from invcoss_site.policy import POLICY
from invcoss_site.visit import visit

pytestmark = pytest.mark.slow

FOUR = tiny_plan(("xray", "ct", "mri", "pathology"), simulation={}, relay={"poll_s": 0.5, "answer_s": 30.0})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A deployment whose run of four stages is finished; its services still run."""
    with Deployment(tmp_path_factory.mktemp("deployment"), FOUR) as deployment:
        deployment.enrol()
        deployment.start_all()
        deployment.run(plan_toml(FOUR))
        deployment.wait_until(lambda: deployment.state().is_done(), 1200, "the relay of four stages")
        yield deployment


def test_four_stages_give_the_weights_of_the_loopback_run(finished, tmp_path):
    for site in FOUR.sites:
        write_atomic(tmp_path / site / POLICY, FEW_CASES)
    homes = {site: write_home(tmp_path / site, site, finished.images(site)) for site in FOUR.sites}
    relay(finished.state().plan, LoopbackCourier(homes, visit), tmp_path / "run", synthesise_here)
    run = finished.state()
    assert sha256_file(run.folder / "model.safetensors") == sha256_file(tmp_path / "run" / "model.safetensors")
    assert [run.state.stage(number).state for number in range(4)] == ["released"] * 4
    assert len(run.state.hops()) == 14
    assert [hop.hop for hop in run.state.hops() if hop.report.release] == [f"s0{number}-audit" for number in range(4)]


def test_each_site_has_its_own_folder_and_status_tells_where_all_is(finished):
    told = json.loads(finished.server("status", finished.consortium, "--json"))
    assert told["served"] is True
    (line,) = told["runs"]
    assert (line["run"], line["state"]) == ("tiny", "finished")
    assert all(stage["heard_s"] is not None and stage["heard_s"] < 120 for stage in line["stages"])
    for site in FOUR.sites:
        home = finished.home(site)
        assert (home.spool / "node-id").is_file()
        assert {file.name for file in home.log.iterdir()} >= {"agent.log", "supernode.log", "superexec.log"}


def test_no_name_of_a_site_s_image_is_anywhere_at_the_coordinator(finished):
    names = [file.name for site in FOUR.sites for file in finished.images(site).rglob("*-[0-9]*")]
    assert len(names) > 40
    words = [name.partition(".")[0].encode() for name in names]
    for file in finished.consortium.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(word in content for word in words), file
