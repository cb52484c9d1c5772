"""Where a run stands, in each of its states, and what watching it ends with."""

import json
import time

import pytest
from tests.server.consortium import alive, make_consortium, move_all, plan_of

from invcoss_common.errors import PlanError, SiteError
from invcoss_common.supervise import alone
from invcoss_server.cli_runs import status
from invcoss_server.events import Events
from invcoss_server.follow import describe, describe_all, follow, is_served
from invcoss_server.gate import SEEN
from invcoss_server.runs import EVENTS, Outcome, add_run, skip_site, write_outcome


@pytest.fixture
def folder(tmp_path):
    return make_consortium(tmp_path / "chest", "a", "b")


@pytest.fixture
def run(folder):
    return add_run(folder, plan_of("one", "a", "b"))


def state(folder):
    return describe(folder, "one").state


def test_states(folder, run):
    assert state(folder) == "waiting"
    with alive(run):
        assert state(folder) == "running"
        run.state.want("paused")
        assert state(folder) == "being paused"
    write_outcome(run.folder, Outcome("RunHalted", "paused"))
    assert (state(folder), describe(folder, "one").error) == ("paused", "")
    run.state.want("stopped")
    assert state(folder) == "stopped"
    run.state.want("running")
    assert state(folder) == "waiting"
    write_outcome(run.folder, Outcome("SiteUnreachable", "no progress", "a"))
    assert (state(folder), describe(folder, "one").error) == ("waiting", "no progress")
    write_outcome(run.folder, Outcome("ConnectError"))  # Flower's trouble is tried again
    assert (state(folder), describe(folder, "one").error) == ("waiting", "ConnectError")
    write_outcome(run.folder, Outcome("ProtocolError", "another site"))
    assert (state(folder), describe(folder, "one").error) == ("failed", "another site")
    run.state.move(0, "released")
    skip_site(run, "b")
    run.state.move(1, "skipped")
    write_outcome(run.folder, Outcome())
    run.state.want("paused")
    assert state(folder) == "finished"


def test_one_that_waits_for_another(folder, run, capsys):
    other = add_run(folder, plan_of("other", "b"))
    with alive(other):
        line = describe(folder, "one")
        assert (line.state, line.waits_for) == ("waiting", "other")
        status(folder, "one")
        assert "run one: waiting (for run other)" in capsys.readouterr().out
    assert describe(folder, "one").waits_for == ""


def test_stages_and_what_is_done_now(folder, run):
    (folder / SEEN).write_text(json.dumps({"a": time.time() - 50}))
    run.state.move(0, "released")
    run.state.move(1, "failed", error="SiteUnreachable")
    first, second = describe(folder, "one").stages
    assert (first.stage, first.site, first.modality, first.state, first.error) == (1, "a", "xray", "released", "")
    assert 50 <= first.heard_s < 60
    assert (second.state, second.error, second.heard_s) == ("failed", "SiteUnreachable", None)
    events = Events(run.folder / EVENTS)
    with alive(run):
        for event, values, words in (
            ("stage", {"stage": 1, "site": "b"}, "stage 2 begins at b"),
            ("absent", {"site": "b"}, "waiting for site b, which is away"),
            (
                "status",
                {"hop": "s01-train", "site": "b", "state": "running", "phase": "training", "step": 3, "steps": 9},
                "s01-train at b: running, training 3/9",
            ),
            ("closed", {"hop": "s01-train", "site": "b"}, "s01-train: site b lets no artefact cross now"),
            ("inversion", {"stage": 1, "step": 2, "steps": 5}, "inversion of stage 2: step 2/5"),
        ):
            events.add(event, **values)
            assert describe(folder, "one").doing == words
    assert describe(folder, "one").doing == ""


def test_all_runs_the_oldest_first_and_whether_they_are_served(folder, run):
    add_run(folder, plan_of("another", "b"))
    assert [line.run for line in describe_all(folder)] == ["one", "another"]
    with pytest.raises(PlanError, match="no run 'none' here"):
        describe(folder, "none")
    assert is_served(folder) is False
    with alone(folder / "service.lock", ""):
        assert is_served(folder) is True


def test_watching_ends_as_the_run_does(run):
    Events(run.folder / EVENTS).add("stage", stage=0)
    seen = []
    write_outcome(run.folder, Outcome("SiteError", "site 'a' failed", "a"))
    with pytest.raises(SiteError, match="site 'a' failed"):
        follow(run, seen.append, from_start=True)
    assert [event["event"] for event in seen] == ["stage"]
    run.state.want("paused")
    write_outcome(run.folder, Outcome("RunHalted", "paused"))
    follow(run, seen.append, from_start=False)
    move_all(run, "released")
    write_outcome(run.folder, Outcome())
    follow(run, seen.append, from_start=False)
    assert len(seen) == 1
