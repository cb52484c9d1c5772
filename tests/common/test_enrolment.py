"""Requests and join files: they come back as written, and no altered, foreign or oversized file is ever a record."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from invcoss_common.enrolment import (
    MAX_ENROLMENT_BYTES,
    EnrolmentRequest,
    JoinFile,
    check_host,
    check_name,
    join_address,
    open_signed,
    read_enrolment_file,
    sign_join_file,
    sign_request,
    split_address,
)
from invcoss_common.errors import CredentialError
from invcoss_common.keys import generate_ec_key, generate_signing_key, key_digest, public_text

NODE, SIGNING, COORDINATOR = generate_ec_key(), generate_signing_key(), generate_signing_key()
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
REQUEST = sign_request("north", public_text(NODE.public_key()), SIGNING)
JOIN = sign_join_file(REQUEST, "chest", "relay.example.org:443", CERTIFICATE, COORDINATOR)
FILES = [(EnrolmentRequest, REQUEST.to_bytes()), (JoinFile, JOIN.to_bytes())]


def refused(kind, data):
    with pytest.raises(CredentialError) as caught:
        open_signed(kind, data)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(("kind", "data"), FILES)
def test_a_file_comes_back_as_written_and_holds_no_secret(kind, data):
    record = open_signed(kind, data)
    assert record.to_bytes() == data
    assert b"PRIVATE" not in data
    assert len(data) < 4096


def test_a_join_file_names_the_keys_of_the_request():
    assert JOIN.site == "north"
    assert JOIN.node_key_sha256 == REQUEST.node_key_sha256 == key_digest(NODE.public_key())
    assert JOIN.signing_key_sha256 == REQUEST.signing_key_sha256 == key_digest(SIGNING.public_key())
    assert JOIN.coordinator_key_sha256 == key_digest(COORDINATOR.public_key())


@pytest.mark.parametrize(("kind", "data"), FILES)
def test_every_flipped_bit_and_every_cut_is_refused(kind, data):
    for at in range(len(data)):
        refused(kind, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused(kind, data[:at])


@pytest.mark.parametrize(("kind", "data"), FILES)
@given(draw=st.data())
@settings(max_examples=300, deadline=None)
def test_any_single_byte_change_is_refused(kind, data, draw):
    at = draw.draw(st.integers(0, len(data) - 1))
    byte = bytes([draw.draw(st.integers(0, 255).filter(lambda value: value != data[at]))])
    for changed in (data[:at] + byte + data[at + 1 :], data[:at] + byte + data[at:], data[:at] + data[at + 1 :]):
        if changed != data:
            refused(kind, changed)


@given(st.binary(max_size=400) | st.text(max_size=400).map(lambda text: text.encode(errors="surrogatepass")))
def test_arbitrary_bytes_are_refused_in_one_line(data):
    for kind in (EnrolmentRequest, JoinFile):
        refused(kind, data)


def altered(record, **changes):
    return (json.dumps(record.model_dump() | changes, indent=2, sort_keys=True) + "\n").encode()


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (EnrolmentRequest, altered(REQUEST, site="south"), "signature of this enrolment request does not hold"),
        (
            EnrolmentRequest,
            altered(REQUEST, node_key=public_text(generate_ec_key().public_key())),
            "signature of this enrolment request does not hold",
        ),
        (
            EnrolmentRequest,
            altered(REQUEST, signing_key=public_text(generate_signing_key().public_key())),
            "signature of this enrolment request does not hold",
        ),
        (EnrolmentRequest, altered(REQUEST, node_key=REQUEST.signing_key), "node_key: not an EC P-384 public key"),
        (EnrolmentRequest, altered(REQUEST, note="hello"), "note: Extra inputs"),
        (EnrolmentRequest, altered(REQUEST, site="No Name"), "site: String should match"),
        (EnrolmentRequest, altered(REQUEST, version=2), "another version than 1"),
        (EnrolmentRequest, altered(REQUEST, version=True), "version: "),
        (EnrolmentRequest, altered(REQUEST, **{"\x1b[31m\n": 1}), "Extra inputs"),
        (EnrolmentRequest, REQUEST.to_bytes().replace(b"\n", b"\r\n"), "form of this enrolment request"),
        (EnrolmentRequest, json.dumps(REQUEST.model_dump()).encode(), "form of this enrolment request"),
        (EnrolmentRequest, JOIN.to_bytes(), "not a valid InvCoSS enrolment request"),
        (JoinFile, REQUEST.to_bytes(), "not a valid InvCoSS join file"),
        (JoinFile, altered(JOIN, address="evil.example.org:443"), "signature of this join file does not hold"),
        (JoinFile, altered(JOIN, address="evil.example.org"), "address: not host:port"),
        (JoinFile, altered(JOIN, ca_certificate="x" * 5000), "ca_certificate: "),
        (JoinFile, b"[]", "no version in it"),
        (JoinFile, b"[" * MAX_ENROLMENT_BYTES, "not JSON"),
        (JoinFile, b" " * (MAX_ENROLMENT_BYTES + 1), "larger than"),
    ],
)
def test_what_is_wrong_is_said(kind, data, says):
    assert says in refused(kind, data)


def test_a_signature_for_one_kind_of_record_is_none_for_another():
    fields = JOIN.model_dump(exclude={"signature"})
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    for prefix, holds in ((b"InvCoSS join file\n", True), (b"InvCoSS enrolment request\n", False), (b"", False)):
        values = fields | {"signature": COORDINATOR.sign(prefix + body).hex()}
        if holds:
            JoinFile.model_validate(values)
        else:
            with pytest.raises(ValidationError, match="changed after it was signed"):
                JoinFile.model_validate(values)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(CredentialError, match="none: can't read this file"):
        read_enrolment_file(tmp_path / "none")
    (tmp_path / "big").write_bytes(bytes(10 * MAX_ENROLMENT_BYTES))
    assert "larger than" in refused(JoinFile, read_enrolment_file(tmp_path / "big"))


def test_addresses_and_names():
    for address in ("relay.example.org:443", "10.0.0.1:9092", "[::1]:65535", "localhost:1"):
        assert join_address(*split_address(address)) == address
    for address in (
        "relay",
        "relay:",
        "relay:0",
        "relay:65536",
        "relay:0443",
        "relay:443 ",
        "::1:443",
        "[relay]:1",
        ":1",
    ):
        with pytest.raises(ValueError, match="not "):
            split_address(address)
    for host in (
        "Relay.example.org",
        "*.example.org",
        "a..b",
        "",
        "-a",
        "300.1.1.1",
        "a" * 64,
        "a b",
        "a/b",
        "ä",
        "fe80::1%eth0",
    ):
        with pytest.raises(ValueError, match="not a DNS name"):
            check_host(host)
    for name in ("", "North", "a b", "-a", "a" * 49, "a\n", "../a"):
        with pytest.raises(CredentialError, match="is not a name"):
            check_name(name)
