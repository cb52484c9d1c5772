"""Keys: Ed25519 for signatures, EC P-384 for Flower nodes and certificates; their files, text form and fingerprints."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.errors import CredentialError

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

MAX_KEY_BYTES = 4096  # a key file or text is a few hundred bytes; more is refused unread
FINGERPRINT_DIGITS = 32  # of 64: 128 bits, which no one can find another key for


def generate_signing_key() -> Ed25519PrivateKey:
    """A new key for signing hand-offs, requests and join files."""
    return Ed25519PrivateKey.generate()


def generate_ec_key() -> EllipticCurvePrivateKey:
    """A new EC P-384 key, for a Flower node or a certificate."""
    return generate_private_key(SECP384R1())


def save_key(key: PrivateKey, path: Path) -> None:
    """Write a private key as PEM PKCS8 that only its owner can read (0600)."""
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def save_node_key(key: EllipticCurvePrivateKey, path: Path) -> None:
    """Write a node's private key in OpenSSH form (0600), as Flower reads and `ssh-keygen -t ecdsa -b 384` makes it."""
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PEM); raises CredentialError that names the file."""
    key = _load_private(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialError(f"{path}: not an Ed25519 private key; restore it from the backup")
    return key


def load_ec_key(path: Path) -> EllipticCurvePrivateKey:
    """Read an EC P-384 private key (PEM or OpenSSH); raises CredentialError that names the file."""
    key = _load_private(path)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise CredentialError(f"{path}: not an EC P-384 private key; restore it from the backup")
    return key


def public_text(key: PublicKey) -> str:
    """A public key as one line in OpenSSH form, without a comment: the only text form that is accepted."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def parse_signing_key(text: str) -> Ed25519PublicKey:
    """An Ed25519 public key from its text form; raises CredentialError."""
    key = parse_public_key(text)
    if not isinstance(key, Ed25519PublicKey) or public_text(key) != text:
        raise CredentialError("not an Ed25519 public key in OpenSSH form without a comment")
    return key


def parse_node_key(text: str) -> EllipticCurvePublicKey:
    """An EC P-384 public key from its text form; raises CredentialError."""
    key = parse_public_key(text)
    if not isinstance(key, EllipticCurvePublicKey) or public_text(key) != text or key.curve.key_size != 384:
        raise CredentialError("not an EC P-384 public key in OpenSSH form without a comment")
    return key


def parse_public_key(text: str) -> PublicKey:
    """An Ed25519 or EC public key in OpenSSH form or PEM, as Flower shows it; raises CredentialError."""
    data = text.encode(errors="replace")
    key: object = None
    if len(data) <= MAX_KEY_BYTES:
        with suppress(ValueError, NotImplementedError, UnsupportedAlgorithm):
            if text.startswith(("ssh-ed25519 ", "ecdsa-sha2-")):
                key = load_ssh_public_key(data)
            elif text.startswith("-----BEGIN PUBLIC KEY-----"):
                key = load_pem_public_key(data)
    if not isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey):
        raise CredentialError("not a public key that is used here (Ed25519 or EC, in OpenSSH form or PEM)")
    return key


def key_digest(key: PublicKey) -> str:
    """What a key is known by: sha256 of its DER form (SubjectPublicKeyInfo), the same for every text form."""
    return sha256_hex(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def fingerprint(digest: str) -> str:
    """A key digest to read out by phone: its first 128 bits as eight groups of four hexadecimal digits."""
    return " ".join(digest[at : at + 4] for at in range(0, FINGERPRINT_DIGITS, 4))


def check_fingerprint(heard: str, digest: str, whose: str) -> None:
    """Compare a fingerprint that was read out with a key digest, ignoring spaces and case; raises CredentialError."""
    digits = "".join(heard.lower().replace("-", " ").split())
    if digits not in (digest[:FINGERPRINT_DIGITS], digest):
        raise CredentialError(
            f"the fingerprint of {whose} is {fingerprint(digest)}, not the one given; "
            "unless it was mistyped, the file comes from someone else: do not use it"
        )


def sign(key: Ed25519PrivateKey, kind: str, data: bytes) -> str:
    """Base64 of the signature over `data` as a `kind` of document, so that it holds for no other kind."""
    return base64.b64encode(key.sign(f"invcoss {kind}\n".encode() + data)).decode()


def check_signature(key: Ed25519PublicKey, kind: str, data: bytes, signature: str, whose: str) -> None:
    """Raise CredentialError unless `signature` is that of `key` over `data` as a `kind` of document.

    Of the texts that base64 has for the same bytes, only the one that `sign` writes is taken.
    """
    try:
        raw = base64.b64decode(signature, validate=True)
        if base64.b64encode(raw).decode() != signature:
            raise ValueError
        key.verify(raw, f"invcoss {kind}\n".encode() + data)
    except (InvalidSignature, ValueError):
        raise CredentialError(f"the {kind} lacks the signature of {whose}; nothing in it was looked at") from None


def _load_private(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise CredentialError(f"{path}: can't read the key ({error.strerror})") from None
    ssh = data.startswith(b"-----BEGIN OPENSSH")
    try:
        return (load_ssh_private_key if ssh else load_pem_private_key)(data, None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):  # TypeError: the key has a pass phrase
        raise CredentialError(f"{path}: not a private key without a pass phrase; restore it from the backup") from None
