"""A site enrols and connects: real keys, files and TLS servers, and for everything that can be wrong its own line."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from invcoss_common.canonical import new_folder
from invcoss_common.enrolment import EnrolmentRequest, open_signed, sign_join_file
from invcoss_common.errors import CredentialError, DataError
from invcoss_common.keys import (
    fingerprint,
    generate_ec_key,
    key_digest,
    load_ec_key,
    load_signing_key,
    parse_node_key,
    public_text,
)
from invcoss_server.provision import enrol_site, identify_site, init_consortium, renew_server_certificate, revoke_site
from invcoss_site.connection import check_clock, find_way, resolve, secure
from invcoss_site.enrol import init_site, join, load_authority, load_join
from invcoss_site.home import load_home

DAY = timedelta(days=1)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def site(tmp_path, images):
    init_site(tmp_path / "north", "north", images)
    return tmp_path / "north"


@pytest.fixture
def consortium(tmp_path):
    init_consortium(tmp_path / "chest", "chest", ("localhost",), free_port())
    return tmp_path / "chest"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def enrolled(site, consortium):
    return enrol_site(consortium, (site / "enrolment-request.json").read_bytes())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Answer(http.server.BaseHTTPRequestHandler):
    """A coordinator's answer over HTTP; its clock is `ahead_s` ahead."""

    ahead_s = 0.0

    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.ahead_s)

    def log_message(self, *_):
        pass


@contextmanager
def listening(port, consortium=None, ahead_s=0.0):
    """An HTTP server on loopback in a thread, with the consortium's server certificate if one is given."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), type("Handler", (Answer,), {"ahead_s": ahead_s}), bind_and_activate=False
    )
    server.allow_reuse_address = True
    server.server_bind()
    server.server_activate()
    server.handle_error = lambda *_: None  # a client that hangs up, as here it must
    if consortium:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(consortium / "pki" / "server.crt", consortium / "pki" / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def port_of(site):
    return int(load_join(site).address.rpartition(":")[2])


def check_credentials(site, timeout_s):
    """All that `doctor` does between the site's files and its signed call."""
    joined = load_join(site)
    way = find_way(joined.address)
    resolve(way)
    found = secure(way, load_authority(joined), joined.ca_certificate, timeout_s)
    if found.ahead_s is not None:
        check_clock(found.ahead_s)
    return found


def problem(site, shown=None, **changes):
    """What the check says while a server shows the certificate of `shown`."""
    with listening(port_of(site), shown, **changes), pytest.raises(CredentialError) as caught:
        check_credentials(site, timeout_s=5)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_init_makes_keys_for_their_owner_only_and_a_request_without_secrets(site, images):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (site / "keys").iterdir()}
    assert modes == dict.fromkeys(("node", "node.pub", "signing.pem"), 0o600)
    assert stat.S_IMODE((site / "keys").stat().st_mode) == 0o700
    home = load_home(site)
    assert (home.name, home.data) == ("north", images)
    data = (site / "enrolment-request.json").read_bytes()
    request = open_signed(EnrolmentRequest, data)
    assert request.site == "north"
    assert parse_node_key(request.node_key) == load_ec_key(site / "keys" / "node").public_key()
    assert request.signing_key == public_text(load_signing_key(site / "keys" / "signing.pem").public_key())
    assert b"PRIVATE" not in data
    assert (site / "keys" / "node.pub").read_text() == request.node_key + "\n"
    assert (site / "keys" / "node").read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")


def test_init_overwrites_no_keys_and_no_settings(site, images):
    before = contents(site)
    with pytest.raises(CredentialError, match="keys are never overwritten"):
        init_site(site, "north", images)
    assert contents(site) == before
    (site / "keys").rename(site / "keys.old")
    with pytest.raises(DataError, match=r"site\.toml is of site 'north'"):
        init_site(site, "south", images)
    (site / "site.toml").write_text((site / "site.toml").read_text() + "# ours\n")
    init_site(site, "north", images)
    assert (site / "site.toml").read_text().endswith("# ours\n")
    assert load_signing_key(site / "keys" / "signing.pem") is not None
    assert (site / "keys" / "node").read_bytes() != (site / "keys.old" / "node").read_bytes()


