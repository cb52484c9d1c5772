"""A share of benchmarks/fuzz_trust.py: altered objects of every kind are refused as they should, each time the same."""

from __future__ import annotations

import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.security.fuzzing import judge as judging
from tests.security.fuzzing.containers import BOMB_BYTES
from tests.security.fuzzing.files import chain_kind
from tests.security.fuzzing.forgeries import chain_changes
from tests.security.fuzzing.judge import judge
from tests.security.fuzzing.kinds import kinds
from tests.security.fuzzing.mutations import altered_bytes, examples
from tests.security.fuzzing.sides import NORTH, STRANGER, Kind

from invcoss_common.errors import ChainError

COUNT = 100  # of each kind and way
KINDS = (
    "hand-off", "hand-off, own", "report", "report, own", "status", "request", "answer",
    "enrolment-request", "enrolment-request, own", "join-file", "join-file, own",
    "model", "statistics", "pool", "part", "journal", "ledger", "plan", "site.toml", "policy.toml", "bundle",
)  # fmt: skip


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    return kinds(tmp_path_factory.mktemp("sides"))


def test_every_kind_is_fuzzed_and_whole_objects_are_taken(received):
    assert tuple(received) == KINDS
    for name, kind in received.items():
        for original in kind.originals:
            verdict = judge(kind, original)
            assert (verdict.outcome, verdict.failure) == ("taken", ""), name


@pytest.mark.parametrize("name", KINDS)
def test_bytes_altered_at_random(received, name):
    kind, refused = received[name], 0
    for number in range(COUNT):
        verdict = judge(kind, altered_bytes(kind.originals, Random(f"{name} {number}")))
        assert not verdict.failure, (number, verdict.failure, verdict.trace)
        refused += verdict.outcome != "taken"
    assert refused > COUNT / 2


@pytest.mark.parametrize("name", KINDS)
def test_objects_altered_by_who_knows_their_form(received, name):
    @settings(
        max_examples=COUNT, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(received[name].altered)
    def check(data: bytes) -> None:
        verdict = judge(received[name], data)
        assert not verdict.failure, (verdict.failure, verdict.trace)

    check()


def test_every_change_to_every_line_of_a_chain_is_found(tmp_path):
    kind, lines = chain_kind(tmp_path / "chain.jsonl", NORTH, 12)
    changes = list(chain_changes(lines, STRANGER))
    assert sum(what == "swapped" for what, _ in changes) == 12 * 11 / 2
    for what, changed in changes:
        verdict = judge(kind, b"".join(changed))
        assert (verdict.outcome, verdict.failure) == ("ChainError", ""), what


def test_the_same_seed_makes_the_same_mutations(received):
    for kind in received.values():
        assert examples(kind.altered, 7, 5) == examples(kind.altered, 7, 5)
        assert altered_bytes(kind.originals, Random("7")) == altered_bytes(kind.originals, Random("7"))
    assert examples(received["plan"].altered, 7, 5) != examples(received["plan"].altered, 8, 5)


# The judge itself


def stands_still(_data: bytes) -> None:
    time.sleep(9)


def takes_memory(_data: bytes) -> None:
    assert len(bytes(BOMB_BYTES)) == BOMB_BYTES


def refuses_in_two_lines(_data: bytes) -> None:
    raise ChainError("one\ntwo")


def refuses(_data: bytes) -> None:
    raise ChainError("no")


WRONG = {
    "takes an altered object": (lambda data: None, b"altered", "an altered object was taken"),
    "refuses a whole object": (refuses, b"whole", "a whole object was refused"),
    "crashes": (lambda data: int(data), b"altered", "ValueError"),
    "stands still": (stands_still, b"altered", "TimeoutError"),
    "takes too much memory": (takes_memory, b"altered", "MemoryError"),
    "refuses in two lines": (refuses_in_two_lines, b"altered", "not one short line"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_judge_sees_what_is_wrong(case, monkeypatch):
    monkeypatch.setattr(judging, "LONGEST_S", 0.2)
    receive, data, words = WRONG[case]
    assert words in judge(Kind((b"whole",), receive, st.binary(), (ChainError,), sealed=True), data).failure


def test_the_judge_lets_pass_what_is_right():
    kind = Kind((b"whole",), refuses, st.binary(), (ChainError,), sealed=True)
    assert judge(kind, b"altered").failure == ""
