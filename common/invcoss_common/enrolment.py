"""The two files by which a site is enrolled: its request, and the coordinator's answer, the join file.

Both are signed, and a record exists only if its signature holds: parsing verifies. Neither holds a secret. Their
version is their own, so that a new release of the software asks no site to enrol again.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from invcoss_common.canonical import canonical_json, write_atomic
from invcoss_common.config import Name
from invcoss_common.errors import CredentialError
from invcoss_common.keys import key_digest, parse_node_key, parse_signing_key, public_text

ENROLMENT_VERSION = 1
MAX_ENROLMENT_BYTES = 16 << 10  # both files have less than 2 kB; more is refused unread

_CHANGED = "it was changed after it was signed, or damaged on the way; ask for the file again"


def check_host(host: str) -> str:
    """A DNS name or IP address in the form certificates use; raises ValueError."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        named = all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label) for label in labels)
        if named and len(host) <= 253 and not labels[-1].isdigit():
            return host
    else:
        if "%" not in host:  # a zone such as fe80::1%eth0 means something on one machine only
            return str(address)
    raise ValueError("not a DNS name in lower case or an IP address")


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; raises ValueError."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535 or join_address(host, int(port)) != address:
        raise ValueError("not host:port")
    if check_host(host) != host:
        raise ValueError("not the usual form of this IP address")
    return host, int(port)


def check_name(name: str) -> str:
    """The name of a site or consortium; raises CredentialError."""
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise CredentialError(
            f"{name!r} is not a name: at most 48 lower-case letters, digits and hyphens, no hyphen first"
        ) from None


def _address(text: str) -> str:
    split_address(text)
    return text


def _checked(parse: Callable[[str], object]) -> AfterValidator:
    def check(text: str) -> str:
        try:
            parse(text)
        except CredentialError as error:
            raise ValueError(str(error)) from None
        return text

    return AfterValidator(check)


Host = Annotated[str, AfterValidator(check_host)]
Address = Annotated[str, Field(max_length=300), AfterValidator(_address)]
NodeKey = Annotated[str, Field(max_length=300), _checked(parse_node_key)]
SigningKey = Annotated[str, Field(max_length=100), _checked(parse_signing_key)]
KeyDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Signed(BaseModel):
    """A record whose `signature`, by the key in its field `signer`, covers all its other fields and its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    signer: ClassVar[str]

    version: int = ENROLMENT_VERSION
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    @model_validator(mode="after")
    def _signature_holds(self) -> Self:
        key = parse_signing_key(getattr(self, self.signer))
        fields = self.model_dump(exclude={"signature"})
        try:
            key.verify(bytes.fromhex(self.signature), _signed_bytes(self.kind, fields))
        except InvalidSignature:
            raise ValueError(_CHANGED) from None
        return self

    def to_bytes(self) -> bytes:
        """The file: JSON in one fixed form that people can read."""
        return (json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n").encode()


class EnrolmentRequest(_Signed):
    """Site to coordinator: its name and public keys, signed with its own key, so that no part can be exchanged."""

    kind: ClassVar[str] = "enrolment request"
    signer: ClassVar[str] = "signing_key"

    site: Name
    node_key: NodeKey
    signing_key: SigningKey

    @property
    def node_key_sha256(self) -> str:
        return key_digest(parse_node_key(self.node_key))

    @property
    def signing_key_sha256(self) -> str:
        return key_digest(parse_signing_key(self.signing_key))


class JoinFile(_Signed):
    """Coordinator to site: where it is, how to recognise it, and which keys it enrolled under which name."""

    kind: ClassVar[str] = "join file"
    signer: ClassVar[str] = "coordinator_key"

    consortium: Name
    address: Address
    ca_certificate: str = Field(max_length=4096, description="PEM")
    coordinator_key: SigningKey
    site: Name
    node_key_sha256: KeyDigest
    signing_key_sha256: KeyDigest

    @property
    def coordinator_key_sha256(self) -> str:
        return key_digest(parse_signing_key(self.coordinator_key))


def write_enrolment_file(record: EnrolmentRequest | JoinFile, path: Path) -> None:
    """Write a request or join file, which anyone may read; raises CredentialError that names the file."""
    try:
        write_atomic(path, record.to_bytes(), mode=0o644)
    except OSError as error:
        raise CredentialError(f"{path}: can't write this file ({error.strerror})") from None


def sign_request(site: str, node_key: str, key: Ed25519PrivateKey) -> EnrolmentRequest:
    """The request of a site, signed with its key; `node_key` is public, in OpenSSH form."""
    return _sign(EnrolmentRequest, key, site=site, node_key=node_key)


def sign_join_file(
    request: EnrolmentRequest, consortium: str, address: str, ca_certificate: str, key: Ed25519PrivateKey
) -> JoinFile:
    """The answer to a request, signed with the coordinator's key."""
    return _sign(
        JoinFile,
        key,
        consortium=consortium,
        address=address,
        ca_certificate=ca_certificate,
        site=request.site,
        node_key_sha256=request.node_key_sha256,
        signing_key_sha256=request.signing_key_sha256,
    )


R = TypeVar("R", EnrolmentRequest, JoinFile)


def read_enrolment_file(path: Path) -> bytes:
    """The bytes of a request or join file for `open_signed`; raises CredentialError that names the file."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_ENROLMENT_BYTES + 1)
    except OSError as error:
        raise CredentialError(f"{path}: can't read this file ({error.strerror})") from None


def open_signed(kind: type[R], data: bytes) -> R:
    """Parse and verify a file of the given kind; raises CredentialError with one line that echoes no content."""
    if len(data) > MAX_ENROLMENT_BYTES:
        raise CredentialError(f"not an InvCoSS {kind.kind}: larger than {MAX_ENROLMENT_BYTES} bytes")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise CredentialError(f"not an InvCoSS {kind.kind}: not JSON") from None
    if not isinstance(values, dict) or "version" not in values:
        raise CredentialError(f"not an InvCoSS {kind.kind}: no version in it")
    if values["version"] != ENROLMENT_VERSION:
        raise CredentialError(
            f"this {kind.kind} has another version than {ENROLMENT_VERSION}, the one read here; "
            "site and coordinator must install releases that fit each other"
        )
    try:
        record = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["msg"].endswith(_CHANGED):
            raise CredentialError(f"the signature of this {kind.kind} does not hold: {_CHANGED}") from None
        field = "".join(c for c in ".".join(map(str, first["loc"])) if c.isprintable())[:60]
        reason = first["msg"].removeprefix("Value error, ")
        raise CredentialError(f"not a valid InvCoSS {kind.kind}: {field}: {reason}") from None
    if record.to_bytes() != data:
        raise CredentialError(f"the form of this {kind.kind} is not the one it was written in: {_CHANGED}")
    return record


def _sign(kind: type[R], key: Ed25519PrivateKey, **fields: str) -> R:
    values = {"version": ENROLMENT_VERSION, kind.signer: public_text(key.public_key()), **fields}
    signature = key.sign(_signed_bytes(kind.kind, values)).hex()
    return kind.model_validate({**values, "signature": signature})


def _signed_bytes(kind: str, fields: dict[str, object] | dict[str, str | int]) -> bytes:
    return f"InvCoSS {kind}\n".encode() + canonical_json(fields)
