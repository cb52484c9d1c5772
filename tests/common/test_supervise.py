"""What keeps a service's processes running, with processes that are as small as can be."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from invcoss_common import supervise
from invcoss_common.errors import InvcossError
from invcoss_common.supervise import FIRST_PAUSE_S, STEADY_S, Program, Supervisor, alone, direct_loopback, tail

real_time = time.monotonic


def program(tmp_path, name, script, before=None):
    return Program(name, ("sh", "-c", script), dict(os.environ), tmp_path / "log" / f"{name}.log", before)


def is_there(pid):
    """Whether there is such a process, and it is not only waiting for its parent to hear of its end."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(what, seconds=8.0):
    deadline = real_time() + seconds
    while not what():
        assert real_time() < deadline
        time.sleep(0.01)


def read_pids(file):
    with suppress(FileNotFoundError):
        return json.loads(file.read_bytes())
    return {}


class Clock:
    """The supervisor's time, which stands still unless a test moves it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(supervise.time, "monotonic", lambda: self.now)

    def look_until(self, supervisor, seen):
        """Let the supervisor look every quarter of a second of its time until `seen()`; seconds that it took."""
        began = self.now
        supervisor.look()
        while not seen():
            assert self.now - began < 100
            self.now += 0.25
            supervisor.look()
        return self.now - began


def test_one_that_ends_is_started_again_after_growing_pauses(tmp_path, monkeypatch):
    clock, ends, begun = Clock(monkeypatch), [], []
    one = program(tmp_path, "one", "echo said; exit 3", before=lambda: begun.append(clock.now))
    other = program(tmp_path, "other", "exec sleep 60")
    supervisor = Supervisor([one, other], lambda *end: ends.append(end), tmp_path / "pids")
    supervisor.look()
    first = read_pids(tmp_path / "pids")
    assert first.keys() == {"one", "other"}
    pauses = []
    for count in range(6):
        wait_until(lambda: not is_there(supervisor._alive()["one"]))
        pauses.append(clock.look_until(supervisor, lambda after=count + 2: len(begun) == after))
    assert pauses == [2, 4, 8, 15, 15, 15]
    assert ends[0] == ("one", 3, "said")
    assert len(ends) == 6
    wait_until(lambda: not is_there(supervisor._alive()["one"]))
    clock.now += STEADY_S + 1  # as if it had run so long
    assert clock.look_until(supervisor, lambda: len(begun) == 8) == FIRST_PAUSE_S
    assert read_pids(tmp_path / "pids")["other"] == first["other"]
    assert read_pids(tmp_path / "pids")["one"] != first["one"]
    monkeypatch.undo()
    supervisor.end()
    assert not is_there(first["other"])


def test_all_end_with_it_also_their_children_and_those_that_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)
    programs = [
        program(tmp_path, "plain", "exec sleep 60"),
        program(tmp_path, "refuses", "trap '' TERM; echo ready; while :; do sleep 0.1; done"),
        program(tmp_path, "family", "sleep 60 & echo $!; wait"),
    ]
    stop, looked = threading.Event(), threading.Event()
    supervisor = Supervisor(programs, lambda *_: None, tmp_path / "pids")
    running = threading.Thread(target=supervisor.run, args=(stop, looked.set))
    running.start()
    try:
        wait_until(lambda: len(read_pids(tmp_path / "pids")) == 3)
        wait_until(lambda: tail(tmp_path / "log" / "refuses.log") == "ready")
        wait_until(lambda: tail(tmp_path / "log" / "family.log").isdigit())
        pids = read_pids(tmp_path / "pids")
        pids["child"] = int(tail(tmp_path / "log" / "family.log"))
        assert all(is_there(pid) for pid in pids.values())
    finally:
        stop.set()
        running.join(20)
    assert not running.is_alive()
    assert looked.is_set()
    assert not any(is_there(pid) for pid in pids.values())
    assert not (tmp_path / "pids").exists()


SERVICE = """
import sys, threading
from pathlib import Path
from invcoss_common.supervise import Program, Supervisor
folder = Path(sys.argv[1])
one = Program("one", ("sleep", "60"), {"PATH": sys.argv[2]}, folder / "one.log")
Supervisor([one], print, folder / "pids").run(threading.Event())
"""


def test_what_it_started_ends_with_a_supervisor_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SERVICE, tmp_path, os.environ["PATH"]]) as service:
        try:
            wait_until(lambda: read_pids(tmp_path / "pids"))
            pid = read_pids(tmp_path / "pids")["one"]
            assert is_there(pid)
        finally:
            service.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_there(pid))


def test_a_large_log_is_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "MAX_LOG_BYTES", 10)
    log = tmp_path / "log" / "one.log"
    log.parent.mkdir()
    for text, moved in (("short", False), ("longer than ten", True)):
        log.write_text(text)
        supervisor = Supervisor([program(tmp_path, "one", "echo more")], print, tmp_path / "pids")
        supervisor.look()
        wait_until(lambda: log.read_text().endswith("more\n"))
        supervisor.end()
        assert log.with_suffix(".old.log").exists() == moved


def test_a_lock_is_held_once(tmp_path):
    with alone(tmp_path / "lock", "runs already"):
        with pytest.raises(InvcossError, match="runs already"), alone(tmp_path / "lock", "runs already"):
            pytest.fail("held twice")
        assert supervise.is_locked(tmp_path / "lock")
    assert not supervise.is_locked(tmp_path / "lock")
    assert not supervise.is_locked(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_end_of_a_log_has_no_colours(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n\n\x1b[92mINFO \x1b[0m: one\x07\n\x1b[1;31mtwo\x1b[0m \xff\n")
    assert tail(tmp_path / "log", lines=2) == "INFO : one\ntwo \ufffd"
    assert tail(tmp_path / "none") == ""


def test_this_machine_is_never_called_through_a_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    assert set(direct_loopback().values()) == {"127.0.0.1,localhost,example.org"}
