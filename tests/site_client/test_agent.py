"""The site agent on a real spool with real processes: what waits is worked on, what was killed is started again."""

import json
import os
import signal
import time

import pytest

from invcoss_common.canonical import write_atomic
from invcoss_common.phantoms import write_phantoms
from invcoss_common.records import Request, Status, from_bytes, to_bytes
from invcoss_site import agent as agent_module
from invcoss_site.agent import STARTS, Agent
from invcoss_site.desk import answer, hop_status
from invcoss_site.home import write_home
from invcoss_site.work import AGENT_LOCK, is_idle, take_lock, worker_group

HOP = "s00-train"


@pytest.fixture
def home(tmp_path):
    """A site whose spool an agent looks after, with one hop that waits."""
    write_phantoms(tmp_path / "images", "xray", 8, seed=0)
    home = write_home(tmp_path, "north", tmp_path / "images", ("labels.csv",))
    home.hop_folder(HOP).mkdir(parents=True)
    (home.spool / AGENT_LOCK).touch()
    put_status(home, Status(state="queued"))
    (home.hop_folder(HOP) / "attempt").write_text("1")
    return home


def put_status(home, status):
    write_atomic(home.hop_folder(HOP) / "status.json", to_bytes(status))


def read_status(home):
    return from_bytes(Status, (home.hop_folder(HOP) / "status.json").read_bytes())


def look_until(agent, seen, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        agent.look()
        time.sleep(0.05)


class Sleeper:
    """Stands in for start_process: a worker that holds the lock and does nothing."""

    def __init__(self):
        self.started = []

    def __call__(self, home, hop):
        import subprocess

        lock = take_lock(home, hop)
        worker = subprocess.Popen(["sleep", "600"], stdin=lock, start_new_session=True)
        os.close(lock)
        write_atomic(home.hop_folder(hop) / "worker", str(worker.pid).encode())
        self.started.append(worker)
        return worker


@pytest.fixture
def sleeper(monkeypatch):
    sleeper = Sleeper()
    monkeypatch.setattr(agent_module, "start_process", sleeper)
    yield sleeper
    for worker in sleeper.started:
        worker.kill()
        worker.wait()


def test_a_hop_that_waits_is_worked_on_and_a_broken_one_fails_with_its_class(home):
    write_atomic(home.hop_folder(HOP) / "handoff.json", b"{}")
    agent = Agent(home)
    look_until(agent, lambda: read_status(home).state == "failed")
    assert read_status(home).error == "ProtocolError"
    agent.end()


def test_while_an_agent_is_away_a_hop_waits_and_has_not_failed(home):
    assert hop_status(home, HOP).state == "queued"
    put_status(home, Status(state="running", phase="training", step=3, steps=9))
    assert hop_status(home, HOP).state == "running"
    (home.spool / AGENT_LOCK).unlink()
    assert hop_status(home, HOP).error == "WorkerKilled"


def test_a_worker_that_is_killed_is_started_again_as_long_as_it_gets_on(home, sleeper):
    agent = Agent(home)
    for step in range(2 * STARTS):
        put_status(home, Status(state="running", phase="training", step=step, steps=9))
        look_until(agent, lambda wanted=step: len(sleeper.started) > wanted)
        os.kill(sleeper.started[-1].pid, signal.SIGKILL)
        look_until(agent, lambda: agent.worker is None or agent.worker.poll() is None)
    assert read_status(home).state == "running"


def test_a_worker_that_is_killed_at_the_same_point_every_time_has_failed(home, sleeper):
    agent = Agent(home)
    deadline = time.monotonic() + 30
    while read_status(home).state != "failed":
        assert time.monotonic() < deadline
        agent.look()
        if agent.worker is not None:
            os.kill(agent.worker.pid, signal.SIGKILL)
            agent.worker.wait()
    assert read_status(home).error == "WorkerKilled"
    assert len(sleeper.started) == STARTS


def test_a_new_attempt_counts_from_the_start(home, sleeper):
    write_atomic(home.hop_folder(HOP) / "starts.json", json.dumps({"point": ["0", "reading", 0], "starts": 3}).encode())
    agent = Agent(home)
    look_until(agent, lambda: sleeper.started)
    assert json.loads((home.hop_folder(HOP) / "starts.json").read_bytes())["starts"] == 1


def test_one_hop_is_worked_on_at_a_time(home, sleeper):
    other = home.hop_folder("s01-train")
    other.mkdir()
    write_atomic(other / "status.json", to_bytes(Status(state="queued")))
    (other / "attempt").write_text("1")
    agent = Agent(home)
    for _ in range(10):
        agent.look()
    assert len(sleeper.started) == 1
    assert is_idle(home, "s01-train")
    assert not is_idle(home, HOP)


def test_another_agent_leaves_a_worker_alone_that_lives(home, sleeper):
    Agent(home).look()
    Agent(home).look()
    assert len(sleeper.started) == 1
    assert worker_group(home, HOP) == sleeper.started[0].pid


def test_abort_ends_the_worker_and_the_hop_has_failed_until_it_is_started_anew(home, sleeper):
    agent = Agent(home)
    look_until(agent, lambda: sleeper.started)
    assert answer(Request("abort", {"hop": HOP}), home, lambda *_: None).fields["state"] == "queued"
    look_until(agent, lambda: read_status(home).state == "failed")
    assert read_status(home).error == "Aborted"
    assert sleeper.started[0].wait(5) == -signal.SIGKILL
    assert not (home.hop_folder(HOP) / "abort").exists()
    for _ in range(5):
        agent.look()
    assert len(sleeper.started) == 1


def test_the_agent_takes_its_worker_with_it_when_it_is_asked_to_end(home, sleeper):
    agent = Agent(home)
    agent.look()
    agent.end()
    assert sleeper.started[0].poll() == -signal.SIGKILL
    assert read_status(home).state == "queued"
