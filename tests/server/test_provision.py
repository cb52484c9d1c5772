"""A consortium on disk: certificates, kills, the register's rules, and sites that don't touch another."""

from __future__ import annotations

import ipaddress
import json
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from invcoss_common.enrolment import JoinFile, open_signed, sign_request
from invcoss_common.errors import CredentialError
from invcoss_common.keys import (
    fingerprint,
    generate_ec_key,
    generate_signing_key,
    key_digest,
    load_ec_key,
    parse_node_key,
    public_text,
)
from invcoss_server.provision import (
    coordinator_digest,
    enrol_site,
    identify_site,
    init_consortium,
    load_consortium,
    renew_server_certificate,
    revoke_site,
    sites,
)
from invcoss_server.registry import Registry

HOSTS = ("relay.example.org", "10.0.0.1", "::1")


def request_of(name, node=None, signing=None):
    return sign_request(name, public_text((node or generate_ec_key()).public_key()), signing or generate_signing_key())


@pytest.fixture
def folder(tmp_path):
    init_consortium(tmp_path / "chest", "chest", HOSTS)
    return tmp_path / "chest"


def certificate(folder, name):
    return x509.load_pem_x509_certificate((folder / "pki" / name).read_bytes())


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(command, *arguments, cwd=None):
    code = f"import sys; from {command}.cli import main; sys.argv[0] = 'invcoss'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    return done.returncode, done.stdout, done.stderr


