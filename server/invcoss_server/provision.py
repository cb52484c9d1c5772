"""Provisioning on the coordinator: a consortium's certificate authority, server certificate, key and enrolled sites.

FOLDER/pki/     ca.crt ca.key           the authority; made once, whatever the version of the software
                server.crt server.key   what the coordinator shows to sites; renewed from the same authority
                coordinator.pem         the Ed25519 key that signs join files
                consortium.json         name, hosts, port
FOLDER/sites.db                         the register of sites
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from invcoss_common.canonical import new_folder, write_atomic
from invcoss_common.config import Name
from invcoss_common.enrolment import (
    EnrolmentRequest,
    Host,
    JoinFile,
    check_name,
    join_address,
    open_signed,
    sign_join_file,
)
from invcoss_common.errors import CredentialError
from invcoss_common.keys import (
    check_fingerprint,
    generate_ec_key,
    generate_signing_key,
    key_digest,
    load_ec_key,
    load_signing_key,
    save_key,
)
from invcoss_server.registry import Registry, SiteKeys

CA_VALIDITY = timedelta(days=3653)  # ten years: when it ends, every site needs a new join file
SERVER_VALIDITY = timedelta(days=397)  # thirteen months: renewed once a year, and no site notices
LOOPBACK = "127.0.0.1"
BACKDATE = timedelta(hours=1)  # a site's clock may be a little behind


class Consortium(BaseModel):
    """`consortium.json`. Sites are told the first of `hosts`; the server certificate is for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    hosts: tuple[Host, ...] = Field(min_length=1, max_length=32)
    port: int = Field(default=443, ge=1, le=65535)

    @property
    def address(self) -> str:
        return join_address(self.hosts[0], self.port)


def init_consortium(
    folder: Path, name: str, hosts: tuple[str, ...], port: int = 443, now: datetime | None = None
) -> Consortium:
    """Make a consortium in `folder`: authority, server certificate, coordinator's key, empty register.

    A kill at any instant leaves no consortium, and the same call again makes it. Raises CredentialError when there is
    one already, or name, hosts or port can't be used.
    """
    try:
        consortium = Consortium(name=check_name(name), hosts=hosts, port=port)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise CredentialError(f"{first['loc'][0]}: {first['input']!r}: {reason}") from None
    now = now or datetime.now(UTC)
    pki = folder / "pki"
    try:
        with new_folder(pki) as draft:
            Registry.create(folder / "sites.db")
            ca_key, server_key = generate_ec_key(), generate_ec_key()
            ca = _ca_certificate(consortium, ca_key, now)
            save_key(ca_key, draft / "ca.key")
            save_key(server_key, draft / "server.key")
            save_key(generate_signing_key(), draft / "coordinator.pem")
            _save_certificate(ca, draft / "ca.crt")
            server = _server_certificate(consortium, ca, ca_key, server_key.public_key(), now)
            _save_certificate(server, draft / "server.crt")
            write_atomic(draft / "consortium.json", consortium.model_dump_json(indent=2).encode())
    except FileExistsError:
        raise CredentialError(
            f"{pki} exists: there is a consortium here, and its authority is never overwritten"
        ) from None
    except BlockingIOError:
        raise CredentialError(f"{folder}: another init is running here") from None
    except OSError as error:
        raise CredentialError(f"{folder}: can't make the consortium here ({error.strerror})") from None
    return consortium


