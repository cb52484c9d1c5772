"""The way from a site to its coordinator, tried step by step: name, TCP, TLS by the consortium's authority, clocks.

Every way in which it can fail is one line that says what is wrong and who must do what.
"""

from __future__ import annotations

import socket
import ssl
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from invcoss_common.enrolment import split_address
from invcoss_common.errors import CredentialError
from invcoss_site.enrol import check_authority, load_authority, load_join

# Flower refuses a message that a site signed more than 5 s in the coordinator's future or 300 s in its past.
MAX_AHEAD_S = 5.0
MAX_BEHIND_S = 300.0
MAX_HEAD_BYTES = 16 << 10


@dataclass(frozen=True)
class Connection:
    """What a good connection showed; `valid_until` is the end of the coordinator's certificate.

    `ahead_s` is how far this machine's clock is ahead of the coordinator's, None if the coordinator did not tell.
    """

    address: str
    tls: str
    valid_until: datetime
    ahead_s: float | None


def check_credentials(root: Path, timeout_s: float = 10.0) -> Connection:
    """Connect to the coordinator of the join file in `root` and check its certificate and both clocks.

    Raises CredentialError: no such name, refused, no answer, not TLS, intercepted, another authority, another name,
    not yet valid, expired, a clock that is wrong.
    """
    opened = load_join(root)
    ca = load_authority(opened)
    check_authority(ca)
    trusting = ssl.create_default_context(cadata=opened.ca_certificate)
    trusting.minimum_version = ssl.TLSVersion.TLSv1_2
    address = opened.address
    try:
        with _handshake(address, trusting, timeout_s) as tls:
            shown, version = tls.getpeercert(binary_form=True), tls.version()
            ahead_s = _seconds_ahead(tls, address, timeout_s)
    except ssl.SSLCertVerificationError as error:
        raise _explain(address, ca, error, timeout_s) from None
    if ahead_s is not None and not -MAX_BEHIND_S < ahead_s < MAX_AHEAD_S:
        raise _wrong_clock(ahead_s)
    assert shown is not None
    assert version is not None
    return Connection(address, version, x509.load_der_x509_certificate(shown).not_valid_after_utc, ahead_s)


def _handshake(address: str, context: ssl.SSLContext, timeout_s: float) -> ssl.SSLSocket:
    """A TLS connection; raises ssl.SSLCertVerificationError, and CredentialError for all that comes before."""
    host, port = split_address(address)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise CredentialError(
            f"{address}: this machine can't find the name '{host}' ({error.strerror}); "
            f"the site's IT must make its DNS resolve it{_proxy_hint()}"
        ) from None
    try:
        plain = socket.create_connection((host, port), timeout=timeout_s)
        try:
            return context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    except ssl.SSLCertVerificationError:
        raise
    except TimeoutError:
        raise CredentialError(
            f"{address}: no answer within {timeout_s:g} s; the site's IT must let this machine connect to that "
            f"address (firewall), the operator must see whether the coordinator runs{_proxy_hint()}"
        ) from None
    except ConnectionRefusedError:
        raise CredentialError(
            f"{address}: connection refused; nothing listens there: the operator must start the coordinator "
            "or correct the address in a new join file"
        ) from None
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
        raise CredentialError(
            f"{address}: what answers there does not speak TLS as the coordinator does "
            f"({getattr(error, 'reason', None) or error.strerror}); the operator must check the address and port, "
            f"the site's IT whether a proxy or firewall stands between{_proxy_hint()}"
        ) from None
    except OSError as error:
        raise CredentialError(
            f"{address}: can't connect ({error.strerror}); the site's IT must check this machine's network"
            f"{_proxy_hint()}"
        ) from None


def _explain(
    address: str, ca: x509.Certificate, error: ssl.SSLCertVerificationError, timeout_s: float
) -> CredentialError:
    """Look at the certificate that was not accepted, on a connection that is used for nothing else."""
    curious = ssl.create_default_context()
    curious.check_hostname = False
    curious.verify_mode = ssl.CERT_NONE
    ahead_s: float | None = None
    try:
        with _handshake(address, curious, timeout_s) as tls:
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
        if ahead_s is not None and not -MAX_BEHIND_S < ahead_s < MAX_AHEAD_S:
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
    """Text from a certificate that may be anyone's, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _proxy_hint() -> str:
    proxies = urllib.request.getproxies()
    return " (a proxy is set in HTTPS_PROXY; this check connects without it)" if "https" in proxies else ""
