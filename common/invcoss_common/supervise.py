"""Keeps the processes of a service running: starts them, starts one again that ended, and ends all with the service.

Both `invcoss-server start` and `invcoss-site start` stand on it. It holds no state: what a process does is its own
affair, and a service that was killed is simply started again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import InvcossError

GRACE_S = 10.0  # between asking a process to end and ending it
LOOK_S = 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0  # before a process that ended is started again
STEADY_S = 60.0  # one that ran so long is started again after the first pause
MAX_LOG_BYTES = 32 << 20  # a log larger than this is moved aside when its process starts
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

FLOWER_TASKS = ("flwr-clientapp", "flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-model", "flwr-connector")

OnEnd = Callable[[str, int, str], None]


@dataclass(frozen=True)
class Program:
    """One process to keep running: `command` with `env`, its output appended to `log`; `before` runs ahead of it."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    log: Path
    before: Callable[[], None] | None = None


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0


class Supervisor:
    """Runs `programs`; `on_end(name, exit status, end of its log)` hears of each that ended.

    Their process ids are in the file `pids`, as JSON by name, while they run.
    """

    def __init__(self, programs: list[Program], on_end: OnEnd, pids: Path) -> None:
        self._running = [_Running(program) for program in programs]
        self._on_end = on_end
        self._pids = pids

    def run(self, stop: threading.Event, also: Callable[[], None] = lambda: None) -> None:
        """Keep the programs running until `stop` is set, and do `also` in between; they are ended in the end."""
        try:
            while True:
                self.look()
                also()
                if stop.wait(LOOK_S):
                    return
        finally:
            self.end()
            self._pids.unlink(missing_ok=True)

    def look(self) -> None:
        """Start what is not running and due."""
        before = self._alive()
        for one in self._running:
            if one.process is not None and (status := one.process.poll()) is not None:
                one.process = None
                steady = time.monotonic() - one.started > STEADY_S
                one.pause_s = FIRST_PAUSE_S if steady else min(2 * one.pause_s, LONGEST_PAUSE_S)
                one.due = time.monotonic() + one.pause_s
                self._on_end(one.program.name, status, tail(one.program.log))
            if one.process is None and time.monotonic() >= one.due:
                if one.program.before:
                    one.program.before()
                one.process, one.started = _start(one.program), time.monotonic()
        if self._alive() != before:
            write_atomic(self._pids, json.dumps(self._alive()).encode())

    def _alive(self) -> dict[str, int]:
        return {one.program.name: one.process.pid for one in self._running if one.process is not None}

    def end(self) -> None:
        """End all: ask first, then insist."""
        alive = [one.process for one in reversed(self._running) if one.process is not None]
        for how in (signal.SIGTERM, signal.SIGKILL):
            for process in alive:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
            deadline = time.monotonic() + GRACE_S
            for process in alive:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.1))
            alive = [process for process in alive if process.poll() is None]


@contextmanager
def alone(path: Path, complaint: str) -> Iterator[None]:
    """Hold the lock `path`; raises InvcossError with `complaint` when another process does."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvcossError(complaint) from None
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock `path`."""
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def stop_on_signals() -> threading.Event:
    """An event that SIGINT, SIGTERM and SIGHUP set."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


def end_with_parent() -> None:
    """For a process that was just forked: end it when its parent ends (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def program_path(name: str) -> str:
    """A command that was installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def direct_loopback() -> dict[str, str]:
    """The two variables that keep calls to this machine itself from any proxy; of the two, lower case counts."""
    set_already = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"))
    direct = ",".join(filter(None, ("127.0.0.1,localhost", *set_already)))
    return {"no_proxy": direct, "NO_PROXY": direct}


# Of glibc: a large block goes back to the system when it is freed. Flower cuts messages into pieces of 5 MB, which
# would stay with the process. Not for those that compute, which would ask for each tensor anew.
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}


def flower_environment(flower_home: Path) -> dict[str, str]:
    """The environment of a Flower process: quiet, calling nobody, its files in `flower_home`."""
    bin_folder = Path(sys.executable).parent
    return {
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        **direct_loopback(),
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }


def launcher_folder(folder: Path, task: str, module: str) -> Path:
    """Make `folder`, to be put first in SuperExec's PATH, with a program for each kind of Flower's tasks; returns it.

    That for `task` runs our `module`, all others refuse.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = f'exec "{sys.executable}" -I -m {module} "$@"'
    refuse = "echo 'no task of this kind is run here' >&2; exit 1"
    for name in FLOWER_TASKS:
        draft = folder / f".{name}"
        draft.write_text(f"#!/bin/sh\n{run if name == task else refuse}\n", encoding="utf-8")
        draft.chmod(0o700)
        draft.replace(folder / name)
    return folder


def tail(log: Path, lines: int = 5, most_bytes: int = 4096) -> str:
    """The last lines of a log, without colours."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - most_bytes, 0))
        text = file.read().decode(errors="replace")
        kept = [line for line in text.splitlines() if line.strip()][-lines:]
        return "\n".join("".join(c for c in COLOUR.sub("", line) if c.isprintable()) for line in kept)
    return ""


def _start(program: Program) -> subprocess.Popen[bytes]:
    program.log.parent.mkdir(parents=True, exist_ok=True)
    if program.log.exists() and program.log.stat().st_size > MAX_LOG_BYTES:
        program.log.replace(program.log.with_suffix(".old.log"))
    with program.log.open("ab") as output:
        return subprocess.Popen(
            program.command,
            env=program.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
