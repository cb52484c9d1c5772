"""`invcoss-site doctor`: from the settings to being let in, and for everything that can be wrong its own line."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from flwr.supernode.runtime import run_clientapp
from tests.servers import coordinator, flower, free_port, proxy

from invcoss_common.bundle import FEDERATION
from invcoss_common.checkup import Checkup
from invcoss_common.supervise import alone
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_site import doctor
from invcoss_site.cli import main
from invcoss_site.connection import find_way
from invcoss_site.enrol import init_site, join
from invcoss_site.home import load_home

LET_IN = {"/v1/fleet/activate-node": flower(400, 2003, "Invalid heartbeat interval.")}
NAMES = ("settings", "enrolment", "proxy", "DNS", "TCP", "TLS", "clock", "authentication")
OTHERS = ("disk", "memory", "GPU", "data", "policy", "software", "service")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes seconds and is tested on its own."""
    monkeypatch.setattr(doctor, "_software", lambda: "not looked at")


def make(tmp_path, host="localhost", now=None):
    """A joined site, its consortium, and the port of its coordinator."""
    port, consortium, site = free_port(), tmp_path / "chest", tmp_path / "north"
    images = tmp_path / "images"
    (images / "patient").mkdir(parents=True)
    for name in ("a.png", "patient/b.nii.gz", "readme.txt", ".hidden.png"):
        (images / name).write_bytes(b"x")
    init_consortium(consortium, "chest", (host,), port, now)
    init_site(site, "north", images)
    join(site, enrol_site(consortium, (site / "enrolment-request.json").read_bytes()).to_bytes())
    return site, consortium, port


def examined(site, timeout_s=5.0):
    checkup = Checkup(lambda _: None)
    doctor.examine(site, timeout_s, checkup)
    assert all(str(step).isprintable() for step in checkup.steps)
    assert tuple(step.step for step in checkup.steps) == NAMES + OTHERS
    return {step.step: step for step in checkup.steps}


def states(steps):
    return {name: steps[name].state for name in NAMES}


def failing(site, name, code=9, timeout_s=5.0):
    """The text of the one step that fails on the way; all before it are well, all after it are not tried."""
    found = states(steps := examined(site, timeout_s))
    at = NAMES.index(name)
    assert found == dict.fromkeys(NAMES[:at], "ok") | {name: "failed"} | dict.fromkeys(NAMES[at + 1 :], "not tried")
    assert steps[name].exit_code == code
    assert all(steps[later].text == f"because of '{name}'" for later in NAMES[at + 1 :])
    return steps[name].text


def test_a_site_that_is_let_in(tmp_path):
    site, consortium, port = make(tmp_path)
    with coordinator(consortium, port, answers=LET_IN):
        steps = examined(site)
    assert set(states(steps).values()) == {"ok"}
    assert steps["proxy"].text == f"none: localhost:{port} is reached directly"
    assert "127.0.0.1" in steps["DNS"].text
    assert steps["clock"].text == "agrees with the coordinator's"
    assert steps["authentication"].text == "the coordinator lets this site's key in"
    assert steps["data"].text == f"2 image files in {tmp_path / 'images'}"
    assert steps["software"].text.endswith("the launcher fits this Flower")
    assert steps["service"].text == f"does not run; start it with: invcoss-site start {site}"
    assert not any(step.exit_code for step in steps.values())


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (flower(503), "warning", "the coordinator is starting; try again in a minute"),
        (flower(412), "warning", "the coordinator's Flower has not been told yet"),
        ((200, b""), "ok", "lets this site's key in"),
        (flower(409, detail="this key is unknown: no\x1b"), "failed", " answers: this key is unknown: no"),
        ((401, b'{"detail": "Invalid"}'), "failed", "does not accept this site's signature; the site's IT must set"),
        ((404, b"<html>"), "failed", "is not the coordinator's gate (HTTP status 404); the operator must start it"),
        ((200, b"\xff\xff"), "failed", "the signed call got no answer (ValueError: Invalid protobuf"),
        ((0, b""), "failed", "the signed call got no answer (RemoteProtocolError"),
    ],
)
def test_what_the_coordinator_says_to_the_key(tmp_path, quick, answer, state, says):
    site, consortium, port = make(tmp_path)
    with coordinator(consortium, port, answers={"/v1/fleet/activate-node": answer}):
        step = examined(site)["authentication"]
    assert (step.state, step.exit_code) == (state, 9 if state == "failed" else 0)
    assert says in step.text


