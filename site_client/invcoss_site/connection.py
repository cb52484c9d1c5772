"""The way from a site to its coordinator: perhaps a proxy, name, TCP, TLS by the consortium's authority, clocks.

Every way in which it can fail is one line that says what is wrong and who must do what.
"""

from __future__ import annotations

import base64
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urlsplit

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from httpx._utils import URLPattern, get_environment_proxies  # not public; a test holds them against httpx's choice

from invcoss_common.enrolment import join_address, split_address
from invcoss_common.errors import CredentialError

# Flower refuses a message that a site signed more than 5 s in the coordinator's future or 300 s in its past.
MAX_AHEAD_S = 5.0
MAX_BEHIND_S = 300.0
MAX_HEAD_BYTES = 16 << 10
DEFAULT_PORTS = {"http": 80, "https": 443}
_FIREWALL = (
    "(firewall) or, where the outside is reached through a proxy only, set HTTPS_PROXY; "
    "the operator must see whether the coordinator runs"
)


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy; `login` is `user:password` or empty, and is never shown."""

    scheme: str
    host: str
    port: int
    login: str

    def __str__(self) -> str:
        return f"{self.scheme}://{join_address(self.host, self.port)}"


@dataclass(frozen=True)
class Way:
    """How a site reaches `address`, which is host:port: directly, or through a proxy."""

    address: str
    proxy: Proxy | None

    @property
    def through(self) -> str:
        return f" (through the proxy {self.proxy})" if self.proxy else ""


@dataclass(frozen=True)
class Connection:
    """What a good connection showed; `valid_until` is the end of the coordinator's certificate.

    `ahead_s` is how far this machine's clock is ahead of the coordinator's, None if the coordinator did not tell.
    """

    tls: str
    valid_until: datetime
    ahead_s: float | None


def find_way(address: str) -> Way:
    """How httpx, and so Flower's SuperNode, goes to `address`; raises CredentialError for a proxy it can't use."""
    target = httpx.URL(f"https://{address}")
    patterns = {URLPattern(pattern): proxy for pattern, proxy in get_environment_proxies().items()}
    chosen = next((proxy for pattern, proxy in sorted(patterns.items()) if pattern.matches(target)), None)
    if not chosen:
        return Way(address, None)
    try:
        parts = urlsplit(chosen)
        host, port = parts.hostname, parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in DEFAULT_PORTS:
        raise CredentialError(
            f"the proxy for {address} in HTTPS_PROXY or ALL_PROXY is none that can be used (its URL must be "
            "http://HOST:PORT or https://HOST:PORT); the site's IT must correct it, or exempt the address in NO_PROXY"
        )
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    return Way(address, Proxy(parts.scheme, host, port, login))


def resolve(way: Way) -> str:
    """The IP addresses of the machine that is connected to first; raises CredentialError when its name is unknown."""
    host, port = (way.proxy.host, way.proxy.port) if way.proxy else split_address(way.address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        if way.proxy:
            raise CredentialError(
                f"{way.proxy}: this machine can't find the proxy's name '{host}' ({why}); "
                "the site's IT must correct HTTPS_PROXY, or its DNS"
            ) from None
        raise CredentialError(
            f"{way.address}: this machine can't find the name '{host}' ({why}); "
            "the site's IT must make its DNS resolve it"
        ) from None
    return ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(way: Way, timeout_s: float) -> socket.socket:
    """A TCP connection to the coordinator, through the proxy if there is one; raises CredentialError."""
    host, port = (way.proxy.host, way.proxy.port) if way.proxy else split_address(way.address)
    where = f"the proxy {way.proxy}" if way.proxy else way.address
    try:
        plain = socket.create_connection((host, port), timeout=timeout_s)
    except TimeoutError:
        raise CredentialError(
            f"{where}: no answer within {timeout_s:g} s; the site's IT must let this machine connect to that address "
            + ("(firewall) or correct HTTPS_PROXY" if way.proxy else _FIREWALL)
        ) from None
    except ConnectionRefusedError:
        raise CredentialError(
            f"{where}: connection refused; nothing listens there: "
            + (
                "the site's IT must correct HTTPS_PROXY, or start the proxy"
                if way.proxy
                else "the operator must start the coordinator or correct the address in a new join file"
            )
        ) from None
    except OSError as error:
        raise CredentialError(
            f"{where}: can't connect ({error.strerror}); the site's IT must check this machine's network"
        ) from None
    if way.proxy and way.proxy.scheme == "http":
        try:
            _ask_for_tunnel(plain, way.address, way.proxy)
        except BaseException:
            plain.close()
            raise
    return plain


def secure(way: Way, authority: x509.Certificate, ca_certificate: str, timeout_s: float) -> Connection:
    """Speak TLS with the coordinator and check its certificate; `ca_certificate` is the PEM text of `authority`.

    Raises CredentialError: not TLS, intercepted, another authority, another name, not yet valid, expired.
    """
    trusting = ssl.create_default_context(cadata=ca_certificate)
    trusting.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        with _handshake(way, trusting, timeout_s) as tls:
            shown, version = tls.getpeercert(binary_form=True), tls.version()
            ahead_s = _seconds_ahead(tls, way.address, timeout_s)
    except ssl.SSLCertVerificationError as error:
        raise _explain(way, authority, error, timeout_s) from None
    assert shown is not None
    assert version is not None
    return Connection(version, x509.load_der_x509_certificate(shown).not_valid_after_utc, ahead_s)


def check_clock(ahead_s: float) -> None:
    """Raise CredentialError unless Flower accepts what is signed by a clock that is `ahead_s` ahead."""
    if not _fits(ahead_s):
        raise _wrong_clock(ahead_s)


def _ask_for_tunnel(plain: socket.socket, address: str, proxy: Proxy) -> None:
    """Have the proxy connect to the coordinator, as httpx does; raises CredentialError for every other answer."""
    ask = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
    if proxy.login:
        ask += f"Proxy-Authorization: Basic {base64.b64encode(proxy.login.encode()).decode()}\r\n"
    head = b""
    try:
        plain.sendall(f"{ask}\r\n".encode())
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
            part = plain.recv(4096)
            if not part:
                break
            head += part
    except TimeoutError:
        raise CredentialError(
            f"the proxy {proxy} did not connect to {address} in time; the site's IT must look at the proxy, "
            "the operator must see whether the coordinator runs"
        ) from None
    except OSError:
        pass  # it hung up; what it said before decides
    first = head.split(b"\r\n")[0].decode("latin-1").split(" ", 2)
    if not first[0].startswith("HTTP/1.") or len(first) < 2 or not first[1].isdigit():
        raise CredentialError(
            f"what answers at {proxy} is no HTTP proxy; the site's IT must correct HTTPS_PROXY, "
            "or exempt this address in NO_PROXY"
        )
    status, says = int(first[1]), _printable(" ".join(first[1:]))
    if 200 <= status < 300:
        return
    if status == 407:
        raise CredentialError(
            f"the proxy {proxy} does not accept the user name and password in HTTPS_PROXY ({says}); the site's IT must "
            "correct them, or let this machine through without"
            if proxy.login
            else f"the proxy {proxy} asks for a user name and password ({says}); the site's IT must write them into "
            "HTTPS_PROXY (http://USER:PASSWORD@HOST:PORT), or let this machine through without"
        )
    if status in (502, 503, 504):
        raise CredentialError(
            f"the proxy {proxy} can't reach {address} ({says}); the site's IT must let the proxy connect to that "
            "address and port, the operator must see whether the coordinator runs"
        )
    raise CredentialError(
        f"the proxy {proxy} refuses to connect to {address} ({says}); the site's IT must allow this address and port "
        "there, or exempt it in NO_PROXY if this machine can connect directly"
    )


def _handshake(way: Way, context: ssl.SSLContext, timeout_s: float) -> ssl.SSLSocket:
    """A TLS connection; raises ssl.SSLCertVerificationError, and CredentialError for all that comes before."""
    plain = connect(way, timeout_s)
    try:
        return context.wrap_socket(plain, server_hostname=split_address(way.address)[0])
    except BaseException as error:
        plain.close()
        if not isinstance(error, OSError) or isinstance(error, ssl.SSLCertVerificationError):
            raise
        if isinstance(error, TimeoutError):
            raise CredentialError(
                f"{way.address}: no answer within {timeout_s:g} s{way.through}; the site's IT must let this machine "
                f"connect to that address {_FIREWALL}"
            ) from None
        raise CredentialError(
            f"{way.address}: what answers there{way.through} does not speak TLS as the coordinator does "
            f"({getattr(error, 'reason', None) or error.strerror}); the operator must check the address and port, "
            "the site's IT whether a proxy or firewall stands between"
        ) from None


def _explain(way: Way, ca: x509.Certificate, error: ssl.SSLCertVerificationError, timeout_s: float) -> CredentialError:
    """Look at the certificate that was not accepted, on a connection that is used for nothing else."""
    curious = ssl.create_default_context()
    curious.check_hostname = False
    curious.verify_mode = ssl.CERT_NONE
    ahead_s: float | None = None
    address = way.address
    try:
        with _handshake(way, curious, timeout_s) as tls:
            shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
            ahead_s = _seconds_ahead(tls, address, timeout_s)
        issuer = _printable(shown.issuer.rfc4514_string())
    except (CredentialError, OSError, ValueError):
        return CredentialError(
            f"{address}: its certificate can't be trusted ({error.verify_message}); tell the operator"
        )
    if shown.issuer != ca.subject:
        return CredentialError(
            f"{address}: this is not the coordinator's certificate: it was issued by '{issuer}', not by the "
            "consortium's authority; if that is your antivirus, proxy or firewall, the site's IT must exempt this "
            "address from TLS inspection, else the operator must install the consortium's server certificate"
        )
    try:
        shown.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return CredentialError(
            f"{address}: its certificate was issued by another authority of the same name, '{issuer}'; if the operator "
            "made the consortium anew, ask for a new join file, else do not connect"
        )
    now = datetime.now(UTC)
    if not shown.not_valid_before_utc <= now <= shown.not_valid_after_utc:
        if ahead_s is not None and not _fits(ahead_s):
            return _wrong_clock(ahead_s)
        clock = "both clocks agree" if ahead_s is not None else f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
        if now < shown.not_valid_before_utc:
            return CredentialError(
                f"{address}: the coordinator's certificate is not valid before "
                f"{shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and {clock}; "
                "the operator must check the coordinator's clock and renew it (invcoss-server renew-certificate)"
            )
        return CredentialError(
            f"{address}: the coordinator's certificate expired on {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
            f"and {clock}; the operator must renew it (invcoss-server renew-certificate)"
        )
    names = _names(shown)
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return CredentialError(
            f"{address}: the coordinator's certificate is for {names or 'no name'}, not for this address; the operator "
            "must send a join file with the right address, or renew the certificate for this one"
        )
    return CredentialError(f"{address}: its certificate can't be trusted ({error.verify_message}); tell the operator")


def _seconds_ahead(tls: ssl.SSLSocket, address: str, timeout_s: float) -> float | None:
    """How far this machine's clock is surely ahead of (or, negative, behind) the `Date` of an HTTP answer."""
    head = b""
    sent = time.time()
    with suppress(OSError):  # no HTTP there, or no answer in time: then we do not know
        tls.sendall(f"HEAD /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES and time.time() < sent + timeout_s:
            part = tls.recv(4096)
            if not part:
                break
            head += part
    received = time.time()
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"date:"):
            with suppress(ValueError):
                date = parsedate_to_datetime(line[5:].strip().decode("ascii")).timestamp()
                # The coordinator wrote it between `sent` and `received`, and cut off up to a second.
                return max(sent - date - 1, 0.0) or min(received - date, 0.0)
    return None


def _fits(ahead_s: float) -> bool:
    return -MAX_BEHIND_S < ahead_s < MAX_AHEAD_S


def _wrong_clock(ahead_s: float) -> CredentialError:
    direction = "ahead of" if ahead_s > 0 else "behind"
    return CredentialError(
        f"this machine's clock is {timedelta(seconds=round(abs(ahead_s)))} (h:mm:ss) {direction} the coordinator's; "
        "the site's IT must set it (NTP); if it is right, the operator must set the coordinator's"
    )


def _names(certificate: x509.Certificate) -> str:
    with suppress(x509.ExtensionNotFound, ValueError):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]
        return _printable(", ".join(map(str, found)))
    return ""


def _printable(text: str) -> str:
    """Text from a certificate or proxy that may be anyone's, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
