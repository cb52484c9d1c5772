"""What the coordinator's service decides for each run when it looks: start, start again, wait, leave alone."""

import pytest
from tests.server.consortium import alive, make_consortium, move_all, plan_of

from invcoss_common.config import RelayConfig
from invcoss_common.errors import InvcossError
from invcoss_server import service as module
from invcoss_server.runs import OUTCOME, Outcome, add_run, names, resume, skip_site, write_outcome
from invcoss_server.service import FIRST_RETRY_S, LONGEST_RETRY_S, STARTING_S, Service, time_outs

UNREACHABLE = Outcome("SiteUnreachable", "site 'a' showed no progress", "a")


class Looks:
    """A service with a clock of its own and a Flower that only writes down what it is asked."""

    def __init__(self, folder, monkeypatch):
        self.now, self.calls, self.said = 1000.0, [], []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.service = Service(folder, "127.0.0.1", self.said.append)
        monkeypatch.setattr(self.service, "_flower", self.flower)

    def flower(self, *arguments):
        self.calls.append(arguments)
        if arguments[0] == "stop":
            raise InvcossError("it is over already")
        return {"run-id": 7}

    def look(self, seconds=2.0):
        """Look after `seconds`; the runs that were started."""
        self.now += seconds
        before = len(self.calls)
        for name in names(self.service.folder):
            self.service._see_to(name)
        return [call[-1].removeprefix("run=").strip('"') for call in self.calls[before:] if call[0] == "run"]


@pytest.fixture
def folder(tmp_path):
    return make_consortium(tmp_path / "chest", "a", "b", "c")


@pytest.fixture
def looks(folder, monkeypatch):
    return Looks(folder, monkeypatch)


@pytest.fixture
def run(folder):
    return add_run(folder, plan_of("one", "a", "b"))


def test_a_new_run_is_started_once_and_its_time_outs_are_told(looks, run):
    assert looks.look() == ["one"]
    assert looks.look(STARTING_S - 3) == []
    (said,) = looks.said
    assert said.startswith("run one: the relay starts; asks a site again after 120 s without an answer (answer_s), ")


def test_one_that_flower_took_and_that_never_came_alive_is_started_again(looks, run):
    looks.look()
    assert looks.look(STARTING_S + 1) == ["one"]
    assert [call[0] for call in looks.calls] == ["run", "stop", "run"]


def test_one_whose_relay_was_killed_goes_on_at_the_next_look(looks, run):
    looks.look()
    with alive(run):
        assert looks.look(100) == []
    run.state.move(0, "visiting")
    assert looks.look() == ["one"]
    assert looks.said[1] == "run one: its relay was killed"
    assert looks.said[2].startswith("run one: the relay goes on; ")


def test_a_site_that_is_unreachable_is_tried_again_with_growing_pauses(looks, run):
    looks.look()
    pauses = []
    for _ in range(8):
        write_outcome(run.folder, UNREACHABLE)
        waited = 0
        while not looks.look(1.0):
            waited += 1
        pauses.append(waited + 1)
        assert not (run.folder / OUTCOME).exists()
    assert pauses[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert pauses[-2:] == [LONGEST_RETRY_S, LONGEST_RETRY_S]
    assert not any("killed" in text for text in looks.said)


@pytest.mark.parametrize("how", ["failed", "paused", "stopped", "finished"])
def test_one_that_somebody_must_decide_on_is_left_alone_until_then(looks, run, how):
    looks.look()
    with alive(run):
        looks.look()
        if how == "failed":
            write_outcome(run.folder, Outcome("DataError", "too few cases", "a"))
        elif how == "finished":
            move_all(run, "released")
            write_outcome(run.folder, Outcome())
        else:
            run.state.want(how)
            write_outcome(run.folder, Outcome("RunHalted", how))
    assert looks.look(10_000) == []
    resume(run)
    assert looks.look() == ([] if how == "finished" else ["one"])
    assert not any("killed" in text for text in looks.said)


def test_one_resumed_before_its_relay_had_ended_goes_on(looks, run):
    looks.look()
    with alive(run):
        looks.look()
        run.state.want("paused")
        resume(run)
        write_outcome(run.folder, Outcome("RunHalted", "paused"))
    assert looks.look(FIRST_RETRY_S) == ["one"]


def test_sites_serve_one_run_at_a_time(looks, folder, run):
    second, third = add_run(folder, plan_of("two", "b")), add_run(folder, plan_of("three", "c"))
    assert looks.look() == ["one", "three"]  # one is not alive yet, but it is starting
    with alive(run), alive(third):
        for _ in range(3):
            assert looks.look() == []
    assert [text for text in looks.said if "waits" in text and "two" in text] == [
        "run two waits for run one, which is at one of its sites"
    ]
    move_all(run, "released")
    write_outcome(run.folder, Outcome())
    assert "two" in looks.look()
    assert second.outcome() is None


def test_a_paused_run_and_a_skipped_site_keep_nobody_waiting(looks, folder, run):
    add_run(folder, plan_of("two", "b"))
    looks.look()
    with alive(run):
        skip_site(run, "b")
        assert looks.look() == ["two"]
    run.state.want("paused")
    add_run(folder, plan_of("three", "a"))
    assert looks.look() == ["three"]


def test_time_outs_in_one_line():
    waits = time_outs(RelayConfig(answer_s=30, stall_timeout_s=90.5))
    assert "after 30 s without" in waits
    assert "after 90.5 s without" in waits
    assert waits.endswith("waits for an absent site without limit (skip_absent_s)")
    leaves = time_outs(RelayConfig(skip_absent_s=3600))
    assert leaves.endswith("waits for an absent site 3600 s, then goes on without it (skip_absent_s)")
    assert "\n" not in waits + leaves
