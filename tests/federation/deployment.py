"""A whole deployment on this machine by its own commands: coordinator and sites, each in its folder, over TLS.

Everything is started as an operator and a hospital would, and may be killed; what is started is ended with the block.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from invcoss_common.canonical import write_atomic
from invcoss_common.config import Plan
from invcoss_common.phantoms import write_phantoms
from invcoss_common.seeds import derive_seed
from invcoss_common.supervise import free_port
from invcoss_server.runs import Run, open_run
from invcoss_site.home import SiteHome, load_home
from invcoss_site.policy import POLICY
from invcoss_site.work import worker_group

FEW_CASES = b"# Sites of a test have a dozen images.\n[cases]\nmin_train = 1\nmin_heldout = 1\n"
KINDS = ("serverapp", "superlink", "supernode", "agent", "trainer")
BIN = Path(sys.executable).parent


@dataclass
class Deployment:
    """`root`/consortium and `root`/sites/NAME; sites have phantoms of their first stage's modality in `root`/images."""

    root: Path
    plan: Plan
    phantoms: int = 12
    env: dict[str, str] = field(default_factory=dict)
    listen: str = "127.0.0.1"  # the gate; sites connect to localhost, so something may stand in between

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.consortium = self.root / "consortium"
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.plan_file = self.root / "plan.json.toml"

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Setting up

    def images(self, site: str) -> Path:
        """The folder of a site's images, made on first use."""
        folder = self.root / "images" / site
        if not folder.exists():
            modality = next(stage.modality for stage in self.plan.stages if stage.site == site)
            write_phantoms(folder, modality, self.phantoms, derive_seed(self.plan.seed, "phantoms", site))
        return folder

    def home_folder(self, site: str) -> Path:
        return self.root / "sites" / site

    def home(self, site: str) -> SiteHome:
        return load_home(self.home_folder(site))

    def enrol(self, sites: Sequence[str] | None = None) -> None:
        """Make the consortium and its sites, and enrol and join each."""
        if not self.consortium.exists():
            port = str(free_port())
            self.server("init", self.consortium, "--name", "chest", "--host", "localhost", "--port", port)
        for site in sites or self.plan.sites:
            folder = self.home_folder(site)
            write_atomic(folder / POLICY, FEW_CASES)
            self.site("init", folder, "--name", site, "--data", self.images(site))
            join = self.root / f"join-{site}.json"
            self.server("enrol-site", self.consortium, folder / "enrolment-request.json", "--out", join)
            self.site("join", folder, join)

    # Running

    def start(self, name: str = "coordinator") -> None:
        """Start the service of the coordinator or of a site."""
        command: list[str | Path] = (
            [BIN / "invcoss-server", "start", self.consortium, "--listen", self.listen]
            if name == "coordinator"
            else [BIN / "invcoss-site", "start", self.home_folder(name)]
        )
        with (self.root / f"{name}.log").open("ab") as log:
            self.services[name] = subprocess.Popen(
                command, env=self._env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def start_all(self) -> None:
        for name in ("coordinator", *self.plan.sites):
            self.start(name)

    def stop(self, *names: str) -> None:
        """Ask services to end, all by default, and wait."""
        for name in names or tuple(self.services):
            self.services[name].terminate()
        for name in names or tuple(self.services):
            try:
                self.services.pop(name).wait(40)
            except subprocess.TimeoutExpired:
                self.dump()
                raise

    def server(self, *arguments: object) -> str:
        """Output of `invcoss-server`; raises CalledProcessError."""
        return self._command("invcoss-server", *arguments)

    def site(self, *arguments: object) -> str:
        """Output of `invcoss-site`; raises CalledProcessError."""
        return self._command("invcoss-site", *arguments)

    def run(self, plan_toml: str) -> None:
        """Enter the plan, without waiting for it."""
        self.plan_file.write_text(plan_toml, encoding="utf-8")
        self.server("run", self.consortium, self.plan_file, "--detach")

    def state(self) -> Run:
        return open_run(self.consortium, self.plan.name)

    def wait_until(self, seen: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for `seen()`; raises TimeoutError, after printing every log, when it takes longer."""
        deadline = time.monotonic() + seconds
        while not seen():
            if time.monotonic() > deadline:
                self.dump()
                raise TimeoutError(f"{what} took longer than {seconds:g} s")
            time.sleep(0.2)

    # Killing

    def pid(self, kind: str, site: str | None = None) -> int | None:
        """Process id of one kind of process, of `site` if it is one of a site's; None when it does not run now."""
        if kind == "superlink":
            return _read_pids(self.consortium / "service.pids").get("superlink")
        if kind == "serverapp":
            superexec = _read_pids(self.consortium / "service.pids").get("superexec")
            return next(iter(_children(superexec, b"invcoss_server.launch")), None) if superexec else None
        home = self.home(site or self.plan.sites[0])
        if kind in ("supernode", "agent"):
            return _read_pids(home.root / "all.pids").get(kind)
        groups = [worker_group(home, file.parent.name) for file in home.spool.glob("s*/worker")]
        return next((group for group in groups if group), None)

    def kill(self, kind: str, site: str | None = None) -> bool:
        """kill -9; whether there was such a process."""
        pid = self.pid(kind, site)
        with suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def kill_everything(self) -> None:
        """As a power cut: kill -9 of every process of the deployment, workers and all."""
        mark = f"INVCOSS_TEST={self.root}".encode()
        for _ in range(3):
            for file in Path("/proc").glob("[0-9]*/environ"):
                with suppress(OSError):
                    if mark in file.read_bytes().split(b"\0"):
                        os.kill(int(file.parent.name), signal.SIGKILL)
            time.sleep(0.2)
        for service in self.services.values():
            service.wait()
        self.services.clear()

    def dump(self) -> None:
        """Print the end of every log."""
        for log in sorted(self.root.rglob("*.log")):
            print(f"--- {log.relative_to(self.root)}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)

    def _command(self, program: str, *arguments: object) -> str:
        command = [str(BIN / program), *map(str, arguments)]
        done = subprocess.run(command, env=self._env(), cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def _env(self) -> dict[str, str]:
        return {**os.environ, "INVCOSS_TEST": str(self.root), "OMP_NUM_THREADS": "1", **self.env}


def plan_toml(plan: Plan) -> str:
    """A plan as a TOML file; its tables are few and flat."""
    values = plan.model_dump(mode="json", exclude_none=True, exclude={"modalities", "simulation"})
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, dict):
            tables += [f"[{key}]", *(f"{name} = {json.dumps(v)}" for name, v in value.items())]
        elif key == "stages":
            for stage in value:
                tables += ["[[stages]]", *(f"{name} = {json.dumps(v)}" for name, v in stage.items())]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*lines, *tables, ""])


def _read_pids(file: Path) -> dict[str, int]:
    with suppress(FileNotFoundError, json.JSONDecodeError):
        pids: dict[str, int] = json.loads(file.read_bytes())
        return pids
    return {}


def _children(parent: int, word: bytes) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, ppid = file.read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state != "Z" and word in (file.parent / "cmdline").read_bytes():
                found.append(int(file.parent.name))
    return found
