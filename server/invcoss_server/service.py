"""What runs at the coordinator: the SuperLink and its SuperExec on loopback, the gate before them, and the runs.

FOLDER/flower/      Flower's own state, which may be lost: the register and the runs' states are the truth
FOLDER/log/         what each process says
FOLDER/service.lock, service.pids
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from invcoss_common.bundle import FEDERATION
from invcoss_common.canonical import write_atomic
from invcoss_common.config import RelayConfig
from invcoss_common.errors import InvcossError
from invcoss_common.supervise import (
    LEAN,
    Program,
    Supervisor,
    alone,
    flower_environment,
    free_port,
    launcher_folder,
    program_path,
    stop_on_signals,
)
from invcoss_server.flower_run import call_flower, is_healthy
from invcoss_server.provision import Consortium, load_consortium, sites
from invcoss_server.runs import CONSORTIUM, OUTCOME, Run, in_the_way, names, open_run

LOOK_S = 2.0
STARTING_S = 60.0  # longest from Flower's taking a run to the relay's being alive
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 300.0  # between two attempts of a run that may heal by itself

CONNECTION = """\
[superlink]
default = "federation"
[superlink.federation]
address = "127.0.0.1:{port}"
root-certificates = {ca}
"""


@dataclass
class _Attempt:
    """The last attempt of a run that this service started; `seen` is whether its relay was ever alive.

    `waits_for` names the run that keeps the next attempt waiting, and that the operator was told of.
    """

    flower_run: str = ""
    started: float = 0.0
    seen: bool = False
    pause_s: float = FIRST_RETRY_S
    due: float = 0.0
    waits_for: str = ""


class Service:
    """The coordinator's processes and what has to be seen to between them."""

    def __init__(self, folder: Path, listen: str, say: Callable[[str], None]) -> None:
        self.folder = folder.resolve()
        self.consortium: Consortium = load_consortium(folder)
        self.listen = listen
        self.say = say
        self.flower = self.folder / "flower"
        self.port = free_port()
        self.env = {**flower_environment(self.flower), **LEAN, CONSORTIUM: str(self.folder)}
        self.attempts: dict[str, _Attempt] = {}
        self.trouble: dict[str, str] = {}
        self.due = 0.0

    def serve(self) -> None:
        """Run until a signal asks to end; raises InvcossError when the service of this folder runs already."""
        with alone(self.folder / "service.lock", f"{self.folder}: the service of this consortium runs already"):
            self._prepare()
            supervisor = Supervisor(self._programs(), self._on_end, self.folder / "service.pids")
            self.say(
                f"consortium {self.consortium.name}: sites connect to {self.consortium.address}; "
                f"logs in {self.folder / 'log'}"
            )
            supervisor.run(stop_on_signals(), self._look)

    def _prepare(self) -> None:
        write_atomic(self.flower / "superexec.secret", secrets.token_bytes(32))
        write_atomic(self.flower / "app" / "pyproject.toml", FEDERATION.encode())
        ca = json.dumps(str(self.folder / "pki" / "ca.crt"))
        write_atomic(self.flower / "config.toml", CONNECTION.format(port=self.port, ca=ca).encode())

    def _programs(self) -> list[Program]:
        pki, log = self.folder / "pki", self.folder / "log"
        secret = ("--superexec-auth-secret-file", str(self.flower / "superexec.secret"))
        superlink = (
            program_path("flower-superlink"),
            *("--ssl-ca-certfile", str(pki / "ca.crt")),
            *("--ssl-certfile", str(pki / "server.crt"), "--ssl-keyfile", str(pki / "server.key")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", str(self.flower / "superlink.db")),
            *("--isolation", "process"),
            *secret,
        )
        superexec = (
            program_path("flower-superexec"),
            *("--runtime-api-address", f"127.0.0.1:{self.port}", "--root-certificates", str(pki / "ca.crt")),
            *secret,
        )
        launcher = launcher_folder(self.flower / "launcher", "flwr-serverapp", "invcoss_server.launch")
        pinned = {**self.env, "PATH": f"{launcher}:{self.env['PATH']}"}
        gate = (sys.executable, "-m", "invcoss_server.gate", str(self.folder), str(self.port), "--listen", self.listen)
        return [
            Program("superlink", superlink, self.env, log / "superlink.log"),
            Program("superexec", superexec, pinned, log / "superexec.log"),
            Program("gate", gate, self.env, log / "gate.log"),
        ]

    def _on_end(self, name: str, status: int, end: str) -> None:
        self.say(f"{name} ended with status {status} and is started again; {self.folder / 'log' / name}.log says:")
        for line in end.splitlines():
            self.say(f"  {line}")

    def _look(self) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + LOOK_S
        if not is_healthy(self.port, self.folder / "pki" / "ca.crt"):
            return
        self._try("the register", self._register)
        for name in names(self.folder):
            self._try(f"run {name}", partial(self._see_to, name))

    def _try(self, what: str, do: Callable[[], None]) -> None:
        """Do something; what goes wrong is said once, and tried again at the next look. Flower may just be away."""
        try:
            do()
            self.trouble.pop(what, None)
        except InvcossError as error:
            if self.trouble.get(what) != str(error):
                self.say(f"{what}: {error}")
            self.trouble[what] = str(error)

    def _register(self) -> None:
        """Make Flower let in the nodes of the register's valid keys, and no others."""
        file = self.flower / "nodes.json"
        nodes: dict[str, int] = json.loads(file.read_bytes()) if file.exists() else {}
        before = dict(nodes)
        for site in sites(self.folder):
            key = site.node_key_sha256
            if site.revoked is None and key not in nodes:
                nodes[key] = self._register_key(site.name, site.node_key)
                self.say(f"site {site.name} may connect")
            elif site.revoked is not None and (node := nodes.pop(key, 0)):
                self._flower("supernode", "unregister", str(node))
                self.say(f"a key of site {site.name} is revoked")
        if nodes != before:
            write_atomic(file, json.dumps(nodes).encode())

    def _register_key(self, name: str, key: str) -> int:
        with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
            file.write(key)
            file.flush()
            try:
                return int(self._flower("supernode", "register", file.name, "--name", name)["node-id"])
            except InvcossError as error:
                if "already" not in str(error):
                    raise
                return 0  # registered before a kill that came between Flower and us; the gate refuses it when revoked

    def _see_to(self, name: str) -> None:
        """Start an attempt of a run that shall go on, does not, and has its sites for itself."""
        run = open_run(self.folder, name)
        attempt = self.attempts.setdefault(name, _Attempt())
        if run.is_alive():
            attempt.seen = True
            return
        outcome = run.outcome()
        failed = outcome is not None and outcome.needs_operator
        if run.is_done() or run.state.wanted() != "running" or failed:
            self.attempts[name] = _Attempt(attempt.flower_run)  # it goes on when the operator wants it to
            return
        if self._is_starting(run) or time.monotonic() < attempt.due:
            return
        if other := in_the_way(self.folder, run, lambda run: run.is_alive() or self._is_starting(run)):
            if other != attempt.waits_for:
                self.say(f"run {name} waits for run {other}, which is at one of its sites")
            attempt.waits_for = other
            return
        if attempt.seen and outcome is None:
            self.say(f"run {name}: its relay was killed")
        if attempt.flower_run:
            with suppress(InvcossError):  # it is over already
                self._flower("stop", attempt.flower_run)
        pause = min(2 * attempt.pause_s, LONGEST_RETRY_S) if outcome is not None else FIRST_RETRY_S
        (run.folder / OUTCOME).unlink(missing_ok=True)
        started = str(self._flower("run", "app", "-c", f"run={json.dumps(name)}")["run-id"])
        self.attempts[name] = _Attempt(started, time.monotonic(), False, pause, time.monotonic() + pause)
        verb = "starts" if run.state.stage(0).state == "waiting" else "goes on"
        self.say(f"run {name}: the relay {verb}; {time_outs(run.plan.relay)}")

    def _is_starting(self, run: Run) -> bool:
        """Whether Flower took the run a moment ago, and neither its relay nor its outcome was seen."""
        attempt = self.attempts.get(run.plan.name, _Attempt())
        new = attempt.started and not attempt.seen and time.monotonic() - attempt.started < STARTING_S
        return bool(new) and run.outcome() is None

    def _flower(self, *arguments: str) -> dict[str, Any]:
        return call_flower(self.env, self.flower, *arguments)


def time_outs(relay: RelayConfig) -> str:
    """The time-outs of a run in one line, by their names in the plan."""
    absent = "" if relay.skip_absent_s is None else f" {relay.skip_absent_s:g} s, then goes on without it"
    return (
        f"asks a site again after {relay.answer_s:g} s without an answer (answer_s), "
        f"begins anew after {relay.stall_timeout_s:g} s without progress (stall_timeout_s), "
        f"waits for an absent site{absent or ' without limit'} (skip_absent_s)"
    )
