"""What runs at a site: the agent, Flower's SuperNode, which only dials out, and the SuperExec that starts the launcher.

Nothing listens but the SuperNode's runtime API, on loopback, behind a secret that SuperExec shares.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from invcoss_common.canonical import write_atomic
from invcoss_common.supervise import (
    LEAN,
    Program,
    Supervisor,
    alone,
    direct_loopback,
    flower_environment,
    free_port,
    launcher_folder,
    program_path,
    stop_on_signals,
    tail,
)
from invcoss_site.enrol import check_authority, load_authority, load_join
from invcoss_site.home import SiteHome, load_home

Part = Literal["all", "agent", "network"]

REFUSED = re.compile(r"^\[code: 2004\] (.*)", re.MULTILINE)  # so a SuperNode logs that it was not let in
TELL_AGAIN_S = 600.0


def serve(root: Path, part: Part, say: Callable[[str], None]) -> None:
    """Run the site in `root` until a signal asks to end; `part` is for sites that run agent and network apart.

    Raises DataError or CredentialError when the site has not joined, InvcossError when it runs already.
    """
    home, joined = load_home(root.resolve()), load_join(root)
    check_authority(load_authority(joined))
    os.environ.update(direct_loopback())  # for what this process itself sends, as for its programs
    with alone(home.root / f"{part}.lock", f"{root}: this site runs already"):
        programs = []
        if part != "network":
            home.spool.mkdir(parents=True, exist_ok=True)
            programs.append(_agent(home))
        if part != "agent":
            programs += _network(home, joined.address)
        stop = stop_on_signals()

        supervisor = Supervisor(programs, _Ends(home, say), home.root / f"{part}.pids")
        say(f"site {home.name} serves consortium {joined.consortium} at {joined.address}; logs in {home.log}")
        supervisor.run(stop)


class _Ends:
    """Says why a program ended; that the coordinator does not let the site in is said once, then from time to time."""

    def __init__(self, home: SiteHome, say: Callable[[str], None]) -> None:
        self.home = home
        self.say = say
        self.refusal, self.told = "", 0.0

    def __call__(self, name: str, status: int, end: str) -> None:
        why = refusal(tail(self.home.log / "supernode.log", lines=20)) if name == "supernode" else ""
        if not why:
            self.say(
                f"site {self.home.name}: {name} ended with status {status} and is started again; "
                f"{self.home.log / name}.log says:"
            )
            for line in end.splitlines():
                self.say(f"  {line}")
        elif why != self.refusal or time.monotonic() - self.told > TELL_AGAIN_S:
            self.say(f"site {self.home.name}: {why}; it tries again, and invcoss-site doctor says how it stands")
            self.refusal, self.told = why, time.monotonic()


def refusal(log_end: str) -> str:
    """In plain words, why the coordinator did not let in the SuperNode whose log ends so; "" if it ended otherwise."""
    found = REFUSED.search(log_end.rpartition("Starting Flower SuperNode")[2])
    if found is None:
        return ""
    if found[1].startswith("Failed to activate"):  # Flower's own words; the gate's say more
        return "the coordinator does not let this site in yet, as happens for a moment after enrolment or a crash"
    return f"the coordinator does not let this site in: {found[1]}"


def _agent(home: SiteHome) -> Program:
    command = (sys.executable, "-m", "invcoss_site.agent", str(home.root))
    return Program("agent", command, flower_environment(home.root / "flower"), home.log / "agent.log")


def _network(home: SiteHome, address: str) -> list[Program]:
    from invcoss_site.node import release_node  # here, because it imports Flower, which takes seconds

    flower = home.root / "flower"
    secret = flower / "superexec.secret"
    write_atomic(secret, secrets.token_bytes(32))
    env = flower_environment(flower) | LEAN
    port = free_port()
    supernode = (
        program_path("flower-supernode"),
        *("--superlink", address),
        *("--root-certificates", str(home.root / "ca.crt")),
        *("--auth-supernode-private-key", str(home.root / "keys" / "node")),
        *("--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--superexec-auth-secret-file", str(secret)),
        *("--node-config", f"home={json.dumps(str(home.root))}"),
    )
    superexec = (
        program_path("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{port}", "--insecure"),
        *("--superexec-auth-secret-file", str(secret)),
    )
    launcher = launcher_folder(home.root / "launcher", "flwr-clientapp", "invcoss_site.launch")
    pinned = {**env, "PATH": f"{launcher}:{env['PATH']}"}
    return [
        Program("supernode", supernode, env, home.log / "supernode.log", before=partial(release_node, home)),
        Program("superexec", superexec, pinned, home.log / "superexec.log"),
    ]
