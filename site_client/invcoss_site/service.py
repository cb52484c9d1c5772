"""What runs at a site: the agent, Flower's SuperNode, which only dials out, and the SuperExec that starts the launcher.

Nothing listens but the SuperNode's runtime API, on loopback, behind a secret that SuperExec shares.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from invcoss_common.canonical import write_atomic
from invcoss_common.supervise import (
    Program,
    Supervisor,
    alone,
    direct_loopback,
    flower_environment,
    free_port,
    program_path,
    stop_on_signals,
)
from invcoss_site.enrol import check_authority, load_authority, load_join
from invcoss_site.home import SiteHome, load_home

Part = Literal["all", "agent", "network"]


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

        def on_end(name: str, status: int, end: str) -> None:
            say(f"{name} ended with status {status} and is started again; its log says:")
            for line in end.splitlines():
                say(f"  {line}")

        supervisor = Supervisor(programs, on_end, home.root / f"{part}.pids")
        say(f"site {home.name} serves consortium {joined.consortium} at {joined.address}; logs in {home.log}")
        supervisor.run(stop)


def _agent(home: SiteHome) -> Program:
    command = (sys.executable, "-m", "invcoss_site.agent", str(home.root))
    return Program("agent", command, flower_environment(home.root / "flower"), home.log / "agent.log")


def _network(home: SiteHome, address: str) -> list[Program]:
    from invcoss_site.launch import launcher_folder  # here, because they import Flower, which takes seconds
    from invcoss_site.node import release_node

    flower = home.root / "flower"
    secret = flower / "superexec.secret"
    write_atomic(secret, secrets.token_bytes(32))
    env = flower_environment(flower)
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
    pinned = {**env, "PATH": f"{launcher_folder(home.root / 'launcher')}:{env['PATH']}"}
    return [
        Program("supernode", supernode, env, home.log / "supernode.log", before=partial(release_node, home)),
        Program("superexec", superexec, pinned, home.log / "superexec.log"),
    ]
