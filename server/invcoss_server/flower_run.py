"""A private Flower run on this machine: its own SuperLink on loopback, the simulation runtime, and their clean end.

All that is started carries a mark in its environment, by which it is found and ended: Flower and Ray detach what they
start, so a process group would not reach it.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import ssl
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from invcoss_common.bundle import bundle_text
from invcoss_common.errors import InvcossError
from invcoss_common.supervise import end_with_parent, flower_environment, free_port, program_path

MARK = "INVCOSS_SIMULATION"
START_S = 60.0  # longest start of the SuperLink
GRACE_S = 5.0  # between asking a process to end and ending it
OBJECT_STORE_BYTES = 1 << 30  # Ray's; it holds messages of at most 128 MiB for a moment

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
        port = free_port()
        (scratch / "app").mkdir()
        (scratch / "app" / "pyproject.toml").write_text(bundle_text("invcoss-simulation", config), encoding="utf-8")
        (scratch / "config.toml").write_text(_CONNECTION.format(port=port), encoding="utf-8")
        with log.open("ab") as output:
            self.superlink = subprocess.Popen(
                [
                    program_path("flower-superlink"),
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
                preexec_fn=end_with_parent,
            )
        self._await_start(port, log)
        ray = "init-args-num-cpus=1 init-args-log-to-driver=true client-resources-num-cpus=1"
        gpu = "init-args-num-gpus=0 client-resources-num-gpus=0.0"  # visits and the relay see the GPU, Ray does not
        self.id = str(
            call_flower(self.env, scratch, "run", "app", "--federation-config", f"num-supernodes={nodes} {ray} {gpu}")[
                "run-id"
            ]
        )

    def ended(self) -> bool:
        """Whether Flower says that the run is over, well or not."""
        if self.superlink.poll() is not None:
            return True
        return str(call_flower(self.env, self.scratch, "ls", "--run-id", self.id)["runs"][0]["status"]).startswith(
            "finished"
        )

    def _await_start(self, port: int, log: Path) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.superlink.poll() is None:
            if is_healthy(port):
                return
            time.sleep(0.1)
        raise InvcossError(f"Flower's SuperLink did not start; see {log}")


def call_flower(env: dict[str, str], folder: Path, *arguments: str) -> dict[str, Any]:
    """The answer of the command `flwr` with `arguments`, in `folder`; raises InvcossError when it fails."""
    command = [program_path("flwr"), *arguments, "--format", "json"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    with suppress(json.JSONDecodeError):
        answer: dict[str, Any] = json.loads(done.stdout)
        if answer.get("success"):
            return answer
    raise InvcossError(f"Flower could not '{arguments[0]}': {(done.stdout + done.stderr).strip()[-2000:]}")


def is_healthy(port: int, ca: Path | None = None) -> bool:
    """Whether a SuperLink answers on this port of the loopback interface; over TLS if `ca` names the authority."""
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    with suppress(OSError, http.client.HTTPException):
        connection = (
            http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=context)
            if context
            else http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        )
        with closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    return False


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
    threads = str(os.cpu_count() or 1)
    return {
        "OMP_NUM_THREADS": threads,  # Ray would set 1 for its workers, and so for the visits
        **flower_environment(scratch),
        MARK: mark,
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_TMPDIR": str(scratch),
        "RAY_worker_niceness": "0",  # Ray would give its workers, and so the visits, the lowest priority
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave the GPU visible to the visits that its workers start
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES),
        "RAY_AUTH_MODE": "token",  # Ray listens on every network interface and runs what it is sent
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
