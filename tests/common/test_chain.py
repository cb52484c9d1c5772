"""Chains: whatever is done to a line is found out, and a writer may be killed at any byte."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invcoss_common import chain
from invcoss_common.canonical import canonical_json, sha256_hex
from invcoss_common.chain import Head, parse_head, records, verify, writing
from invcoss_common.errors import ChainError
from invcoss_common.keys import generate_signing_key, public_text, sign

KEY, OTHER = generate_signing_key(), generate_signing_key()
PUBLIC = (KEY.public_key(),)
COUNT = 40


def append(path: Path, number: int, key=KEY) -> Head:
    with writing(path, "journal of site north", key) as open_chain:
        return open_chain.add("answered", {"verb": "get", "bytes": number, "artefacts": ["a" * 64]})


def make(path: Path, count: int = COUNT, key=KEY) -> list[bytes]:
    """A chain's lines, with their newlines."""
    for number in range(count):
        append(path, number, key)
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[bytes]:
    return make(tmp_path_factory.mktemp("chain") / "journal.jsonl")


def broken(path: Path, lines: list[bytes], keys=PUBLIC, head: Head | None = None) -> str:
    """What `verify` has against these lines."""
    path.write_bytes(b"".join(lines))
    with pytest.raises(ChainError) as caught:
        verify(path, keys, head)
    assert caught.value.exit_code == 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def head_of(lines: list[bytes]) -> Head:
    return Head(len(lines), sha256_hex(lines[-1].rstrip(b"\n")))


def test_a_chain_holds_and_says_what_it_is(tmp_path, lines):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(lines))
    found = verify(path, PUBLIC, head_of(lines))
    assert (found.name, found.head, found.signed) == ("journal of site north", head_of(lines), True)
    assert parse_head(str(found.head)) == found.head
    assert found.first <= found.newest
    assert not verify(path).signed
    assert [record["bytes"] for record in records(path)] == list(range(COUNT))
    assert [record["n"] for record in records(path)] == list(range(1, COUNT + 1))
    assert all(line == canonical_json(json.loads(line)) + b"\n" for line in lines)