def test_init_of_a_site_that_cannot_be_writes_nothing(tmp_path, images):
    with pytest.raises(CredentialError, match="is not a name"):
        init_site(tmp_path / "x", "North", images)
    with pytest.raises(DataError, match="no such folder"):
        init_site(tmp_path / "x", "north", tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CredentialError, match="can't make the site's folder here"):
        init_site(tmp_path / "file", "north", images)


def test_two_inits_at_once_do_not_mix(tmp_path, images):
    with new_folder(tmp_path / "north" / "keys"), pytest.raises(CredentialError, match="another init is running"):
        init_site(tmp_path / "north", "north", images)


# As for the consortium: killed at the n-th thing it does to the file system, init must work the next time.
KILLS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from invcoss_common.enrolment import EnrolmentRequest, open_signed
from invcoss_common.keys import load_ec_key, load_signing_key, public_text
from invcoss_site.enrol import init_site
root, images = Path(sys.argv[1]), Path(sys.argv[2])
for kill_at in itertools.count(1):
    child = os.fork()
    if child == 0:
        done = itertools.count(1)
        def hook(event, _):
            if event in ("open", "os.rename", "os.mkdir", "os.chmod") and next(done) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        init_site(root, "north", images)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not (root / "keys").exists():
        init_site(root, "north", images)
    request = open_signed(EnrolmentRequest, (root / "enrolment-request.json").read_bytes())
    assert request.node_key == public_text(load_ec_key(root / "keys" / "node").public_key())
    assert request.signing_key == public_text(load_signing_key(root / "keys" / "signing.pem").public_key())
    if status == 0:
        print(kill_at - 1)
        break
    assert status == signal.SIGKILL
    shutil.rmtree(root)
"""


@pytest.mark.slow
def test_init_killed_at_any_instant_leaves_no_keys_or_all(tmp_path, images):
    command = [sys.executable, "-c", KILLS, tmp_path / "north", images]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_accepts_the_node_key(site):
    key = site / "keys" / "node"
    done = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == (site / "keys" / "node.pub").read_text().split()


def test_join_keeps_the_file_and_the_certificate(site, consortium):
    answer = enrolled(site, consortium)
    join(site, answer.to_bytes(), heard=fingerprint(answer.coordinator_key_sha256))
    assert (site / "join.json").read_bytes() == answer.to_bytes()
    assert (site / "ca.crt").read_bytes() == (consortium / "pki" / "ca.crt").read_bytes()
    assert load_join(site) == answer
    join(site, answer.to_bytes())
    (site / "join.json").write_bytes(answer.to_bytes().replace(b"localhost", b"localhosf"))
    for use in (load_join, lambda root: join(root, answer.to_bytes())):
        with pytest.raises(CredentialError, match=r"join\.json: the signature .* does not hold.*move this one away"):
            use(site)


def signed(site, consortium, certificate, key=None):
    """A join file that the coordinator signed around another certificate."""
    request = open_signed(EnrolmentRequest, (site / "enrolment-request.json").read_bytes())
    key = key or load_signing_key(consortium / "pki" / "coordinator.pem")
    return sign_join_file(request, "chest", "localhost:443", certificate, key).to_bytes()


def intermediate(consortium):
    """The consortium's CA certificate, but issued by another key."""
    ca = x509.load_pem_x509_certificate((consortium / "pki" / "ca.crt").read_bytes())
    copy = x509.CertificateBuilder(
        ca.issuer,
        ca.subject,
        ca.public_key(),
        ca.serial_number,
        ca.not_valid_before_utc.replace(tzinfo=None),
        ca.not_valid_after_utc.replace(tzinfo=None),
        list(ca.extensions),
    )
    return copy.sign(generate_ec_key(), SHA384()).public_bytes(Encoding.PEM).decode()


def test_a_join_file_that_is_not_for_this_site_is_refused(tmp_path, images, site, consortium):
    answer = enrolled(site, consortium)
    init_site(tmp_path / "south", "south", images)
    init_site(tmp_path / "again", "north", images)
    server_certificate = (consortium / "pki" / "server.crt").read_text()
    for root, data, heard, says in (
        (site, answer.to_bytes().replace(b'"chest"', b'"chess"'), None, "signature of this join file does not hold"),
        (site, answer.to_bytes(), "0000 " * 8, "fingerprint of the coordinator is .* do not use it"),
        (tmp_path / "south", answer.to_bytes(), None, "is for site 'north', and this is 'south'"),
        (tmp_path / "again", answer.to_bytes(), None, "for other keys of this site"),
        (site, signed(site, consortium, server_certificate), None, "is not that of an authority"),
        (site, signed(site, consortium, intermediate(consortium)), None, "is not that of an authority"),
        (site, signed(site, consortium, "nonsense"), None, "is not that of an authority"),
        (site, (site / "enrolment-request.json").read_bytes(), None, "not a valid InvCoSS join file"),
    ):
        with pytest.raises(CredentialError, match=says):
            join(root, data, heard)
        assert not (root / "join.json").exists()
        assert not (root / "ca.crt").exists()
    with pytest.raises(CredentialError, match="has not joined; invcoss-site join stores"):
        load_join(site)


