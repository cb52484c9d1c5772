"""What stands between a hand-off in the spool and its work: whose it is, the policy, the hours, and a person's word.

The spool is written by the network-facing side; here it is also written by nobody's leave.
"""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from tests.federation.test_desk import double, hand_off
from tests.site_client.test_agent import look_until
from typer.testing import CliRunner

from invcoss_common.canonical import write_atomic
from invcoss_common.chain import records
from invcoss_common.errors import CredentialError, DataError, NotApproved, ProtocolError
from invcoss_common.keys import generate_signing_key, public_text, sign
from invcoss_common.records import HANDOFF, Request, Status, from_bytes, to_bytes
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.signatures import load_signatures
from invcoss_site import agent as agent_module
from invcoss_site import approval, cli
from invcoss_site.agent import Agent
from invcoss_site.approval import admit, decide, digest_of, pending
from invcoss_site.desk import answer
from invcoss_site.enrol import init_site, join
from invcoss_site.handoffs import keep, kept
from invcoss_site.home import load_home
from invcoss_site.policy import POLICY
from invcoss_site.work import AGENT_LOCK, take_lock, work

HOP = "s00-train"
APPROVAL = "[trust]\napproval = true\n"
LATER = time.strftime("%H:%M", time.localtime(time.time() + 7200))
LATER_STILL = time.strftime("%H:%M", time.localtime(time.time() + 10800))
NOT_NOW = f'[work]\nhours = "{LATER}-{LATER_STILL}"\n'


@pytest.fixture
def key(tmp_path):
    """The coordinator's."""
    init_consortium(tmp_path / "chest", "chest", ("localhost",), 9443)
    return load_signatures(tmp_path / "chest").key


@pytest.fixture
def home(tmp_path, key):
    """A site that joined, with an agent that looks after its spool."""
    (tmp_path / "images").mkdir()
    request = init_site(tmp_path / "north", "north", tmp_path / "images")
    join(tmp_path / "north", enrol_site(tmp_path / "chest", request.to_bytes()).to_bytes())
    home = load_home(tmp_path / "north")
    home.spool.mkdir()
    (home.spool / AGENT_LOCK).touch()
    return home


@pytest.fixture
def lies_in_spool(home, key):
    """`lies_in_spool(**changes)` is a hand-off that was put there; `signature` and `status` may be other ones."""

    def put(hop=HOP, signature=None, status=None, content=None, **changes):
        handoff = hand_off(home.artefacts, sequence=1, hop=hop, **changes)
        content = content or to_bytes(handoff)
        keep(home, handoff, content, sign(key, HANDOFF, content) if signature is None else signature)
        write_atomic(home.hop_folder(hop) / "status.json", to_bytes(status or Status(state="queued")))
        write_atomic(home.hop_folder(hop) / "attempt", b"1")
        return handoff

    return put


def set_policy(home, text):
    write_atomic(home.root / POLICY, text.encode())


def status_of(home, hop=HOP):
    return from_bytes(Status, (home.hop_folder(hop) / "status.json").read_bytes())


def worked(home, visit, hop=HOP):
    """How the worker of a hop ends, and whether it came to the visit."""
    visits = []

    def counted(handoff, home, on_status):
        visits.append(handoff)
        return visit(handoff, home, on_status)

    lock = take_lock(home, hop)
    try:
        return work(home, hop, counted), bool(visits)
    finally:
        os.close(lock)


def breaks(handoff, home, on_status):
    raise DataError("here the visit begins")


# What nobody signed


def other_key(content):
    return sign(generate_signing_key(), HANDOFF, content)