def load_consortium(folder: Path) -> Consortium:
    """Read `consortium.json`; raises CredentialError when there is no consortium in `folder`."""
    path = folder / "pki" / "consortium.json"
    try:
        return Consortium.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CredentialError(f"{folder}: no consortium here; invcoss-server init makes one") from None
    except OSError as error:
        raise CredentialError(f"{path}: can't read it ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise CredentialError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def coordinator_digest(folder: Path) -> str:
    """Digest of the coordinator's public key; raises CredentialError when there is no consortium in `folder`."""
    load_consortium(folder)
    return key_digest(load_signing_key(folder / "pki" / "coordinator.pem").public_key())


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate (PEM); raises CredentialError that names the file."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise CredentialError(f"{path}: can't read this certificate; restore it from the backup") from None


def renew_server_certificate(folder: Path, now: datetime | None = None) -> datetime:
    """Replace the server certificate by one of the same authority, so that no site is touched; returns its end.

    The server's key is kept, so that one file changes, at once; if the key file is gone, a new key is made.
    Raises CredentialError when the authority itself has ended.
    """
    consortium, pki = load_consortium(folder), folder / "pki"
    now = now or datetime.now(UTC)
    ca = load_certificate(pki / "ca.crt")
    if now >= ca.not_valid_after_utc:
        raise CredentialError(
            f"the authority of this consortium ended on {ca.not_valid_after_utc:%Y-%m-%d}; "
            "make a new consortium and send every site a new join file"
        )
    ca_key = load_ec_key(pki / "ca.key")
    try:
        if not (pki / "server.key").exists():
            save_key(generate_ec_key(), pki / "server.key")
        server_key = load_ec_key(pki / "server.key")
        certificate = _server_certificate(consortium, ca, ca_key, server_key.public_key(), now)
        _save_certificate(certificate, pki / "server.crt")
    except OSError as error:
        raise CredentialError(f"{pki}: can't write the server certificate ({error.strerror})") from None
    return certificate.not_valid_after_utc


def enrol_site(folder: Path, request: bytes, replace: bool = False, heard: str | None = None) -> JoinFile:
    """Enter a site's request into the register and answer with its join file; the same request twice is harmless.

    `replace` revokes the keys that the site had (this is how keys are rotated). `heard` is the fingerprint of the
    site's signing key as the site read it out; the signature covers the rest. Raises CredentialError.
    """
    consortium, pki = load_consortium(folder), folder / "pki"
    opened = open_signed(EnrolmentRequest, request)
    if heard is not None:
        check_fingerprint(heard, opened.signing_key_sha256, f"site '{opened.site}'")
    key, ca = load_signing_key(pki / "coordinator.pem"), load_certificate(pki / "ca.crt")
    pem = ca.public_bytes(Encoding.PEM).decode()
    Registry(folder / "sites.db").enrol(opened, replace)
    return sign_join_file(opened, consortium.name, consortium.address, pem, key)


def revoke_site(folder: Path, name: str) -> None:
    """End the validity of a site's keys, now and for ever; raises CredentialError when it has no valid ones."""
    load_consortium(folder)
    Registry(folder / "sites.db").revoke(name)


def sites(folder: Path) -> list[SiteKeys]:
    """Every pair of keys that was ever enrolled, in order; raises CredentialError when there is no consortium."""
    load_consortium(folder)
    return Registry(folder / "sites.db").sites()


def identify_site(folder: Path, key: str) -> str:
    """The name of the enrolled site whose public key (OpenSSH form or PEM) was presented.

    Raises CredentialError for a key that is unknown or revoked, saying which and since when.
    """
    load_consortium(folder)
    found = Registry(folder / "sites.db").find(key)
    if found is None:
        raise CredentialError("this key is unknown: no site was enrolled with it; the site must send its request")
    if found.revoked:
        raise CredentialError(
            f"this key of site '{found.name}' is revoked since {found.revoked}; the site must make new keys"
        )
    return found.name


def _ca_certificate(consortium: Consortium, key: EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"InvCoSS CA {consortium.name}")])
    return (
        _builder(name, name, key.public_key(), now, now + CA_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )


def _server_certificate(
    consortium: Consortium,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    key: EllipticCurvePublicKey,
    now: datetime,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"InvCoSS {consortium.name}")])
    end = min(now + SERVER_VALIDITY, ca.not_valid_after_utc)
    hosts = dict.fromkeys((*consortium.hosts, LOOPBACK))  # the gate speaks TLS with the SuperLink behind it too
    return (
        _builder(name, ca.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _save_certificate(certificate: x509.Certificate, path: Path) -> None:
    write_atomic(path, certificate.public_bytes(Encoding.PEM), mode=0o644)