def test_a_site_that_joined_follows_no_other_coordinator(tmp_path, site, consortium):
    join(site, enrolled(site, consortium).to_bytes())
    before = contents(site)
    init_consortium(tmp_path / "other", "chest", ("localhost",))
    with pytest.raises(CredentialError, match="joined consortium 'chest' of another coordinator"):
        join(site, enrolled(site, tmp_path / "other").to_bytes())
    assert contents(site) == before


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (10 * DAY, "the clock is slow; the site's IT must set it"),
        (-4000 * DAY, "authority ended on .*operator must make"),
    ],
)
def test_an_authority_that_is_not_valid_now_is_refused(tmp_path, site, made, says):
    init_consortium(tmp_path / "chest", "chest", ("localhost",), now=datetime.now(UTC) + made)
    with pytest.raises(CredentialError, match=says):
        join(site, enrolled(site, tmp_path / "chest").to_bytes())


@pytest.fixture
def joined(site, consortium):
    join(site, enrolled(site, consortium).to_bytes())
    return site


def test_a_good_connection_before_and_after_renewal(joined, consortium):
    for _ in range(2):
        with listening(port_of(joined), consortium):
            found = check_credentials(joined, timeout_s=5)
        assert found.tls in ("TLSv1.2", "TLSv1.3")
        assert found.ahead_s == 0
        assert timedelta(days=396) < found.valid_until - datetime.now(UTC) < timedelta(days=398)
        renew_server_certificate(consortium)  # no site is touched by it


def test_an_ip_address_is_checked_as_such(tmp_path, site):
    init_consortium(tmp_path / "c", "chest", ("127.0.0.1",), free_port())
    join(site, enrolled(site, tmp_path / "c").to_bytes())
    with listening(port_of(site), tmp_path / "c"):
        assert check_credentials(site, timeout_s=5).ahead_s == 0


def test_an_expired_certificate(joined, consortium):
    renew_server_certificate(consortium, datetime.now(UTC) - timedelta(days=3000))
    says = problem(joined, consortium)
    assert "the coordinator's certificate expired on " in says
    assert "both clocks agree; the operator must renew it (invcoss-server renew-certificate)" in says


def test_a_certificate_that_is_not_yet_valid(joined, consortium):
    renew_server_certificate(consortium, datetime.now(UTC) + 10 * DAY)
    says = problem(joined, consortium)
    assert "the coordinator's certificate is not valid before " in says
    assert "both clocks agree; the operator must check the coordinator's clock and renew it" in says


def test_a_certificate_that_seems_expired_because_this_clock_is_fast(joined, consortium):
    renew_server_certificate(consortium, datetime.now(UTC) - timedelta(days=3000))
    says = problem(joined, consortium, ahead_s=-3000 * 86400)
    assert " days, " in says
    assert "ahead of the coordinator's; the site's IT must set it" in says


@pytest.mark.parametrize(("ahead_s", "says"), [(1000, "(h:mm:ss) behind the"), (-20, "(h:mm:ss) ahead of the")])
def test_a_clock_that_flower_would_not_accept(joined, consortium, ahead_s, says):
    assert says in problem(joined, consortium, ahead_s=ahead_s)


@pytest.mark.parametrize("ahead_s", [200, -3])
def test_a_clock_that_flower_would_accept(joined, consortium, ahead_s):
    with listening(port_of(joined), consortium, ahead_s):
        check_credentials(joined, timeout_s=5)


def test_someone_between_who_opens_the_connection(tmp_path, joined):
    init_consortium(tmp_path / "antivirus", "antivirus", ("localhost",))
    says = problem(joined, tmp_path / "antivirus")
    assert "it was issued by 'CN=InvCoSS CA antivirus', not by the consortium's authority" in says
    assert "the site's IT must exempt this address from TLS inspection" in says


