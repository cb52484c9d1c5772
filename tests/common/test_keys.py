"""Keys on disk and as text: modes, forms that OpenSSH and Flower read, fingerprints, and what is refused."""

from __future__ import annotations

import base64
import shutil
import stat
import subprocess
from argparse import Namespace
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from invcoss_common.errors import CredentialError
from invcoss_common.keys import (
    check_fingerprint,
    check_signature,
    fingerprint,
    generate_ec_key,
    generate_signing_key,
    key_digest,
    load_ec_key,
    load_signing_key,
    parse_node_key,
    parse_public_key,
    parse_signing_key,
    public_text,
    save_key,
    save_node_key,
    sign,
)

NODE = generate_ec_key()
SIGNING = generate_signing_key()


def test_private_keys_come_back_and_only_their_owner_can_read_them(tmp_path):
    save_key(SIGNING, tmp_path / "signing.pem")
    save_key(NODE, tmp_path / "ec.pem")
    save_node_key(NODE, tmp_path / "node")
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (tmp_path / "signing.pem").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert load_signing_key(tmp_path / "signing.pem").private_bytes_raw() == SIGNING.private_bytes_raw()
    assert load_ec_key(tmp_path / "ec.pem").private_numbers() == NODE.private_numbers()
    assert load_ec_key(tmp_path / "node").private_numbers() == NODE.private_numbers()


def test_public_keys_come_back_from_their_text_and_have_one_digest_in_every_form():
    assert public_text(SIGNING.public_key()).startswith("ssh-ed25519 ")
    assert parse_signing_key(public_text(SIGNING.public_key())) == SIGNING.public_key()
    assert parse_node_key(public_text(NODE.public_key())) == NODE.public_key()
    pem = NODE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert key_digest(parse_public_key(pem)) == key_digest(NODE.public_key())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        public_text(NODE.public_key()),
        public_text(SIGNING.public_key()) + " a comment",
        public_text(SIGNING.public_key()) + "\n",
        " " + public_text(SIGNING.public_key()),
        "x" * 100_000,
        "\ud800",
    ],
    ids=["empty", "no key", "cut", "node key", "comment", "newline", "space", "long", "surrogate"],
)
def test_what_is_not_a_signing_key_is_refused(text):
    with pytest.raises(CredentialError, match="not a"):
        parse_signing_key(text)


@given(
    key=st.sampled_from([SIGNING.public_key(), NODE.public_key()]),
    at=st.integers(0, 200),
    put=st.binary(max_size=8),
    drop=st.integers(0, 8),
)
def test_a_damaged_key_is_refused_or_another_key(key, at, put, drop):
    kind, blob = public_text(key).split()
    data = base64.b64decode(blob)
    text = f"{kind} {base64.b64encode(data[:at] + put + data[at + drop :]).decode()}"
    with suppress(CredentialError):
        assert (parse_public_key(text) == key) == (text == public_text(key))


def test_a_signature_has_one_text():
    signature = sign(SIGNING, "report", b"data")
    check_signature(SIGNING.public_key(), "report", b"data", signature, "a site")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    same = signature[:-3] + letters[letters.index(signature[-3]) ^ 1] + "=="
    assert base64.b64decode(same) == base64.b64decode(signature)
    for other in (same, signature + "\n", f" {signature}", signature.rstrip("="), f"{signature}=", "é", ""):
        with pytest.raises(CredentialError, match="lacks the signature of a site"):
            check_signature(SIGNING.public_key(), "report", b"data", other, "a site")


def test_what_is_not_a_node_key_is_refused():
    for key in (SIGNING.public_key(), generate_private_key(SECP256R1()).public_key()):
        with pytest.raises(CredentialError, match="not an EC P-384 public key"):
            parse_node_key(public_text(key))


def test_private_key_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(CredentialError, match="key: can't read the key"):
        load_signing_key(path)
    encrypted = SIGNING.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    small_curve = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (b"", b"\x00" * 10_000, b"-----BEGIN OPENSSH PRIVATE KEY-----\n", encrypted, small_curve):
        path.write_bytes(data)
        for load in (load_signing_key, load_ec_key):
            with pytest.raises(CredentialError, match=r"key: not an? "):
                load(path)


def test_fingerprints_are_groups_of_the_digest_and_are_compared_as_people_type_them():
    digest = key_digest(Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key())
    shown = fingerprint(digest)
    assert shown.replace(" ", "") == digest[:32]
    assert {len(group) for group in shown.split(" ")} == {4}
    for heard in (shown, shown.upper(), shown.replace(" ", "-"), f"  {shown}\n", digest):
        check_fingerprint(heard, digest, "site 'a'")
    for heard in ("", shown[:-1], shown[:4], "0" * 32, shown + " 0000"):
        with pytest.raises(CredentialError, match=f"the fingerprint of site 'a' is {shown}, not the one given"):
            check_fingerprint(heard, digest, "site 'a'")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_reads_the_node_key(tmp_path):
    save_node_key(NODE, tmp_path / "node")
    done = subprocess.run(["ssh-keygen", "-y", "-f", tmp_path / "node"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == public_text(NODE.public_key()).split()


def test_flower_reads_the_node_key(tmp_path):
    supernode = pytest.importorskip("flwr.supernode.cli.flower_supernode")
    register = pytest.importorskip("flwr.cli.supernode.register")
    save_node_key(NODE, tmp_path / "node")
    (tmp_path / "node.pub").write_text(public_text(NODE.public_key()) + "\n")
    arguments = Namespace(auth_supernode_private_key=str(tmp_path / "node"), auth_supernode_public_key=None)
    private, public = supernode._try_setup_client_authentication(arguments)
    assert private.private_numbers() == NODE.private_numbers()
    assert public == NODE.public_key()
    registered = register.try_load_public_key(tmp_path / "node.pub").decode()
    assert key_digest(parse_public_key(registered)) == key_digest(NODE.public_key())