def test_settings_and_enrolment(tmp_path, quick):
    site, _, _ = make(tmp_path)
    (site / "ca.crt").write_text("another")
    assert failing(site, "enrolment").endswith(f"give the file again: invcoss-site join {site} {site / 'join.json'}")
    (site / "ca.crt").unlink()
    assert "not the certificate of the join file" in failing(site, "enrolment")
    (site / "keys" / "node").chmod(0o640)
    says = failing(site, "enrolment")
    assert "others on this machine may read this key (mode 0640); the site's IT must make it private (chmod 600" in says
    (site / "keys" / "node").unlink()
    assert "keys/node: can't read the key" in failing(site, "enrolment")
    (site / "join.json").unlink()
    assert "this site has not joined" in failing(site, "enrolment")
    (site / "site.toml").unlink()
    assert "can't read the site's settings" in failing(site, "settings", code=4)


def test_an_authority_that_ends(tmp_path, quick):
    site, _, _ = make(tmp_path, now=datetime.now(UTC) - timedelta(days=3600))
    step = examined(site)["enrolment"]
    assert step.state == "warning"
    assert step.text.endswith("; ask the operator when a new join file will come")


def test_failures_on_the_direct_way(tmp_path, quick):
    site, consortium, port = make(tmp_path)
    assert "nothing listens there: the operator must start the coordinator" in failing(site, "TCP")
    init_consortium(tmp_path / "antivirus", "antivirus", ("localhost",))
    with coordinator(tmp_path / "antivirus", port):
        assert "it was issued by 'CN=InvCoSS CA antivirus', not by" in failing(site, "TLS")
    with coordinator(consortium, port, ahead_s=1000):
        assert "behind the coordinator's; the site's IT must set it (NTP)" in failing(site, "clock")
    with coordinator(consortium, port, ahead_s=None, answers=LET_IN):
        steps = examined(site)
    assert steps["clock"].text.startswith("the coordinator did not tell its time")
    assert (steps["clock"].state, steps["authentication"].state) == ("warning", "ok")
    with coordinator(consortium, port, ahead_s=200, answers=LET_IN):
        assert examined(site)["clock"].text in [f"agrees with the coordinator's within {s} s" for s in (198, 199, 200)]


def test_a_name_that_is_not_found(tmp_path, quick):
    site, _, _ = make(tmp_path, "coordinator.invalid")
    assert "can't find the name 'coordinator.invalid' " in failing(site, "DNS")


def test_through_a_proxy(tmp_path, quick, monkeypatch):
    site, consortium, port = make(tmp_path, "coordinator.invalid")
    through = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://us%40er:secret@localhost:{through}")
    with coordinator(consortium, port, answers=LET_IN), proxy(through, port) as heads:
        steps = examined(site)
    assert set(states(steps).values()) == {"ok"}
    assert steps["proxy"].text.startswith(f"coordinator.invalid:{port} is reached through the proxy http://localhost:")
    assert steps["DNS"].text == "the proxy is 127.0.0.1; it looks up the coordinator"
    assert steps["TCP"].text.endswith(f"accepts connections (through the proxy http://localhost:{through})")
    assert len(heads) == 4
    for head in heads:  # the last one is httpx's
        assert head.startswith(f"CONNECT coordinator.invalid:{port} HTTP/1.1\r\n")
        assert "\r\nProxy-Authorization: Basic dXNAZXI6c2VjcmV0\r\n" in head
    assert not any("secret" in step.text for step in steps.values())