def test_an_authority_made_anew_under_the_same_name(tmp_path, joined):
    init_consortium(tmp_path / "anew", "chest", ("localhost",))
    says = problem(joined, tmp_path / "anew")
    assert "another authority of the same name, 'CN=InvCoSS CA chest'" in says
    assert "ask for a new join file" in says


def test_a_certificate_for_another_name(joined, consortium):
    settings = consortium / "pki" / "consortium.json"
    settings.write_text(settings.read_text().replace("localhost", "relay.example.org"))
    renew_server_certificate(consortium)
    says = problem(joined, consortium)
    assert "the coordinator's certificate is for relay.example.org, 127.0.0.1, not for this address" in says
    assert "the operator must send a join file with the right address" in says


def test_something_that_does_not_speak_tls(joined):
    assert "what answers there does not speak TLS" in problem(joined)


def test_nothing_listens(joined):
    with pytest.raises(CredentialError, match="connection refused; nothing listens there: the operator must start"):
        check_credentials(joined, timeout_s=5)


def test_something_that_never_answers(joined):
    with socket.create_server(("127.0.0.1", port_of(joined))), pytest.raises(CredentialError) as caught:
        check_credentials(joined, timeout_s=0.3)
    assert "no answer within 0.3 s; the site's IT must let this machine connect" in str(caught.value)


def test_a_name_that_does_not_exist(tmp_path, site):
    init_consortium(tmp_path / "c", "chest", ("coordinator.invalid",))
    join(site, enrolled(site, tmp_path / "c").to_bytes())
    with pytest.raises(CredentialError, match=r"can't find the name 'coordinator.invalid' .*the site's IT must"):
        check_credentials(site, timeout_s=5)


def test_other_sites_change_nothing_at_this_one_and_it_may_change_its_keys(tmp_path, images, joined, consortium):
    before = contents(joined)
    south = tmp_path / "south"
    init_site(south, "south", images)
    join(south, enrolled(south, consortium).to_bytes())
    old = (south / "keys" / "node.pub").read_text().strip()
    (south / "keys").rename(south / "keys.old")
    init_site(south, "south", images)
    request = (south / "enrolment-request.json").read_bytes()
    with pytest.raises(CredentialError, match="known with other keys"):
        enrol_site(consortium, request)
    join(south, enrol_site(consortium, request, replace=True).to_bytes())
    with pytest.raises(CredentialError, match="revoked since"):
        identify_site(consortium, old)
    assert identify_site(consortium, (south / "keys" / "node.pub").read_text().strip()) == "south"
    revoke_site(consortium, "south")
    assert contents(joined) == before
    assert identify_site(consortium, (joined / "keys" / "node.pub").read_text().strip()) == "north"
    with listening(port_of(joined), consortium):
        check_credentials(joined, timeout_s=5)


def run(command, *arguments):
    code = f"import sys; from {command}.cli import main; sys.argv[0] = 'invcoss'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
    )
    return done.returncode, done.stdout, done.stderr


def test_the_commands(tmp_path, images, consortium):
    site = tmp_path / "north"
    status, out, err = run("invcoss_site", "init", site, "--name", "north", "--data", images)
    assert (status, err) == (0, "")
    request = open_signed(EnrolmentRequest, (site / "enrolment-request.json").read_bytes())
    assert fingerprint(request.signing_key_sha256) in out
    assert fingerprint(key_digest(parse_node_key(request.node_key))) in out
    answer = enrolled(site, consortium)
    (tmp_path / "answer.json").write_bytes(answer.to_bytes())
    for heard, expected in (("0000", 9), (fingerprint(answer.coordinator_key_sha256), 0)):
        status, out, err = run("invcoss_site", "join", site, tmp_path / "answer.json", "--fingerprint", heard)
        assert (status, len(err.splitlines())) == (expected, expected // 9), err
    assert fingerprint(answer.coordinator_key_sha256) in out
    for arguments, code in (
        (("init", site, "--name", "north", "--data", images), 9),
        (("init", site, "--name", "north", "--data", tmp_path / "none"), 4),
        (("join", site, tmp_path / "none.json"), 9),
    ):
        status, _, err = run("invcoss_site", *arguments)
        assert (status, len(err.splitlines())) == (code, 1), err
        assert err.startswith("error: ")
