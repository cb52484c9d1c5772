"""`invcoss-server doctor`: the consortium's files and certificates, and whether its service answers, and to whom.

Each step is a function that says what it found, or raises an error that says what the operator must do.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import stat
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from invcoss_common.checkup import Checkup, Doubt, disk, gpu, memory, software
from invcoss_common.errors import CredentialError, InvcossError
from invcoss_common.keys import load_ec_key, load_signing_key
from invcoss_common.supervise import tail
from invcoss_server.follow import describe_all, is_served
from invcoss_server.gate import read_seen
from invcoss_server.provision import LOOPBACK, load_certificate, load_consortium, sites

TIMEOUT_S = 5.0  # the service is on this machine
AUTHORITY_ENDS_SOON, CERTIFICATE_ENDS_SOON = timedelta(days=180), timedelta(days=30)
SILENT_S = 300.0  # a site that runs is heard every half minute or so
SECRETS = ("pki/ca.key", "pki/server.key", "pki/coordinator.pem", "pki/consortium.json", "sites.db")
CLOSED = (
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/runtime/pull-task"),
    ("POST", "/v1/fleet/register-node"),
    ("POST", "/v1/fleet/pull-messages"),  # for sites, but nobody may call it without a key
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
)


def examine(folder: Path, checkup: Checkup) -> None:
    """Go through all steps for the consortium in `folder`."""
    folder = folder.resolve()
    step = checkup.step
    step("consortium", partial(_consortium, folder))
    step("authority", partial(_authority, folder), ("consortium",))
    step("certificate", partial(_certificate, folder), ("authority",))
    step("sites", partial(_sites, folder), ("consortium",))
    step("service", partial(_service, folder), ("consortium",))
    if is_served(folder):
        step("gate", partial(_gate, folder), ("certificate",))
        step("closed", partial(_closed, folder), ("gate",))
        step("SuperLink", partial(_superlink, folder), ("service",))
    else:
        step("port", partial(_port, folder), ("consortium",))
    step("name", partial(_name, folder), ("consortium",))
    step("disk", partial(disk, folder))
    step("memory", memory)
    step("GPU", partial(gpu, "inversion"))
    step("software", software)
    step("runs", partial(_runs, folder), ("consortium",))
    step("heard", partial(_heard, folder), ("sites",))


def _consortium(folder: Path) -> str:
    consortium = load_consortium(folder)
    for name in SECRETS:
        file = folder / name
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
        except FileNotFoundError:
            raise CredentialError(f"{file}: missing; restore it from the backup") from None
        if mode & 0o077:
            raise CredentialError(
                f"{file}: others on this machine may read it (mode {mode:04o}); make it private: chmod 600 {file}"
            )
    load_signing_key(folder / "pki" / "coordinator.pem")
    return f"{consortium.name}; sites connect to {consortium.address}"


def _authority(folder: Path) -> str:
    authority = load_certificate(folder / "pki" / "ca.crt")
    if load_ec_key(folder / "pki" / "ca.key").public_key() != authority.public_key():
        raise CredentialError(f"{folder / 'pki' / 'ca.key'}: not the key of ca.crt; restore both from the backup")
    now, begin, end = datetime.now(UTC), authority.not_valid_before_utc, authority.not_valid_after_utc
    if now < begin:
        raise CredentialError(f"valid from {begin:%Y-%m-%d}, which is to come: this machine's clock is slow; set it")
    anew = "make a new consortium and send every site a new join file"
    if now > end:
        raise CredentialError(f"ended on {end:%Y-%m-%d}; {anew}")
    if end - now < AUTHORITY_ENDS_SOON:
        return Doubt(f"ends on {end:%Y-%m-%d}; before that, {anew}")
    return f"valid until {end:%Y-%m-%d}"


def _certificate(folder: Path) -> str:
    pki, renew = folder / "pki", f"invcoss-server renew-certificate {folder}"
    certificate, consortium = load_certificate(pki / "server.crt"), load_consortium(folder)
    if load_ec_key(pki / "server.key").public_key() != certificate.public_key():
        raise CredentialError(f"{pki / 'server.key'}: not the key of server.crt; make a fitting one: {renew}")
    try:
        certificate.verify_directly_issued_by(load_certificate(pki / "ca.crt"))
    except (ValueError, TypeError, InvalidSignature):
        raise CredentialError(f"{pki / 'server.crt'}: not issued by this consortium's authority; {renew}") from None
    named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names = {str(entry.value) for entry in named}
    if missing := [host for host in (*consortium.hosts, LOOPBACK) if host not in names]:
        raise CredentialError(f"{pki / 'server.crt'}: not for {', '.join(missing)}; {renew}")
    now, end = datetime.now(UTC), certificate.not_valid_after_utc
    if now < certificate.not_valid_before_utc:
        raise CredentialError(
            f"valid from {certificate.not_valid_before_utc:%Y-%m-%d}, which is to come; set this machine's clock, or "
            f"if it is right: {renew}"
        )
    if now > end:
        raise CredentialError(f"expired on {end:%Y-%m-%d}; {renew}")
    if end - now < CERTIFICATE_ENDS_SOON:
        return Doubt(f"expires on {end:%Y-%m-%d}; {renew}")
    return f"for {', '.join(consortium.hosts)}; valid until {end:%Y-%m-%d}"


def _sites(folder: Path) -> str:
    known = sites(folder)
    valid = [site.name for site in known if site.revoked is None]
    if not valid:
        return Doubt("none is enrolled; invcoss-server enrol-site takes a site's request")
    return f"{len(valid)} enrolled ({', '.join(valid)}); {len(known) - len(valid)} pairs of keys are revoked"


def _service(folder: Path) -> str:
    if not is_served(folder):
        return Doubt(f"does not run; start it with: invcoss-server start {folder}")
    if gone := {"superlink", "superexec", "gate"} - set(_pids(folder)):
        logs = ", ".join(str(folder / "log" / f"{name}.log") for name in sorted(gone))
        return Doubt(f"runs, but {', '.join(sorted(gone))} is starting (again); if that stays so, see {logs}")
    return "runs"


def _gate(folder: Path) -> str:
    consortium, log = load_consortium(folder), folder / "log" / "gate.log"
    try:
        with _connected(folder) as connection:
            assert isinstance(connection.sock, ssl.SSLSocket)
            shown = connection.sock.getpeercert(binary_form=True)
            status = _status(connection, "GET", "/health")
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", None) or error.reason
        raise CredentialError(
            f"what answers on port {consortium.port} does not show this consortium's certificate ({why}); restart the "
            "service, and if that does not help, end the other program on this port"
        ) from None
    except (OSError, HTTPException) as error:
        raise InvcossError(
            f"does not answer on port {consortium.port} ({error}); if it has just started try again, "
            f"else see {_end(log)}"
        ) from None
    if status != 200:
        raise InvcossError(f"what answers on port {consortium.port} is not the gate (status {status}); see {log}")
    if x509.load_der_x509_certificate(shown or b"") != load_certificate(folder / "pki" / "server.crt"):
        return Doubt("answers with an earlier certificate than server.crt; restart the service to show the new one")
    return f"answers on port {consortium.port} as {consortium.hosts[0]}"


def _closed(folder: Path) -> str:
    for method, path in CLOSED:
        with _connected(folder) as connection:
            status = _status(connection, method, path)
        if status != 403:
            raise CredentialError(
                f"the gate answers {method} {path} with status {status}, and must refuse it; stop the service, "
                "install InvCoSS-relay again, and report it"
            )
    return "nothing but what a site needs is passed on, and that to nobody without a key"


def _superlink(folder: Path) -> str:
    from invcoss_server.flower_run import is_healthy

    log = folder / "log" / "superlink.log"
    settings = (folder / "flower" / "config.toml").read_text("utf-8")
    port = int(tomllib.loads(settings)["superlink"]["federation"]["address"].rpartition(":")[2])
    if not is_healthy(port, folder / "pki" / "ca.crt"):
        raise InvcossError(
            f"Flower's SuperLink does not answer on {LOOPBACK}:{port}; if it has just started try again in a minute, "
            f"else see {_end(log)}"
        )
    return f"healthy, on {LOOPBACK}:{port} only"


def _port(folder: Path) -> str:
    port = load_consortium(folder).port
    try:
        with socket.create_server(("", port)):
            return f"{port} is free for the gate"
    except PermissionError:
        raise InvcossError(
            f"this user may not listen on port {port}; as root: sysctl net.ipv4.ip_unprivileged_port_start={port}, "
            "or start the service as a user who may"
        ) from None
    except OSError as error:
        raise InvcossError(
            f"{port} can't be listened on ({error.strerror}); end the program that uses it (ss -ltnp shows it)"
        ) from None


def _name(folder: Path) -> str:
    found, unknown = [], []
    for host in load_consortium(folder).hosts:
        with suppress(ValueError):
            found.append(str(ipaddress.ip_address(host)))
            continue
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
            found.append(f"{host} is {', '.join(sorted(addresses))}")
        except OSError:
            unknown.append(host)
    if unknown:
        return Doubt(
            f"{', '.join(unknown)}: not found from here; unless the sites' own DNS knows it, have it entered in DNS"
        )
    return "; ".join(found)


def _runs(folder: Path) -> str:
    runs = describe_all(folder)
    if bad := [f"run {run.run} {run.state}: {run.error}" for run in runs if run.state == "failed" or run.error]:
        return Doubt(f"{'; '.join(bad)}; when the cause is gone: invcoss-server resume")
    return ", ".join(f"{run.run} {run.state}" for run in runs) or "none"


def _heard(folder: Path) -> str:
    seen, now = read_seen(folder), time.time()
    ago = {site.name: now - seen.get(site.name, 0.0) for site in sites(folder) if site.revoked is None}
    if not ago:
        return "no site to hear"
    text = ", ".join(f"{name} {_words(seconds) if name in seen else 'never'}" for name, seconds in ago.items())
    silent = [name for name, seconds in ago.items() if seconds > SILENT_S]
    if silent and is_served(folder):
        return Doubt(f"{text}; {', '.join(silent)}: the site must look at it (invcoss-site doctor)")
    return text


def _end(log: Path) -> str:
    line = tail(log, 1)
    return f"{log}, which ends: {line}" if line else str(log)


def _words(seconds: float) -> str:
    return f"{timedelta(seconds=max(round(seconds), 0))} (h:mm:ss) ago"


@contextmanager
def _connected(folder: Path) -> Iterator[HTTPConnection]:
    """A TLS connection to the gate on this machine, checked as a site checks it."""
    consortium = load_consortium(folder)
    trusting = ssl.create_default_context(cafile=str(folder / "pki" / "ca.crt"))
    with closing(HTTPConnection(_listens_at(folder), consortium.port, timeout=TIMEOUT_S)) as connection:
        connection.connect()
        connection.sock = trusting.wrap_socket(connection.sock, server_hostname=consortium.hosts[0])
        yield connection


def _status(connection: HTTPConnection, method: str, path: str) -> int:
    connection.request(method, path, body=b"" if method == "POST" else None)
    return connection.getresponse().status


def _listens_at(folder: Path) -> str:
    """An address of this machine at which the gate listens, by its command line: it may be one interface only."""
    with suppress(OSError, KeyError):
        words = Path(f"/proc/{_pids(folder)['gate']}/cmdline").read_bytes().decode().split("\0")
        if "--listen" in words:
            listen = words[words.index("--listen") + 1]
            return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(listen, listen)  # noqa: S104
    return LOOPBACK


def _pids(folder: Path) -> dict[str, int]:
    with suppress(FileNotFoundError, ValueError):
        pids: dict[str, int] = json.loads((folder / "service.pids").read_bytes())
        return pids
    return {}
