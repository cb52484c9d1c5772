"""`invcoss-server doctor`: files, certificates, service and runs, and for everything that can be wrong its own line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.servers import coordinator, free_port

from invcoss_common.checkup import Checkup
from invcoss_common.config import load_plan
from invcoss_common.enrolment import sign_request
from invcoss_common.errors import CredentialError
from invcoss_common.keys import generate_ec_key, generate_signing_key, public_text, save_key
from invcoss_common.supervise import alone
from invcoss_server import doctor
from invcoss_server.cli import main
from invcoss_server.gate import SEEN
from invcoss_server.provision import enrol_site, init_consortium, renew_server_certificate, revoke_site
from invcoss_server.runs import RUNS, Outcome, add_run, write_outcome

BEFORE = ("consortium", "authority", "certificate", "sites", "service")
SERVED, NOT_SERVED = ("gate", "closed", "SuperLink"), ("port",)
AFTER = ("name", "disk", "memory", "GPU", "software", "runs", "heard")
DAY = timedelta(days=1)


@pytest.fixture
def folder(tmp_path):
    init_consortium(tmp_path / "chest", "chest", ("localhost",), free_port())
    return tmp_path / "chest"


def examined(folder):
    checkup = Checkup(lambda _: None)
    doctor.examine(folder, checkup)
    steps = {step.step: step for step in checkup.steps}
    assert tuple(steps) in (BEFORE + SERVED + AFTER, BEFORE + NOT_SERVED + AFTER)
    return steps


def told(folder, name, state="failed", code=9):
    """The text of one step, which must end in `state`."""
    step = examined(folder)[name]
    assert (step.state, step.exit_code) == (state, code if state == "failed" else 0), step
    return step.text


def enrol(folder, name):
    request = sign_request(name, public_text(generate_ec_key().public_key()), generate_signing_key())
    enrol_site(folder, request.to_bytes())


def port_of(folder):
    return json.loads((folder / "pki" / "consortium.json").read_bytes())["port"]


def test_a_consortium_before_its_service_runs(folder):
    steps = examined(folder)
    assert {name for name, step in steps.items() if step.state == "warning"} <= {"sites", "service", "disk", "memory"}
    assert not any(step.exit_code for step in steps.values())
    assert steps["sites"].text == "none is enrolled; invcoss-server enrol-site takes a site's request"
    assert steps["service"].text == f"does not run; start it with: invcoss-server start {folder}"
    assert steps["port"].text == f"{port_of(folder)} is free for the gate"
    assert steps["runs"].text == "none"
    for name in ("north", "south"):
        enrol(folder, name)
    revoke_site(folder, "south")
    assert told(folder, "sites", "ok") == "1 enrolled (north); 1 pairs of keys are revoked"


def test_no_consortium(tmp_path):
    steps = examined(tmp_path)
    assert "no consortium here; invcoss-server init makes one" in steps["consortium"].text
    assert all(steps[name].state == "not tried" for name in (*BEFORE[1:], "port", "name", "runs", "heard"))


def test_files(folder):
    secret = folder / "pki" / "coordinator.pem"
    secret.chmod(0o644)
    assert told(folder, "consortium").endswith(f"may read it (mode 0644); make it private: chmod 600 {secret}")
    secret.unlink()
    assert told(folder, "consortium") == f"{secret}: missing; restore it from the backup"
    save_key(generate_ec_key(), secret)
    assert "not an Ed25519 private key" in told(folder, "consortium")
    save_key(generate_signing_key(), secret)
    save_key(generate_ec_key(), folder / "pki" / "ca.key")
    assert told(folder, "authority").endswith("ca.key: not the key of ca.crt; restore both from the backup")


@pytest.mark.parametrize(
    ("made", "state", "says"),
    [
        (-3500 * DAY, "warning", "; before that, make a new consortium and send every site a new join file"),
        (-4000 * DAY, "failed", "; make a new consortium and send every site a new join file"),
        (2 * DAY, "failed", "which is to come: this machine's clock is slow; set it"),
    ],
)
def test_authority(tmp_path, made, state, says):
    init_consortium(tmp_path / "c", "chest", ("localhost",), free_port(), datetime.now(UTC) + made)
    assert told(tmp_path / "c", "authority", state).endswith(says)


def test_certificate(tmp_path, folder):
    pki, now = folder / "pki", datetime.now(UTC)
    renew = f"; invcoss-server renew-certificate {folder}"
    renew_server_certificate(folder, now - 380 * DAY)
    assert told(folder, "certificate", "warning").startswith("expires on ")
    renew_server_certificate(folder, now - 400 * DAY)
    assert told(folder, "certificate").startswith("expired on ")
    assert told(folder, "certificate").endswith(renew)
    renew_server_certificate(folder, now + 2 * DAY)
    assert "which is to come; set this machine's clock, or if it is right: invcoss-server" in told(
        folder, "certificate"
    )
    renew_server_certificate(folder)
    settings = (pki / "consortium.json").read_text()
    (pki / "consortium.json").write_text(settings.replace('"localhost"', '"localhost", "relay.example.org"'))
    assert told(folder, "certificate") == f"{pki / 'server.crt'}: not for relay.example.org{renew}"
    (pki / "consortium.json").write_text(settings)
    save_key(generate_ec_key(), pki / "server.key")
    assert told(folder, "certificate").startswith(f"{pki / 'server.key'}: not the key of server.crt; make a fitting")
    init_consortium(tmp_path / "other", "chest", ("localhost",))
    for name in ("server.crt", "server.key"):
        (pki / name).write_bytes((tmp_path / "other" / "pki" / name).read_bytes())
    assert told(folder, "certificate") == f"{pki / 'server.crt'}: not issued by this consortium's authority{renew}"


def test_port(folder, monkeypatch):
    with socket.create_server(("", port_of(folder))):
        text = told(folder, "port", code=1)
    assert "can't be listened on (Address already in use" in text
    assert "end the program that uses it (ss -ltnp shows it)" in text

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert told(folder, "port", code=1).startswith(
        f"this user may not listen on port {port_of(folder)}; as root: sysctl"
    )


def test_name(tmp_path):
    init_consortium(tmp_path / "a", "chest", ("coordinator.invalid", "localhost"), free_port())
    assert told(tmp_path / "a", "name", "warning").startswith("coordinator.invalid: not found from here; unless")
    init_consortium(tmp_path / "b", "chest", ("10.0.0.1",), free_port())
    assert told(tmp_path / "b", "name", "ok") == "10.0.0.1"


@contextmanager
def served(folder, shown=None, superlink=None, **changes):
    """As if the service ran: its lock, process ids, settings, and a server in place of gate and SuperLink."""
    with ExitStack() as held:
        held.enter_context(alone(folder / "service.lock", ""))
        pids = {"superlink": 1, "superexec": 1, "gate": os.getpid()}
        (folder / "service.pids").write_text(json.dumps(pids))
        (folder / "flower").mkdir(exist_ok=True)
        address = f"127.0.0.1:{superlink or port_of(folder)}"
        (folder / "flower" / "config.toml").write_text(f'[superlink.federation]\naddress = "{address}"\n')
        held.enter_context(coordinator(shown or folder, port_of(folder), **changes))
        yield


def test_the_service_answers(folder):
    with served(folder):
        steps = examined(folder)
        assert [steps[name].state for name in ("service", *SERVED)] == ["ok"] * 4
        assert steps["gate"].text == f"answers on port {port_of(folder)} as localhost"
        renew_server_certificate(folder)
        assert told(folder, "gate", "warning").endswith("restart the service to show the new one")
        (folder / "service.pids").write_text("{}")
        assert told(folder, "service", "warning").startswith("runs, but gate, superexec, superlink is starting (again)")


def test_the_service_does_not_answer(tmp_path, folder):
    (folder / "log").mkdir()
    (folder / "log" / "superlink.log").write_text("first\nlast words\n")
    with served(folder, superlink=free_port()):
        text = told(folder, "SuperLink", code=1)
    assert text.endswith(f"else see {folder / 'log' / 'superlink.log'}, which ends: last words")
    with served(folder, answers={"/health": (404, b"")}):
        assert f"what answers on port {port_of(folder)} is not the gate (status 404)" in told(folder, "gate", code=1)
    init_consortium(tmp_path / "other", "chest", ("localhost",))
    with served(folder, tmp_path / "other"):
        steps = examined(folder)
    assert "does not show this consortium's certificate (" in steps["gate"].text
    assert (steps["gate"].exit_code, steps["closed"].state) == (9, "not tried")
    with alone(folder / "service.lock", ""):
        text = told(folder, "gate", code=1)
    assert text.endswith(f"try again, else see {folder / 'log' / 'gate.log'}")


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/pull-task", "/v1/fleet/pull-messages", "/docs"])
def test_a_gate_that_passes_on_too_much(folder, path):
    with served(folder, answers={path: (200, b"")}):
        text = told(folder, "closed")
    assert f"{path} with status 200, and must refuse it; stop the service" in text


def test_where_the_gate_listens(folder, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "--listen", "10.1.2.3"], stdin=subprocess.DEVNULL
    ) as process:
        (folder / "service.pids").write_text(json.dumps({"gate": process.pid}))
        while b"10.1.2.3" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        assert doctor._listens_at(folder) == "10.1.2.3"
        process.kill()
    (folder / "service.pids").unlink()
    assert doctor._listens_at(folder) == "127.0.0.1"


def test_runs_and_sites(folder):
    plan = load_plan(Path("plans/quickstart.toml"))
    assert told(folder, "heard", "ok") == "no site to hear"
    for site in plan.sites:
        enrol(folder, site)
    add_run(folder, plan)
    assert told(folder, "runs", "ok") == "quickstart waiting"
    write_outcome(folder / RUNS / "quickstart", Outcome("DataError", "north: too few\ncases"))
    assert told(folder, "runs", "warning").startswith(
        "run quickstart failed: north: too few cases; when the cause is gone"
    )
    others = [f"{site} never" for site in plan.sites if site != "north"]
    (folder / SEEN).write_text(json.dumps({"north": time.time() - 3700}))
    assert told(folder, "heard", "ok") == ", ".join(["north 1:01:40 (h:mm:ss) ago", *others])
    with alone(folder / "service.lock", ""):
        assert told(folder, "heard", "warning").endswith("the site must look at it (invcoss-site doctor)")


def test_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["invcoss-server", "doctor", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == len(BEFORE + NOT_SERVED + AFTER)
    (folder / "pki" / "ca.key").unlink()
    sys.argv.append("--json")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 9
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.slow
def test_a_real_service_and_a_site(tmp_path, folder, monkeypatch):
    from invcoss_site.enrol import init_site, join
    from invcoss_site.node import knock

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    (tmp_path / "images").mkdir()
    north = tmp_path / "north"
    init_site(north, "north", tmp_path / "images")
    join(north, enrol_site(folder, (north / "enrolment-request.json").read_bytes()).to_bytes())

    start = "import sys; from invcoss_server.cli import main; sys.argv[0] = 'invcoss-server'; main()"
    command = (sys.executable, "-c", start, "start", str(folder))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as service:
        try:
            deadline = time.monotonic() + 60
            while "port" in (steps := examined(folder)) or any(steps[name].state != "ok" for name in SERVED):
                assert time.monotonic() < deadline, steps
                time.sleep(0.2)
            while (said := knock(north, 5)) != "let in":
                assert said in ("starting", "not told yet")
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert told(folder, "heard", "ok").startswith("north 0:00:0")
            revoke_site(folder, "north")
            with pytest.raises(CredentialError, match="answers: this key of site 'north' is revoked since"):
                knock(north, 5)
        finally:
            service.send_signal(signal.SIGTERM)
            service.communicate(timeout=30)