def test_secrets_are_for_their_owner_only(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    public = {"ca.crt": 0o644, "server.crt": 0o644}
    secret = dict.fromkeys(("ca.key", "server.key", "coordinator.pem", "consortium.json", "sites.db"), 0o600)
    assert modes == {"pki": 0o700} | public | secret


def test_the_authority_can_do_nothing_but_issue(folder):
    ca = certificate(folder, "ca.crt")
    assert extension(ca, x509.BasicConstraints).critical
    assert extension(ca, x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    usage = extension(ca, x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert isinstance(ca.public_key().curve, SECP384R1)
    assert ca.public_key() == load_ec_key(folder / "pki" / "ca.key").public_key()
    assert ca.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3650)
    ca.verify_directly_issued_by(ca)


def test_the_server_certificate_is_for_the_given_hosts_and_servers_only(folder):
    ca, server = certificate(folder, "ca.crt"), certificate(folder, "server.crt")
    server.verify_directly_issued_by(ca)
    names = extension(server, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["relay.example.org"]
    addresses = [ipaddress.ip_address(host) for host in (*HOSTS[1:], "127.0.0.1")]  # the last for the gate
    assert names.get_values_for_type(x509.IPAddress) == addresses
    assert list(extension(server, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert extension(server, x509.BasicConstraints).value.ca is False
    assert extension(server, x509.KeyUsage).value.key_cert_sign is False
    assert server.public_key() == load_ec_key(folder / "pki" / "server.key").public_key()
    assert timedelta(days=396) < server.not_valid_after_utc - datetime.now(UTC) < timedelta(days=398)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_accepts_the_chain_strictly(folder):
    pki = folder / "pki"
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", HOSTS[0]]
    subprocess.run([*command, "-CAfile", pki / "ca.crt", pki / "server.crt"], check=True, capture_output=True)


def test_a_consortium_is_never_overwritten(folder):
    before = contents(folder)
    with pytest.raises(CredentialError, match="there is a consortium here"):
        init_consortium(folder, "other", HOSTS)
    assert contents(folder) == before


def test_a_register_with_sites_is_never_taken_over(folder):
    enrol_site(folder, request_of("north").to_bytes())
    shutil.rmtree(folder / "pki")
    with pytest.raises(CredentialError, match="holds the sites of another consortium"):
        init_consortium(folder, "chest", HOSTS)
    (folder / "sites.db").rename(folder / "kept.db")
    init_consortium(folder, "chest", HOSTS)
    (folder / "sites.db").unlink()
    with pytest.raises(CredentialError, match="register of sites is missing"):
        sites(folder)


@pytest.mark.parametrize(
    ("name", "hosts", "port", "says"),
    [
        ("Chest", HOSTS, 443, "'Chest' is not a name"),
        ("chest", ("https://relay",), 443, "hosts: 'https://relay': not a DNS name"),
        ("chest", (), 443, "hosts: "),
        ("chest", HOSTS, 0, "port: 0: "),
    ],
)
def test_a_consortium_that_cannot_be_is_refused_before_anything_is_written(tmp_path, name, hosts, port, says):
    with pytest.raises(CredentialError, match=says):
        init_consortium(tmp_path / "x", name, hosts, port)
    assert not (tmp_path / "x").exists()


# Forks children that kill themselves at the n-th thing they do to the file system, n = 1, 2, ...; after each kill, init
# must work, or the consortium be there whole. Prints how many kills there were.
KILLS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from invcoss_server.provision import init_consortium, renew_server_certificate, sites
folder = Path(sys.argv[1])
for kill_at in itertools.count(1):
    child = os.fork()
    if child == 0:
        done = itertools.count(1)
        def hook(event, _):
            if event in ("open", "os.rename", "os.mkdir", "os.chmod", "sqlite3.connect") and next(done) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        init_consortium(folder, "chest", ("localhost",))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not (folder / "pki").exists():
        init_consortium(folder, "chest", ("localhost",))
    renew_server_certificate(folder)
    assert sites(folder) == []
    assert sorted(p.name for p in (folder / "pki").iterdir()) == [
        "ca.crt", "ca.key", "consortium.json", "coordinator.pem", "server.crt", "server.key"]
    if status == 0:
        print(kill_at - 1)
        break
    assert status == signal.SIGKILL
    shutil.rmtree(folder)
"""


@pytest.mark.slow
def test_init_killed_at_any_instant_leaves_nothing_or_all(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "chest"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_renewal_changes_the_server_certificate_and_nothing_else(folder):
    before = contents(folder)
    end = renew_server_certificate(folder, datetime.now(UTC) + timedelta(days=300))
    after = contents(folder)
    assert {str(path) for path in after if after[path] != before[path]} == {"pki/server.crt"}
    server = certificate(folder, "server.crt")
    assert server.not_valid_after_utc == end
    server.verify_directly_issued_by(certificate(folder, "ca.crt"))
    (folder / "pki" / "server.key").unlink()
    renew_server_certificate(folder)
    assert certificate(folder, "server.crt").public_key() == load_ec_key(folder / "pki" / "server.key").public_key()


def test_renewal_ends_with_the_authority(tmp_path):
    folder = tmp_path / "old"
    init_consortium(folder, "old", HOSTS, now=datetime.now(UTC) - timedelta(days=3600))
    assert renew_server_certificate(folder) == certificate(folder, "ca.crt").not_valid_after_utc
    with pytest.raises(CredentialError, match=r"authority of this consortium ended on .*new consortium"):
        renew_server_certificate(folder, datetime.now(UTC) + timedelta(days=60))


def test_enrolment_answers_with_a_join_file_of_this_consortium(folder):
    request = request_of("north")
    joined = enrol_site(folder, request.to_bytes(), heard=fingerprint(request.signing_key_sha256))
    assert open_signed(JoinFile, joined.to_bytes()) == joined
    assert (joined.consortium, joined.address, joined.site) == ("chest", "relay.example.org:443", "north")
    assert joined.ca_certificate.encode() == (folder / "pki" / "ca.crt").read_bytes()
    assert joined.coordinator_key_sha256 == coordinator_digest(folder)
    assert enrol_site(folder, request.to_bytes()) == joined
    assert len(sites(folder)) == 1


def test_a_fingerprint_that_differs_enrols_no_one(folder):
    with pytest.raises(CredentialError, match="the fingerprint of site 'north' is"):
        enrol_site(folder, request_of("north").to_bytes(), heard="0000 " * 8)
    assert sites(folder) == []


def test_keys_serve_once_and_names_have_one_pair(folder):
    node, signing = generate_ec_key(), generate_signing_key()
    enrol_site(folder, request_of("north", node, signing).to_bytes())
    for other in (request_of("south", node, signing), request_of("south", node), request_of("south", None, signing)):
        for replace in (False, True):
            with pytest.raises(CredentialError, match="is that of site 'north' already"):
                enrol_site(folder, other.to_bytes(), replace)
    with pytest.raises(CredentialError, match=r"'north' is known with other keys.*--replace"):
        enrol_site(folder, request_of("north").to_bytes())
    with pytest.raises(CredentialError, match="is that of site 'north' already"):
        enrol_site(folder, request_of("north", node).to_bytes(), replace=True)
    assert [site.name for site in sites(folder)] == ["north"]


def test_unknown_enrolled_revoked_and_replaced_keys_are_told_apart(folder):
    first, second = request_of("north"), request_of("north")
    with pytest.raises(CredentialError, match="this key is unknown: no site was enrolled with it"):
        identify_site(folder, first.node_key)
    enrol_site(folder, first.to_bytes())
    assert identify_site(folder, first.node_key) == "north"
    assert identify_site(folder, first.signing_key) == "north"
    as_flower_shows_it = parse_node_key(first.node_key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert identify_site(folder, as_flower_shows_it.decode()) == "north"
    enrol_site(folder, second.to_bytes(), replace=True)
    assert identify_site(folder, second.node_key) == "north"
    since = datetime.now(UTC).strftime("%Y-")
    with pytest.raises(CredentialError, match=f"this key of site 'north' is revoked since {since}"):
        identify_site(folder, first.node_key)
    revoke_site(folder, "north")
    with pytest.raises(CredentialError, match="revoked since"):
        identify_site(folder, second.node_key)
    with pytest.raises(CredentialError, match=r"'north' was revoked on .* already"):
        revoke_site(folder, "north")
    with pytest.raises(CredentialError, match="'south' is not enrolled"):
        revoke_site(folder, "south")
    for request in (first, second):  # neither comes back
        with pytest.raises(CredentialError, match=r"was revoked on .*must make new keys"):
            enrol_site(folder, request.to_bytes(), replace=True)
    with pytest.raises(CredentialError, match="known with other keys"):
        enrol_site(folder, request_of("north").to_bytes())
    with pytest.raises(CredentialError, match="not a public key"):
        identify_site(folder, "nonsense")
    assert [bool(site.revoked) for site in sites(folder)] == [True, True]


def test_what_happens_to_one_site_touches_nothing_of_another(folder):
    enrol_site(folder, request_of("north").to_bytes())
    (north,) = sites(folder)
    before = contents(folder / "pki")
    enrol_site(folder, request_of("south").to_bytes())
    enrol_site(folder, request_of("south").to_bytes(), replace=True)
    revoke_site(folder, "south")
    renew_server_certificate(folder)
    assert sites(folder)[0] == north
    assert [site.name for site in sites(folder)] == ["north", "south", "south"]
    after = contents(folder / "pki")
    assert {str(path) for path in after if after[path] != before[path]} == {"server.crt"}


def test_damaged_files_are_named(folder):
    (folder / "sites.db").write_bytes(b"not a database, but long enough to look at" * 30)
    with pytest.raises(CredentialError, match=r"sites\.db: can't use the register"):
        sites(folder)
    (folder / "pki" / "ca.crt").write_bytes(b"")
    with pytest.raises(CredentialError, match=r"ca\.crt: can't read this certificate"):
        renew_server_certificate(folder)
    (folder / "pki" / "consortium.json").write_bytes(b"{}")
    with pytest.raises(CredentialError, match=r"consortium\.json: name: "):
        load_consortium(folder)
    with pytest.raises(CredentialError, match="no consortium here; invcoss-server init makes one"):
        sites(folder / "elsewhere")
    with pytest.raises(CredentialError, match="register of sites is missing"):
        Registry(folder / "none.db")


def test_the_longest_names_fit_into_certificates(tmp_path):
    init_consortium(tmp_path, "c" * 48, (".".join(["a" * 63] * 3) + ".example.org",))
    enrol_site(tmp_path, request_of("s" * 48).to_bytes())


def test_the_commands(tmp_path):
    folder, request = tmp_path / "chest", request_of("north")
    (tmp_path / "request.json").write_bytes(request.to_bytes())
    status, out, err = run("invcoss_server", "init", folder, "--name", "chest", "--host", "localhost", "--port", 9443)
    assert (status, err) == (0, "")
    assert f"compare by phone, coordinator's key: {fingerprint(coordinator_digest(folder))}" in out
    status, out, err = run("invcoss_server", "enrol-site", folder, "request.json", cwd=tmp_path)
    assert (status, err) == (0, "")
    for digest in (request.signing_key_sha256, request.node_key_sha256, coordinator_digest(folder)):
        assert fingerprint(digest) in out
    assert open_signed(JoinFile, (tmp_path / "join-north.json").read_bytes()).address == "localhost:9443"
    (tmp_path / "request.json").write_bytes(request_of("north").to_bytes())
    arguments = ("enrol-site", folder, tmp_path / "request.json", "--out", tmp_path / "join.json")
    status, out, err = run("invcoss_server", *arguments)
    assert (status, out, len(err.splitlines())) == (9, "", 1)
    assert "give --replace" in err
    assert not (tmp_path / "join.json").exists()
    assert run("invcoss_server", *arguments, "--replace")[0] == 0
    assert run("invcoss_server", "revoke-site", folder, "north")[0] == 0
    status, out, _ = run("invcoss_server", "sites", folder, "--json")
    assert [(site["name"], bool(site["revoked"])) for site in json.loads(out)] == [("north", True)] * 2
    assert "north" in run("invcoss_server", "sites", folder)[1]
    assert "valid until" in run("invcoss_server", "renew-certificate", folder)[1]
    (tmp_path / "fresh.json").write_bytes(request_of("south").to_bytes())
    for arguments in (
        ("init", folder, "--name", "chest", "--host", "localhost"),
        ("renew-certificate", tmp_path),
        ("revoke-site", folder, "east"),
        ("enrol-site", folder, tmp_path / "none.json"),
        ("enrol-site", folder, tmp_path / "fresh.json", "--out", tmp_path / "request.json" / "join.json"),
        ("sites", tmp_path),
    ):
        status, _, err = run("invcoss_server", *arguments)
        assert (status, len(err.splitlines())) == (9, 1), err
        assert err.startswith("error: ")


def test_the_digest_in_the_register_is_that_of_the_key(folder):
    node = generate_ec_key()
    enrol_site(folder, request_of("north", node).to_bytes())
    assert sites(folder)[0].node_key_sha256 == key_digest(node.public_key())
