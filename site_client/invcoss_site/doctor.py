"""`invcoss-site doctor`: the whole way from the site's settings to its being let in, and what else a visit needs.

Each step is a function that says what it found, or raises an error that says who must do what. Nothing of the site is
sent but a signed call that has no effect, and nothing that runs is disturbed.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from invcoss_common.bundle import FEDERATION, check_bundle
from invcoss_common.checkup import Checkup, Doubt, disk, gpu, memory, software
from invcoss_common.errors import BundleRefused, CredentialError, DataError, InvcossError
from invcoss_common.supervise import flower_environment, is_locked, program_path
from invcoss_site.connection import Way, check_clock, connect, find_way, resolve, secure
from invcoss_site.enrol import check_authority, load_authority, load_join
from invcoss_site.home import load_home
from invcoss_site.policy import POLICY, SitePolicy, load_policy
from invcoss_site.work import AGENT_LOCK

COUNTING_S = 5.0  # longest count of the images
BUILD_S = 60.0  # longest build of the app bundle
AUTHORITY_ENDS_SOON = timedelta(days=180)


def examine(root: Path, timeout_s: float, checkup: Checkup) -> None:
    """Go through all steps for the site in `root`; each wait for the network is at most `timeout_s` long."""
    root = root.resolve()
    step = checkup.step
    step("settings", lambda: f"site {load_home(root).name}, images in {load_home(root).data}")
    step("enrolment", partial(_enrolment, root), ("settings",))
    step("proxy", partial(_proxy, root), ("enrolment",))
    step("DNS", partial(_dns, root), ("proxy",))
    step("TCP", partial(_tcp, root, timeout_s), ("DNS",))
    step("TLS", partial(_tls, root, timeout_s), ("TCP",))
    step("clock", partial(_clock, root, timeout_s), ("TLS",))
    step("authentication", partial(_authentication, root, timeout_s), ("TLS", "clock"))
    step("disk", partial(disk, root))
    step("memory", memory)
    step("GPU", partial(gpu, "training"))
    step("data", partial(_data, root), ("settings",))
    step("policy", partial(_policy, root))
    step("software", _software)
    step("service", partial(_service, root), ("settings",))


def _enrolment(root: Path) -> str:
    for file in (root / "keys" / "node", root / "keys" / "signing.pem"):
        with suppress(FileNotFoundError):  # which load_join says better
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o077:
                raise CredentialError(
                    f"{file}: others on this machine may read this key (mode {mode:04o}); the site's IT must make it "
                    f"private (chmod 600 {file}), and if anyone may have copied it, ask the operator to revoke it"
                )
    joined = load_join(root)
    authority = load_authority(joined)
    check_authority(authority)
    try:
        kept = (root / "ca.crt").read_bytes()
    except OSError:
        kept = b""
    if kept != joined.ca_certificate.encode():
        raise CredentialError(
            f"{root / 'ca.crt'}: not the certificate of the join file; give the file again: "
            f"invcoss-site join {root} {root / 'join.json'}"
        )
    end = authority.not_valid_after_utc
    text = f"joined consortium {joined.consortium} at {joined.address}, whose authority is valid until {end:%Y-%m-%d}"
    if end - datetime.now(UTC) < AUTHORITY_ENDS_SOON:
        return Doubt(f"{text}; ask the operator when a new join file will come")
    return text


def _proxy(root: Path) -> str:
    way = _way(root)
    if way.proxy:
        return f"{way.address} is reached through the proxy {way.proxy}, by HTTPS_PROXY or ALL_PROXY"
    return f"none: {way.address} is reached directly"


def _dns(root: Path) -> str:
    way, found = _way(root), resolve(_way(root))
    return f"the proxy is {found}; it looks up the coordinator" if way.proxy else f"the coordinator is {found}"


def _tcp(root: Path, timeout_s: float) -> str:
    way = _way(root)
    connect(way, timeout_s).close()
    return f"{way.address} accepts connections{way.through}"


def _tls(root: Path, timeout_s: float) -> str:
    if unseen := _unseen(root):
        return unseen
    joined = load_join(root)
    found = secure(_way(root), load_authority(joined), joined.ca_certificate, timeout_s)
    return f"{found.tls}, certificate by the consortium's authority, valid until {found.valid_until:%Y-%m-%d}"


def _clock(root: Path, timeout_s: float) -> str:
    if unseen := _unseen(root):
        return unseen
    joined = load_join(root)
    found = secure(_way(root), load_authority(joined), joined.ca_certificate, timeout_s)
    if found.ahead_s is None:
        return Doubt("the coordinator did not tell its time, so that the clocks could not be compared")
    check_clock(found.ahead_s)
    return "agrees with the coordinator's" + (f" within {abs(found.ahead_s):.0f} s" if abs(found.ahead_s) >= 1 else "")


def _authentication(root: Path, timeout_s: float) -> str:
    from invcoss_site.node import knock  # here, because it imports Flower, which takes seconds

    match knock(root, timeout_s):
        case "let in":
            return "the coordinator lets this site's key in"
        case "starting":
            return Doubt(
                "the coordinator is starting; try again in a minute, and if it stays so, the operator must look at it "
                "(invcoss-server doctor)"
            )
        case "not told yet":
            return Doubt(
                "this key is enrolled, and the coordinator's Flower has not been told yet; try again in a minute, and "
                "if it stays so, the operator must look at it (invcoss-server doctor)"
            )


def _data(root: Path) -> str:
    from invcoss_site.ingest import ENDINGS, is_image  # here, because the readers take seconds to import

    home = load_home(root)
    if not home.data.is_dir():
        raise DataError(f"{home.data}: no such folder; set `data` in site.toml to the folder that holds the images")
    for name in home.index:
        if not os.access(home.data / name, os.R_OK):
            raise DataError(f"{home.data / name}: can't read this index; correct `index` in site.toml")
    closed: list[OSError] = []
    count, deadline, whole = 0, time.monotonic() + COUNTING_S, True
    for path in _files(home.data, closed):
        if is_image(path):
            if not count and not os.access(path, os.R_OK):
                raise DataError(f"{path}: can't be read; the site's IT must let this user read the images")
            count += 1
        if time.monotonic() > deadline:
            whole = False
            break
    if closed and not count:
        raise DataError(f"{closed[0].filename}: can't be read ({closed[0].strerror}); the site's IT must let this user")
    if not count and whole:
        raise DataError(f"{home.data}: no images ({', '.join(ENDINGS)}); set `data` in site.toml to their folder")
    text = f"{count} image files in {home.data}" if whole else f"more than {count} image files in {home.data}"
    if closed:
        return Doubt(f"{text}; {len(closed)} folders there can't be read, the first: {closed[0].filename}")
    return text


def _policy(root: Path) -> str:
    policy, default = load_policy(root), SitePolicy()
    few = policy.cases.min_train < default.cases.min_train or policy.cases.min_heldout < default.cases.min_heldout
    surprises = {
        "any plan of the coordinator is done, unasked ([trust] plans, approval)": not (
            policy.trust.plans or policy.trust.approval
        ),
        "further keys than the coordinator's may sign hand-offs ([trust] coordinators)": policy.trust.coordinators,
        "fewer cases than by default may stand behind what leaves ([cases])": few,
        "pools may be handed on without this site's audit ([audit] required)": not policy.audit.required,
        "differential privacy is required, and may be spent without limit ([dp] max_epsilon)": policy.dp.required
        and policy.dp.max_epsilon is None,
    }
    found = [text for text, holds in surprises.items() if holds]
    where = f"{root / POLICY}" if (root / POLICY).exists() else f"{root / POLICY} is not there, so the defaults hold"
    return Doubt(f"{where}: {'; '.join(found)}") if found else where


def _software() -> str:
    from invcoss_site.launch import missing_names  # here, because it imports Flower

    text = software()
    if missing := missing_names():
        raise InvcossError(
            f"this Flower has no {', '.join(missing)}, which keeps the coordinator's code out; do not start the site, "
            "install the version of flwr that came with InvCoSS-relay"
        )
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "app"  # Flower refuses a name with an underscore, which a temporary folder may have
        app.mkdir()
        (app / "pyproject.toml").write_text(FEDERATION, encoding="utf-8")
        command = (program_path("flwr"), "build", "--app", str(app))
        env = flower_environment(app / "home")
        done = subprocess.run(command, env=env, cwd=app, capture_output=True, text=True, timeout=BUILD_S, check=False)
        built = list(app.glob("*.fab"))
        if len(built) != 1:
            raise InvcossError(f"Flower can't build the app bundle here; report it: {done.stderr.strip()[-300:]}")
        try:
            check_bundle(built[0].read_bytes())
        except BundleRefused as error:
            raise InvcossError(f"this site would refuse the bundle of its own Flower ({error}); report it") from None
    return f"{text}; the launcher fits this Flower"


def _service(root: Path) -> str:
    running = {part: is_locked(root / f"{part}.lock") for part in ("all", "agent", "network")}
    agent, network = (running["all"] or running[part] for part in ("agent", "network"))
    if not agent and not network:
        return Doubt(f"does not run; start it with: invcoss-site start {root}")
    if agent != network:
        there, other = ("agent", "network") if agent else ("network", "agent")
        return Doubt(f"only the {there} runs on this machine; the other part: invcoss-site start {root} --part {other}")
    alive: set[str] = set()
    for part in running:
        with suppress(FileNotFoundError, ValueError):
            alive |= set(json.loads((root / f"{part}.pids").read_bytes()))
    if not is_locked(load_home(root).spool / AGENT_LOCK):
        alive.discard("agent")
    if gone := {"agent", "supernode", "superexec"} - alive:
        logs = ", ".join(str(root / "log" / f"{name}.log") for name in sorted(gone))
        return Doubt(f"runs, but {', '.join(sorted(gone))} is starting (again); if that stays so, see {logs}")
    return "agent and network run"


def _way(root: Path) -> Way:
    return find_way(load_join(root).address)


def _unseen(root: Path) -> str:
    """What is said in place of looking through a proxy that can't be looked through; empty for every other way."""
    proxy = _way(root).proxy
    if proxy is None or proxy.scheme == "http":
        return ""
    return Doubt(f"can't be seen through {proxy}, which is spoken to over TLS itself; 'authentication' tries it")


def _files(folder: Path, closed: list[OSError]) -> Iterator[Path]:
    """Every file under `folder` that is not hidden; a folder that can't be read is added to `closed`."""
    for where, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in files if not name.startswith("."))
