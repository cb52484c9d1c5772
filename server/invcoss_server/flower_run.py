"""A private Flower run on this machine: its own SuperLink on loopback, the simulation runtime, and their clean end.

All that is started carries a mark in its environment, by which it is found and ended: Flower and Ray detach what they
start, so a process group would not reach it.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from invcoss_common.errors import InvcossError

MARK = "INVCOSS_SIMULATION"
START_S = 60.0  # longest start of the SuperLink
GRACE_S = 5.0  # between asking a process to end and ending it
OBJECT_STORE_BYTES = 1 << 30  # Ray's; it holds messages of at most 128 MiB for a moment

_APP = """\
[project]
name = "invcoss-simulation"
version = "1.0.0"
description = "The configuration of one simulation; the code is installed"
license = { text = "Apache-2.0" }
[tool.flwr.app]
publisher = "invcoss"
fab-include = ["/pyproject.toml"]
[tool.flwr.app.components]
serverapp = "invcoss_server.app:app"
clientapp = "invcoss_site.app:app"
[tool.flwr.app.config]
"""
_CONNECTION = """\
[superlink]
default = "private"
[superlink.private]
address = "127.0.0.1:{port}"
insecure = true
"""


class FlowerRun:
    """One run of our app with `nodes` simulated nodes, in a SuperLink that serves nothing else."""

    def __init__(self, scratch: Path, log: Path, mark: str, nodes: int, config: dict[str, str]) -> None:
        """Start both; `scratch` is an empty folder, `log` gets the output of all processes. Raises InvcossError."""
        self.scratch = scratch
        self.env = _environment(scratch, mark)
        port = _free_port()
        (scratch / "app").mkdir()
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
        (scratch / "app" / "pyproject.toml").write_text(_APP + "".join(lines), encoding="utf-8")
        (scratch / "config.toml").write_text(_CONNECTION.format(port=port), encoding="utf-8")
        with log.open("ab") as output:
            self.superlink = subprocess.Popen(
                [
                    _program("flower-superlink"),
                    "--insecure",
                    "--simulation",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(port),
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._await_start(port, log)
        ray = "init-args-num-cpus=1 init-args-log-to-driver=true client-resources-num-cpus=1"
        gpu = "init-args-num-gpus=0 client-resources-num-gpus=0.0"  # visits and the relay see the GPU, Ray does not
        self.id = str(self._flwr("run", "app", "--federation-config", f"num-supernodes={nodes} {ray} {gpu}")["run-id"])

    def ended(self) -> bool:
        """Whether Flower says that the run is over, well or not."""
        if self.superlink.poll() is not None:
            return True
        return str(self._flwr("ls", "--run-id", self.id)["runs"][0]["status"]).startswith("finished")

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        command = [_program("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(command, env=self.env, cwd=self.scratch, capture_output=True, text=True, check=False)
        with suppress(json.JSONDecodeError):
            answer: dict[str, Any] = json.loads(done.stdout)
            if answer.get("success"):
                return answer
        raise InvcossError(f"Flower could not '{arguments[0]}': {(done.stdout + done.stderr).strip()[-2000:]}")

    def _await_start(self, port: int, log: Path) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.superlink.poll() is None:
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        raise InvcossError(f"Flower's SuperLink did not start; see {log}")


def end_marked(mark: str) -> None:
    """End every process that carries `mark` in its environment, except this one."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        asked: set[int] = set()
        deadline = time.monotonic() + GRACE_S
        while (found := _marked(mark)) and time.monotonic() < deadline:
            for process in found - asked:
                with suppress(ProcessLookupError):
                    os.kill(process, how)
            asked |= found
            time.sleep(0.05)


def _marked(mark: str) -> set[int]:
    wanted, found = f"{MARK}={mark}".encode(), set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if wanted in file.read_bytes().split(b"\0"):
                found.add(int(file.parent.name))
    return found - {os.getpid()}


def _environment(scratch: Path, mark: str) -> dict[str, str]:
    """The environment of Flower, Ray and the sites' workers: quiet, offline, nothing outside `scratch`."""
    bin_folder = Path(sys.executable).parent
    threads = str(os.cpu_count() or 1)
    return {
        "OMP_NUM_THREADS": threads,  # Ray would set 1 for its workers, and so for the visits
        **os.environ,
        MARK: mark,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "NO_PROXY": ",".join(filter(None, ("127.0.0.1,localhost", os.environ.get("NO_PROXY")))),
        "FLWR_HOME": str(scratch),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_TMPDIR": str(scratch),
        "RAY_worker_niceness": "0",  # Ray would give its workers, and so the visits, the lowest priority
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave the GPU visible to the visits that its workers start
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES),
        "RAY_AUTH_MODE": "token",  # Ray listens on every network interface and runs what it is sent
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