@pytest.mark.parametrize(
    ("answer", "login", "says"),
    [
        (
            b"HTTP/1.1 403 By policy\x1b\r\n\r\n",
            "",
            "refuses to connect to coordinator.invalid:{} (403 By policy?); the",
        ),
        (b"HTTP/1.1 407 Who\r\n\r\n", "", "asks for a user name and password (407 Who); the site's IT must write them"),
        (b"HTTP/1.1 407 Who\r\n\r\n", "u:p@", "does not accept the user name and password in HTTPS_PROXY (407 Who)"),
        (
            b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
            "",
            "can't reach coordinator.invalid:{} (502 Bad Gateway); the site's IT",
        ),
        (b"SSH-2.0-x\r\n\r\n", "", "is no HTTP proxy; the site's IT must correct HTTPS_PROXY"),
        (b"", "", "did not connect to coordinator.invalid:{} in time; the site's IT must look at the proxy"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "", "what answers there (through the proxy http://localhost:"),
    ],
)
def test_a_proxy_that_does_not_connect(tmp_path, quick, monkeypatch, answer, login, says):
    site, _, port = make(tmp_path, "coordinator.invalid")
    through = free_port()
    monkeypatch.setenv(
        "all_proxy", f"{login}localhost:{through}" if not login else f"http://{login}localhost:{through}"
    )
    with proxy(through, port, answer):
        text = failing(site, "TLS" if b"200" in answer else "TCP", timeout_s=0.5)
    assert says.format(port) in text


def test_proxies_that_are_wrong(tmp_path, quick, monkeypatch):
    site, _, port = make(tmp_path, "coordinator.invalid")
    for url, step, says in (
        ("http://nowhere.invalid:3128", "DNS", "can't find the proxy's name 'nowhere.invalid'"),
        (f"http://localhost:{port}", "TCP", "connection refused; nothing listens there: the site's IT must correct"),
        ("socks5://localhost:1", "proxy", "is none that can be used (its URL must be http://HOST:PORT"),
        ("http://localhost:port", "proxy", "is none that can be used"),
    ):
        monkeypatch.setenv("HTTPS_PROXY", url)
        assert says in failing(site, step)


def test_a_proxy_that_speaks_tls(tmp_path, quick, monkeypatch):
    site, consortium, port = make(tmp_path, "coordinator.invalid")
    monkeypatch.setenv("HTTPS_PROXY", f"https://localhost:{port}")
    with coordinator(consortium, port):
        steps = examined(site)
    assert [steps[name].state for name in ("TCP", "TLS", "clock")] == ["ok", "warning", "warning"]
    assert "which is spoken to over TLS itself; 'authentication' tries it" in steps["TLS"].text
    assert steps["authentication"].state == "failed"


def test_the_way_is_the_one_that_httpx_takes(monkeypatch):
    proxies = ("", "http://one:1", "two:2", "https://three")
    exempt = ("", "*", "example.org", ".example.org", "relay.example.org", "10.0.0.0/8", "10.0.0.1", "::1", "other")
    seen = set()
    for https in proxies:
        for everything in proxies[:3]:
            for no in exempt:
                for name, value in (("https_proxy", https), ("ALL_PROXY", everything), ("NO_PROXY", no)):
                    monkeypatch.setenv(name, value)
                with httpx.Client(verify=False) as client:
                    for address in (
                        "relay.example.org:443",
                        "example.org:8443",
                        "10.0.0.1:443",
                        "[::1]:9",
                        "localhost:9",
                    ):
                        chosen = client._transport_for_url(httpx.URL(f"https://{address}"))
                        pool, way = chosen._pool, find_way(address)
                        url = getattr(pool, "_proxy_url", None)
                        seen.add(url is None)
                        if url is None:
                            assert way.proxy is None
                        else:
                            theirs = (url.scheme.decode(), url.host.decode(), url.port)
                            expected = (*theirs[:2], theirs[2] or {"http": 80, "https": 443}[theirs[0]])
                            assert way.proxy is not None
                            assert (way.proxy.scheme, way.proxy.host, way.proxy.port) == expected
    assert seen == {True, False}