FORGED = {
    "no signature": {"signature": ""},
    "not base64": {"signature": "%%%"},
    "of another hand-off": {"signature": other_key(b"{}")},
    "one that trains on": {"signature": "", "status": Status(state="running", phase="training", step=5, steps=9)},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_hand_off_that_was_forged_into_the_spool_fails_unused(home, lies_in_spool, case):
    lies_in_spool(**FORGED[case])
    with pytest.raises(CredentialError, match="lacks the signature of the coordinator"):
        admit(home, HOP)
    final, visited = worked(home, double)
    assert (final.state, final.error, visited) == ("failed", "CredentialError", False)
    assert not (home.hop_folder(HOP) / "report.json").exists()


def test_one_signed_by_another_key_fails_until_the_policy_names_that_key(home, lies_in_spool):
    other = generate_signing_key()
    content = to_bytes(hand_off(home.artefacts, sequence=1))
    lies_in_spool(signature=sign(other, HANDOFF, content))
    assert worked(home, breaks)[1] is False
    set_policy(home, f'[trust]\ncoordinators = ["{public_text(other.public_key())}"]\n')
    assert admit(home, HOP)[1] is None
    lies_in_spool()  # and still takes those of the coordinator that it joined
    assert admit(home, HOP)[1] is None


def test_a_signed_hand_off_of_another_hop_or_site_fails(home, lies_in_spool, key):
    other = to_bytes(hand_off(home.artefacts, sequence=1, hop="s03-train"))
    lies_in_spool(content=other)
    with pytest.raises(ProtocolError, match="is s03-train for site 'north'"):
        admit(home, HOP)
    lies_in_spool(receiver="south")
    with pytest.raises(ProtocolError, match="for site 'south'"):
        admit(home, HOP)


def test_a_model_that_was_exchanged_in_the_spool_is_found_and_removed(home, lies_in_spool):
    handoff = lies_in_spool()
    path = home.artefacts.path(handoff.model)
    path.write_bytes(bytes(handoff.model.size_bytes))
    final, visited = worked(home, double)
    assert (final.error, visited, path.exists()) == ("ProtocolError", False, False)


def test_the_agent_has_a_forged_hand_off_fail_by_a_real_worker(home, lies_in_spool):
    lies_in_spool(signature="")
    agent = Agent(home)
    look_until(agent, lambda: status_of(home).state == "failed")
    agent.end()
    assert status_of(home).error == "CredentialError"
    assert "lacks the signature" in (home.log / "visit.log").read_text()
    assert [r["error"] for r in records(home.root / "journal.jsonl") if r["kind"] == "failed"] == ["CredentialError"]


# The policy, at the desk and in the worker


def asked_to_start(home, key, **changes):
    handoff = hand_off(home.artefacts, sequence=1, **changes)
    content = to_bytes(handoff)
    fields = {"handoff": content.decode(), "attempt": 1, "signature": sign(key, HANDOFF, content)}
    return answer(Request("start", fields), home, lambda home, hop: None).fields


def test_the_desk_refuses_at_once_and_leaves_what_lies_there(home, key, lies_in_spool):
    lies_in_spool(status=Status(state="failed", error="DataError"), plan_digest="1" * 64)
    set_policy(home, "[work]\nmax_steps = 1\n")
    assert asked_to_start(home, key) == {"error": "LimitExceeded"}
    assert "max_steps in policy.toml is 1" in (home.log / "desk.log").read_text()
    assert kept(home, HOP).plan_digest == "1" * 64
    set_policy(home, "")
    assert asked_to_start(home, key) == {"state": "queued"}


def test_a_desk_that_may_not_read_the_policy_leaves_it_to_the_worker(home, key, monkeypatch):
    set_policy(home, "[work]\nmax_steps = 1\n")
    monkeypatch.setattr("invcoss_site.policy.os.access", lambda path, mode: False)
    assert asked_to_start(home, key) == {"state": "queued"}
    final, visited = worked(home, double)
    assert (final.error, visited) == ("LimitExceeded", False)


def test_a_broken_policy_lets_nothing_begin(home, key, lies_in_spool):
    set_policy(home, "[work]\nmax_step = 1\n")
    assert asked_to_start(home, key) == {"error": "DataError"}
    lies_in_spool()
    assert worked(home, double)[0].error == "DataError"


def test_a_start_that_is_sent_again_is_answered_as_before_when_the_policy_has_changed(home, key):
    assert asked_to_start(home, key) == {"state": "queued"}
    set_policy(home, "[work]\nmax_steps = 1\n")
    assert asked_to_start(home, key) == {"state": "queued"}  # the worker will say no


@pytest.mark.parametrize("verb", ["have", "put"])
def test_no_artefact_is_taken_that_no_hand_off_may_have(home, verb):
    set_policy(home, "[work]\nmax_disk_gb = 0.001\n")
    fields = {"sha256": "a" * 64, "size": 1_000_001}
    fields |= {"offset": 0, "encoding": ""} if verb == "put" else {}
    blob = b"x" if verb == "put" else b""
    assert answer(Request(verb, fields, blob), home, lambda *_: None).fields == {"error": "LimitExceeded"}
    assert list(home.artefacts.folder.iterdir()) == []


def test_work_that_takes_too_long_fails_and_counts_from_its_first_start(home, lies_in_spool):
    lies_in_spool()
    set_policy(home, "[work]\nmax_hours = 1\n")

    def slow(handoff, home, on_status):
        on_status(Status(state="running", phase="training", step=1, steps=9))
        raise DataError("killed")

    assert worked(home, slow)[0].error == "DataError"
    began = home.hop_folder(HOP) / approval.BEGAN
    assert abs(float(began.read_text()) - time.time()) < 60
    began.write_text(str(time.time() - 3590))
    assert worked(home, slow)[0].error == "DataError"
    began.write_text(str(time.time() - 3601))
    final, visited = worked(home, slow)
    assert (final.error, visited) == ("LimitExceeded", True)


# The hours


def test_outside_its_hours_a_hop_waits_and_what_has_begun_goes_on(home, lies_in_spool, workers):
    set_policy(home, NOT_NOW)
    lies_in_spool()
    agent = Agent(home)
    agent.look()
    assert (status_of(home), workers) == (Status(state="queued", phase="hours"), [])
    (home.hop_folder(HOP) / approval.BEGAN).write_text(str(time.time()))
    agent.look()
    assert workers == [HOP]


# A person's word


@pytest.fixture
def workers(monkeypatch):
    """Names of the hops that the agent has started a worker for, which then do nothing."""
    started = []
    monkeypatch.setattr(agent_module, "start_process", lambda home, hop: started.append(hop))
    return started


def test_a_hop_waits_for_a_person_and_begins_with_their_word(home, lies_in_spool, workers):
    set_policy(home, APPROVAL)
    handoff = lies_in_spool()
    agent = Agent(home)
    for _ in range(3):
        agent.look()
    assert (status_of(home), workers) == (Status(state="queued", phase="approval"), [])
    assert [one.handoff for one in pending(home)] == [handoff]
    decide(home, HOP, "approved")
    assert list(pending(home)) == []
    agent.look()
    assert workers == [HOP]


def test_other_hops_go_ahead_of_one_that_waits(home, lies_in_spool, workers):
    set_policy(home, APPROVAL)
    lies_in_spool()
    task = hand_off(home.artefacts).task.model_copy(update={"kind": "evaluate"})
    lies_in_spool(hop="s01-eval-00", task=task)
    Agent(home).look()
    assert workers == ["s01-eval-00"]
    assert status_of(home).phase == "approval"


def test_every_kind_waits_that_the_policy_says(home, lies_in_spool):
    set_policy(home, APPROVAL + 'approve_kinds = ["evaluate"]\n')
    task = hand_off(home.artefacts).task.model_copy(update={"kind": "evaluate"})
    lies_in_spool(hop="s01-eval-00", task=task)
    lies_in_spool()
    assert (admit(home, "s01-eval-00")[1], admit(home, HOP)[1]) == ("approval", None)


def test_a_status_of_running_is_no_way_round_a_person(home, lies_in_spool, workers):
    set_policy(home, APPROVAL)
    lies_in_spool(status=Status(state="running", phase="training", step=3, steps=9))
    (home.hop_folder(HOP) / approval.BEGAN).write_text("1.0")
    Agent(home).look()
    assert (workers, status_of(home).phase) == ([], "approval")


def test_a_no_lets_it_fail_and_a_later_yes_holds_for_the_next_attempt(home, key, lies_in_spool):
    set_policy(home, APPROVAL)
    lies_in_spool()
    decide(home, HOP, "denied")
    with pytest.raises(NotApproved, match="s00-train of run 'demo' was refused here"):
        admit(home, HOP)
    final, visited = worked(home, double)
    assert (final.state, final.error, visited) == ("failed", "NotApproved", False)
    decide(home, HOP, "approved")
    fields = {"attempt": 2, "handoff": (home.hop_folder(HOP) / "handoff.json").read_text()}
    fields["signature"] = (home.hop_folder(HOP) / "handoff.signature").read_text()
    assert answer(Request("start", fields), home, lambda *_: None).fields == {"state": "queued"}
    assert admit(home, HOP)[1] is None


def test_a_no_holds_also_where_nobody_has_to_be_asked(home, lies_in_spool):
    lies_in_spool()
    decide(home, HOP, "denied")
    with pytest.raises(NotApproved):
        admit(home, HOP)


def test_a_word_is_on_this_very_hand_off_only(home, lies_in_spool):
    set_policy(home, APPROVAL)
    first = lies_in_spool()
    decide(home, HOP, "approved", seen=digest_of(first)[:12])
    assert admit(home, HOP)[1] is None
    second = lies_in_spool(plan_digest="1" * 64)
    assert admit(home, HOP)[1] == "approval"
    with pytest.raises(DataError, match=f"s00-train is {digest_of(second)[:12]} by now"):
        decide(home, HOP, "approved", seen=digest_of(first)[:12])
    assert admit(home, HOP)[1] == "approval"


def test_what_lies_in_the_spool_decides_nothing(home, lies_in_spool):
    set_policy(home, APPROVAL)
    handoff = lies_in_spool()
    word = json.dumps({"word": "approved", "run": "demo", "hop": HOP}).encode()
    for folder in (home.spool, home.hop_folder(HOP)):
        write_atomic(folder / "approvals" / f"{digest_of(handoff)}.json", word)
    assert admit(home, HOP)[1] == "approval"


def test_words_are_journalled_in_nobody_s_name(home, lies_in_spool):
    set_policy(home, APPROVAL)
    handoff = lies_in_spool()
    decide(home, HOP, "denied")
    decide(home, HOP, "approved")
    found = [r for r in records(home.root / "journal.jsonl") if r["kind"] in ("approved", "denied")]
    assert [r["kind"] for r in found] == ["denied", "approved"]
    assert set(found[0]) - {"n", "time", "previous", "chain", "signature"} == {"kind", "run", "hop", "handoff"}
    assert {(r["run"], r["hop"], r["handoff"]) for r in found} == {("demo", HOP, digest_of(handoff))}


@pytest.mark.parametrize("state", ["running", "done"])
def test_nothing_is_decided_about_what_is_under_way(home, lies_in_spool, state):
    lies_in_spool(status=Status(state=state))
    with pytest.raises(DataError, match=f"s00-train is {state} already"):
        decide(home, HOP, "denied")
    with pytest.raises(DataError, match="no hand-off s05-train is here"):
        decide(home, "s05-train", "approved")


def test_a_forged_hand_off_is_not_shown_and_can_t_be_approved(home, lies_in_spool):
    set_policy(home, APPROVAL)
    lies_in_spool(signature="")
    assert list(pending(home)) == []
    with pytest.raises(CredentialError):
        decide(home, HOP, "approved")


def test_without_an_agent_the_worker_waits_itself(home, lies_in_spool, monkeypatch):
    monkeypatch.setattr(approval, "LOOK_S", 0.05)
    set_policy(home, APPROVAL)
    lies_in_spool()
    ended = []
    worker = threading.Thread(target=lambda: ended.append(worked(home, breaks)))
    worker.start()
    deadline = time.monotonic() + 30
    while status_of(home).phase != "approval":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ended == []
    decide(home, HOP, "approved")
    worker.join(30)
    assert [(final.error, visited) for final, visited in ended] == [("DataError", True)]


def test_a_coordinator_of_version_1_is_told_in_words_that_it_knows(home, lies_in_spool):
    lies_in_spool(status=Status(state="queued", phase="approval"))
    told = {
        version: json.loads(answer(Request("status", {"hop": HOP}, protocol=version), home, print).fields["status"])
        for version in (1, 2)
    }
    assert [(told[v]["state"], told[v]["phase"]) for v in (1, 2)] == [("queued", "reading"), ("queued", "approval")]


def command(*arguments):
    done = CliRunner().invoke(cli.app, [*map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_commands(home, lies_in_spool, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    set_policy(home, APPROVAL + "[work]\nmax_parameters = 1000\n")
    assert command("pending", home.root) == "nothing waits for approval\n"
    assert json.loads(command("pending", home.root, "--json")) == []
    digest = digest_of(lies_in_spool())
    (row,) = json.loads(command("pending", home.root, "--json"))
    assert {name: row[name] for name in ("hop", "run", "plan", "kind", "modality", "length", "pools", "handoff")} == {
        "hop": HOP, "run": "demo", "plan": "0" * 64, "kind": "train", "modality": "xray", "length": "2 steps",
        "pools": 0, "handoff": digest,
    }  # fmt: skip
    assert (row["parameters"], row["model_bytes"]) == (763_040, 2_560_000)
    assert row["policy"] == "LimitExceeded: 763,040 parameters, and [work] max_parameters in policy.toml is 1000"
    text = command("pending", home.root)
    assert "[work] max_parameters" in text  # which is no markup
    assert text.splitlines()[-1].startswith(f"invcoss-site approve {home.root} {HOP} --handoff {digest[:12]}")
    set_policy(home, APPROVAL)
    assert json.loads(command("pending", home.root, "--json"))[0]["policy"] == "allowed"

    told = json.loads(command("refuse", home.root, HOP, "--json"))
    assert told == {"hop": HOP, "run": "demo", "handoff": digest, "word": "denied"}
    said = command("approve", home.root, HOP, "--handoff", digest[:12])
    assert said == "s00-train of run demo is approved: its work begins within the policy's hours\n"
    assert admit(home, HOP)[1] is None
    with pytest.raises(DataError, match="by now"):
        command("approve", home.root, HOP, "--handoff", "abcdef")