def test_a_chain_is_its_owners_only(tmp_path):
    make(tmp_path / "journal.jsonl", 1)
    assert (tmp_path / "journal.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("at", range(COUNT))
def test_deleting_any_line_is_found(tmp_path, lines, at):
    head = head_of(lines)
    less = lines[:at] + lines[at + 1 :]
    says = broken(tmp_path / "c", less, head=head)
    assert (f"line {at + 1} is record {at + 2}" if at < COUNT - 1 else "truncated") in says


@pytest.mark.parametrize("count", range(COUNT))
def test_truncation_is_found_against_a_known_head(tmp_path, lines, count):
    assert ("truncated" if count else "no record") in broken(tmp_path / "c", lines[:count], head=head_of(lines))


@pytest.mark.parametrize("at", range(COUNT))
def test_editing_any_field_of_any_line_is_found(tmp_path, lines, at):
    record = json.loads(lines[at])
    for name, value in record.items():
        changed = {
            **record,
            name: value + 1 if isinstance(value, int) else [] if isinstance(value, list) else value[1:],
        }
        assert f"line {at + 1} " in broken(
            tmp_path / "c", [*lines[:at], canonical_json(changed) + b"\n", *lines[at + 1 :]]
        )
    for changed in ({**record, "more": 1}, {n: v for n, v in record.items() if n != "bytes"}):
        assert f"line {at + 1} " in broken(
            tmp_path / "c", [*lines[:at], canonical_json(changed) + b"\n", *lines[at + 1 :]]
        )
    spaced = json.dumps(record, sort_keys=True).encode() + b"\n"  # the same record in another form
    assert "form it was written in" in broken(tmp_path / "c", [*lines[:at], spaced, *lines[at + 1 :]])


@pytest.mark.parametrize("at", range(COUNT + 1))
def test_inserting_any_line_anywhere_is_found(tmp_path, lines, at):
    record = json.loads(lines[at - 1])
    record.update(n=at + 1, previous=head_of(lines[:at]).digest if at else "0" * 64)
    record.pop("signature")
    forged = {**record, "signature": sign(OTHER, chain.RECORD, canonical_json(record))}
    for line in (lines[at - 1], lines[at // 2], canonical_json(record) + b"\n", canonical_json(forged) + b"\n", b"\n"):
        says = broken(tmp_path / "c", [*lines[:at], line, *lines[at:]])
        assert says.startswith((f"line {at + 1} ", "line 2 ")) if at == 0 else says.startswith(f"line {at + 1} ")


@pytest.mark.parametrize("at", range(COUNT))
def test_swapping_any_two_lines_is_found(tmp_path, lines, at):
    for other in range(at):
        swapped = list(lines)
        swapped[at], swapped[other] = lines[other], lines[at]
        assert f"line {other + 1} is record {at + 1}" in broken(tmp_path / "c", swapped)


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_no_bit_can_be_flipped(tmp_path_factory, lines, position, bit):
    data = bytearray(b"".join(lines))
    data[position % len(data)] ^= 1 << bit
    broken(tmp_path_factory.getbasetemp() / "flipped", [bytes(data)])


def test_not_even_the_unused_bits_of_a_signatures_text(tmp_path, lines):
    record = json.loads(lines[-1])
    text = record["signature"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = text[:-3] + letters[letters.index(text[-3]) ^ 1] + "=="
    assert base64.b64decode(other) == base64.b64decode(text)
    broken(tmp_path / "c", [*lines[:-1], canonical_json({**record, "signature": other}) + b"\n"])


def test_a_chain_made_anew_is_found(tmp_path, lines):
    again = make(tmp_path / "again", COUNT, OTHER)
    assert "line 1 does not have the signature of the key" in broken(tmp_path / "c", again)
    again = make(tmp_path / "same key", COUNT + 5)  # by the owner: only a head that was written down tells
    assert "made anew" in broken(tmp_path / "c", again, head=head_of(lines))
    unsigned = make(tmp_path / "unsigned", 3, None)
    assert "line 1 is not signed" in broken(tmp_path / "c", unsigned)
    verify(tmp_path / "unsigned")
    assert "line 3 does not follow line 2" in broken(
        tmp_path / "c", [unsigned[0], unsigned[1].replace(b"get", b"put"), unsigned[2]], keys=()
    )


def test_a_key_may_be_changed(tmp_path):
    make(tmp_path / "c", 2)
    append(tmp_path / "c", 2, OTHER)
    verify(tmp_path / "c", (*PUBLIC, OTHER.public_key()))
    with pytest.raises(ChainError, match="line 3 does not have the signature"):
        verify(tmp_path / "c", PUBLIC)


def test_a_writer_killed_at_any_byte_leaves_a_chain_that_goes_on(tmp_path, lines):
    path, whole = tmp_path / "c", b"".join(lines[:3])
    for cut in range(1, len(lines[2])):
        path.write_bytes(whole[:-cut])
        if cut > 1:
            with pytest.raises(ChainError, match="line 3 is torn"):
                verify(path, PUBLIC)
        append(path, 3)
        found = [*records(path)]
        assert verify(path, PUBLIC).head.n == 3
        assert found[-1]["cut"] == len(lines[2]) - cut
    path.write_bytes(lines[0][:20])  # within the very first line
    append(path, 0)
    assert (verify(path, PUBLIC).name, next(records(path))["cut"]) == ("journal of site north", 20)


def test_a_writer_killed_while_it_cuts_leaves_the_cut_on_record(tmp_path, lines):
    """At any byte of the line that says so, and between writing it and cutting off the rest of the torn one."""
    path, torn = tmp_path / "c", b"x" * 700
    path.write_bytes(lines[0] + torn)
    append(path, 1)
    line = path.read_bytes()[len(lines[0]) :]
    for written in range(len(line) + 1):
        path.write_bytes(lines[0] + line[:written] + torn[written:])
        append(path, 2)
        assert verify(path, PUBLIC).head.n == (3 if written == len(line) else 2)
        assert "cut" in [*records(path)][-1]


def test_what_is_no_chain_is_left_alone(tmp_path):
    path = tmp_path / "c"
    for content in (b"hello\n", b"[1]\n", b"x" * 300_000, b'{"n":true}\n', b"[" * 60_000 + b"\n"):
        path.write_bytes(content)
        with pytest.raises(ChainError):
            append(path, 0)
        assert path.read_bytes() == content
    assert "longer than any record" in broken(path, [b"x" * 300_000])
    assert "can't read it" in broken_file(tmp_path / "none")


def broken_file(path: Path) -> str:
    with pytest.raises(ChainError) as caught:
        verify(path)
    return str(caught.value)


def write_some(path: str, count: int) -> None:
    for number in range(count):
        append(Path(path), number, None)


def test_several_processes_write_one_chain(tmp_path):
    path = tmp_path / "c"
    context = get_context("spawn")
    writers = [context.Process(target=write_some, args=(str(path), 25)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(path).head.n == 75


def test_a_chain_is_verified_by_sha256_and_an_ed25519_tool_alone(tmp_path, lines):
    """The recipe of docs/records.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text("utf-8")
    recipe = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "recipe.py").write_text(recipe, "utf-8")
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(lines))
    command = [sys.executable, "-I", "recipe.py", "journal.jsonl", public_text(KEY.public_key())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(head_of(lines)) in done.stdout
    path.write_bytes(b"".join([*lines[:4], lines[4].replace(b'"bytes":4', b'"bytes":5'), *lines[5:]]))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("jq")), reason="needs openssl and jq")
def test_one_line_is_verified_by_shell_tools(tmp_path, lines):
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text("utf-8")
    recipe = page.split("```bash\n")[1].split("```")[0]
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "key.pub").write_text(public_text(KEY.public_key()) + "\n")
    done = subprocess.run(["bash", "-ec", recipe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Verified Successfully" in done.stdout
    assert head_of(lines).digest in done.stdout