def data(site):
    step = examined(site)["data"]
    assert step.exit_code == (4 if step.state == "failed" else 0)
    return step.state, step.text


def test_data(tmp_path, quick, monkeypatch):
    site, _, _ = make(tmp_path)
    images = tmp_path / "images"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert data(site) == (
            "failed",
            f"{images / 'a.png'}: can't be read; the site's IT must let this user read the images",
        )
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "COUNTING_S", -1.0)
        assert data(site)[1].startswith("more than ")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith(where):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        where = "patient"
        assert data(site) == (
            "warning",
            f"1 image files in {images}; 1 folders there can't be read, the first: {images / 'patient'}",
        )
        where = "images"
        assert data(site) == (
            "failed",
            f"{images}: can't be read (Permission denied); the site's IT must let this user",
        )
    (site / "site.toml").write_text((site / "site.toml").read_text().replace("[]", '["labels.csv"]'))
    assert data(site) == ("failed", f"{images / 'labels.csv'}: can't read this index; correct `index` in site.toml")
    (images / "labels.csv").write_text("file\na.png\n")
    (images / "a.png").unlink()
    (images / "patient" / "b.nii.gz").unlink()
    assert data(site)[1].startswith(f"{images}: no images (.png, ")
    images.rename(tmp_path / "elsewhere")
    assert data(site)[1].startswith(f"{images}: no such folder; set `data` in site.toml")


def test_software(tmp_path, monkeypatch):
    site, _, _ = make(tmp_path)
    monkeypatch.setattr(doctor, "_data", lambda _: "")
    for text, says in (
        (
            FEDERATION.replace("[tool.flwr.app.config]", "[tool.flwr.app.config]\nmore = 1"),
            "would refuse the bundle of its",
        ),
        ("nonsense", "Flower can't build the app bundle here; report it"),
    ):
        monkeypatch.setattr(doctor, "FEDERATION", text)
        step = examined(site)["software"]
        assert (step.state, step.exit_code) == ("failed", 1)
        assert says in step.text
    monkeypatch.delattr(run_clientapp, "install_from_fab")
    assert (
        "this Flower has no install_from_fab, which keeps the coordinator's code out" in examined(site)["software"].text
    )


def test_service(tmp_path, quick):
    site, _, _ = make(tmp_path)
    spool = load_home(site).spool
    spool.mkdir()

    def service():
        return examined(site)["service"].text

    with ExitStack() as held:
        held.enter_context(alone(site / "agent.lock", ""))
        assert (
            service()
            == f"only the agent runs on this machine; the other part: invcoss-site start {site} --part network"
        )
        held.enter_context(alone(site / "network.lock", ""))
        assert service().startswith("runs, but agent, superexec, supernode is starting (again); if that stays so, see ")
        held.enter_context(alone(spool / "agent.lock", ""))
        (site / "agent.pids").write_text(json.dumps({"agent": 1}))
        (site / "network.pids").write_text(json.dumps({"supernode": 2, "superexec": 3}))
        assert service() == "agent and network run"
    with alone(site / "network.lock", ""):
        assert service().startswith("only the network runs")
    with alone(site / "all.lock", ""), alone(spool / "agent.lock", ""):
        assert service() == "agent and network run"


def test_the_command(tmp_path, quick, monkeypatch, capsys):
    site, consortium, port = make(tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", "http://nowhere.invalid:3128")  # not for the coordinator of this machine itself
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.setattr(sys, "argv", ["invcoss-site", "doctor", str(site), "--timeout", "2"])
    with coordinator(consortium, port, answers=LET_IN), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:8]] == ["ok"] * 8
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "127.0.0.1,localhost,example.org,example.com"
    sys.argv.append("--json")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 9
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [step["step"] for step in told["steps"] if step["state"] == "failed"] == ["TCP"]
