"""Journal and ledger of a relay between enrolled sides: verifiable, complete, without a word about the images."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from tests.federation.deployment import FEW_CASES
from tests.federation.loopback import LoopbackCourier, lift_guard
from tests.federation.plans import tiny_plan
from tests.federation.test_desk import CONFIG, fail, hand_off
from tests.federation.test_signatures import SignedCourier
from tests.server.releases import audited_of, release_of
from typer.testing import CliRunner

from invcoss_common import chain
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.chain import records, verify
from invcoss_common.errors import ChainError, CredentialError, PlanError, SiteError, WeightsError
from invcoss_common.keys import load_signing_key, public_text
from invcoss_common.phantoms import write_phantoms
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import Request, to_bytes
from invcoss_server import cli as server_cli
from invcoss_server import state as state_module
from invcoss_server.courier import deliver, wait
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.relay import relay
from invcoss_server.runs import add_run, open_run, skip_site
from invcoss_server.signatures import load_signatures
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site import cli as site_cli
from invcoss_site.desk import answer
from invcoss_site.enrol import init_site, join
from invcoss_site.home import load_home, write_home
from invcoss_site.policy import POLICY
from invcoss_site.visit import visit

PLAN = tiny_plan(simulation={})


def site_folder(root, name):
    return root / "sites" / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A consortium with two sites, and a run of both."""
    root = tmp_path_factory.mktemp("records")
    init_consortium(root / "chest", "chest", ("localhost",), 9443)
    for stage in PLAN.stages:
        write_phantoms(root / "images" / stage.site, stage.modality, 12, 0)
        write_atomic(site_folder(root, stage.site) / POLICY, FEW_CASES)
        request = init_site(site_folder(root, stage.site), stage.site, root / "images" / stage.site)
        join(site_folder(root, stage.site), enrol_site(root / "chest", request.to_bytes()).to_bytes())
    run = add_run(root / "chest", PLAN)
    courier = SignedCourier(
        {site: load_home(site_folder(root, site)) for site in PLAN.sites}, load_signatures(root / "chest")
    )
    courier.start_work = LoopbackCourier({}, visit).start_work
    relay(PLAN, courier, run.folder, synthesise_here)
    return root


def key_of(root, site):
    return load_signing_key(site_folder(root, site) / "keys" / "signing.pem").public_key()


def ledger_of(root):
    return [*records(root / "chest" / "runs" / "tiny" / "ledger.jsonl")]


def record_site(stage):
    return PLAN.stages[stage].site


def test_the_ledger_has_every_step_once(finished):
    found = ledger_of(finished)
    assert [(r["stage"], r["state"]) for r in found if r["kind"] == "stage"] == [
        (stage, state) for stage in range(2) for state in ("visiting", "received", "inverting", "auditing", "released")
    ]
    hops = ["s00-train", "s00-audit", "s01-train", "s01-audit", "s01-eval-00"]
    assert [r["hop"] for r in found if r["kind"] == "hand-off"] == hops
    assert [r["hop"] for r in found if r["kind"] == "accepted"] == hops
    assert [r["entry"] for r in found] == list(range(1, len(found) + 1))
    assert Counter(r["kind"] for r in found) == {
        "run": 1, "order": 1, "stage": 10, "produced": 2, "hand-off": 5, "accepted": 5, "released-pool": 2
    }  # fmt: skip
    state = open_run(finished / "chest", "tiny").state
    assert [r["pool"] for r in found if r["kind"] == "produced"] == [state.stage(n).pool.sha256 for n in range(2)]
    for number, record in enumerate(r for r in found if r["kind"] == "released-pool"):
        audited = state.audited(state.stage(number))
        assert (record["stage"], record["pool"]) == (number, state.stage(number).pool.sha256)
        assert (record["released"], record["dropped"]) == (audited.released.sha256, 0)
        assert (
            record["report"]
            == next(r for r in found if r.get("hop") == f"s0{number}-audit" and "report" in r)["report"]
        )
        load_signatures(finished / "chest").check(record_site(number), audited.content, audited.signature)


def test_journals_hold_what_the_ledger_says_and_all_that_left(finished):
    accepted = {r["report"]: r for r in ledger_of(finished) if r["kind"] == "accepted"}
    left = {}
    for site in PLAN.sites:
        path = site_folder(finished, site) / "journal.jsonl"
        assert verify(path, [key_of(finished, site)]).name == f"journal of site {site}"
        journal = [*records(path)]
        left |= {r["report"]: site for r in journal if r["kind"] == "answered" and "report" in r}
        for kind in ("accepted", "begun", "done"):
            assert [r["hop"] for r in journal if r["kind"] == kind] == [
                r["hop"] for r in accepted.values() if r["site"] == site
            ]
        for report in (r for r in accepted.values() if r["site"] == site):
            fetched = [r for r in journal if r["kind"] == "answered" and r["verb"] == "get"]
            assert {r["artefact"] for r in fetched} >= set(report["artefacts"])
            hand_offs = {r["handoff"] for r in ledger_of(finished) if r["kind"] == "hand-off"}
            assert all(r["handoff"] in hand_offs for r in journal if "handoff" in r)
        audits = [r for r in journal if r["kind"] == "audited"]
        released = [r for r in ledger_of(finished) if r["kind"] == "released-pool" and record_site(r["stage"]) == site]
        same = ("pool", "released", "dropped")
        assert [[r[name] for name in same] for r in audits] == [[r[name] for name in same] for r in released]
        assert [(r["run"], r["images"]) for r in audits] == [("tiny", 4)]
    assert left == {digest: record["site"] for digest, record in accepted.items()}


def test_nothing_of_the_images_is_in_them(finished):
    names = {path.name for path in (finished / "images").rglob("*") if path.is_file()}
    assert len(names) > 20
    words = names | {name.partition(".")[0] for name in names} - {"labels"} | {str(finished), "/images", ".pem"}
    for path in finished.rglob("*.jsonl"):
        if path.name in ("journal.jsonl", "ledger.jsonl"):
            text = path.read_text("utf-8")
            assert [word for word in words if word in text] == []


def command(app, *arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_both_commands_show_and_verify(finished, tmp_path):
    server, site, folder = server_cli.app, site_cli.app, site_folder(finished, "ct-site")
    key = public_text(key_of(finished, "ct-site"))
    assert "released" in command(server, "ledger", finished / "chest", "tiny")
    shown = command(site, "journal", folder, "--last", 3).splitlines()
    assert len(shown) == 3 and "verb status, hop s01-audit, state done" in shown[-1]
    newest = json.loads(command(site, "journal", folder, "--last", 1, "--json"))
    told = json.loads(command(site, "verify", folder, "--json"))
    assert (told["records"], told["signed"]) == (newest["n"], True)
    assert "records hold, each signed" in command(server, "verify", finished / "chest", "tiny")
    for app in (server, site):
        for given in (key, tmp_path / "key.pub"):
            (tmp_path / "key.pub").write_text(f"{key}\n")
            command(app, "verify-chain", folder / "journal.jsonl", "--key", given, "--head", told["head"])
        assert "NOT CHECKED" in command(app, "verify-chain", folder / "journal.jsonl")
        with pytest.raises(ChainError, match="truncated"):
            command(app, "verify-chain", folder / "journal.jsonl", "--head", f"9999:{'0' * 64}")
        with pytest.raises(ChainError, match="not a head"):
            command(app, "verify-chain", folder / "journal.jsonl", "--head", "9")
        with pytest.raises(ChainError, match="line 1 does not have the signature"):
            command(app, "verify-chain", folder / "journal.jsonl", "--key", public_text(key_of(finished, "xray-site")))
        with pytest.raises(CredentialError, match="signing key, not the node's"):
            command(app, "verify-chain", folder / "journal.jsonl", "--key", folder / "keys" / "node.pub")
        with pytest.raises(CredentialError, match="nor a file"):
            command(app, "verify-chain", folder / "journal.jsonl", "--key", "nowhere")
    with pytest.raises(PlanError):
        command(server, "verify", finished / "chest", "another")


def test_a_lost_ledger_is_written_again_to_the_bit(finished, tmp_path):
    run = open_run(finished / "chest", "tiny")
    path = run.folder / "ledger.jsonl"
    before = path.read_bytes()
    for kept in (b"", before[: len(before) // 2], b"".join(before.splitlines(keepends=True)[:7])):
        path.unlink()
        path.write_bytes(kept)
        run.state.write_ledger()
        again = [*records(path)]
        assert [r["entry"] for r in again] == list(range(1, len(again) + 1))
        if kept.endswith(b"\n") or not kept:
            assert path.read_bytes() == before
    path.write_bytes(before)


# A coordinator killed between state and ledger


class Killed(BaseException):
    """Stands for the end of a process."""


def steps(artefact, handoff, audited):
    """All that changes a state, in some order."""
    return [
        lambda state: state.want("running"),
        lambda state: state.move(0, "visiting"),
        lambda state: state.keep_hand_off(handoff) if state.hand_off(handoff.hop) is None else None,
        lambda state: state.move(0, "received", model=artefact, statistics=artefact),
        lambda state: state.move(0, "inverting"),
        lambda state: state.move(0, "inverting", pool=artefact, inversion_s=1.5),
        lambda state: state.move(0, "failed", error="SiteError"),
        lambda state: state.move(0, "auditing"),
        lambda state: state.keep_audit(0, audited) if state.audited(state.stage(0)) is None else None,
        lambda state: state.move(0, "released"),
        lambda state: state.skip("ct-site"),
        lambda state: state.move(1, "skipped"),
    ]


@pytest.mark.parametrize("at", range(12))
def test_killed_between_state_and_ledger_every_entry_is_there_once(tmp_path, monkeypatch, at):
    store = ArtefactStore(tmp_path / "store")
    artefact, handoff = store.put(pool_to_bytes(np.zeros((3, 1, 4, 4), np.uint8))), hand_off(store)
    audited = audited_of(PLAN, release_of(store, artefact, (1,)))
    real = state_module.write_ledger

    def dies(*arguments):
        raise Killed

    for number, step in enumerate(steps(artefact, handoff, audited)):
        state = RunState(tmp_path / "state.db", PLAN)
        if number == at:
            monkeypatch.setattr(state_module, "write_ledger", dies)
            with pytest.raises(Killed):
                step(state)
            monkeypatch.setattr(state_module, "write_ledger", real)
            if at % 2:  # else the next step brings it up to date
                RunState(tmp_path / "state.db", PLAN).write_ledger()
        else:
            step(state)
    RunState(tmp_path / "state.db", PLAN).write_ledger()
    found = [*records(tmp_path / "ledger.jsonl")]
    assert verify(tmp_path / "ledger.jsonl").name == "ledger of run tiny"
    assert [r["entry"] for r in found] == list(range(1, 14))
    assert [(r["stage"], r["state"]) for r in found if r["kind"] == "stage"] == [
        *((0, s) for s in ("visiting", "received", "inverting", "failed", "auditing", "released")),
        (1, "skipped"),
    ]


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_killed_while_it_writes_the_ledger_goes_on(tmp_path, monkeypatch, at):
    """At some byte of each of several lines: the file is left as a kill leaves it, and the run goes on."""
    real, written = chain._write, []

    def dies(descriptor, data, place):
        written.append(place)
        if len(written) == 1 + at % 4:
            real(descriptor, data[: 1 + at * 5 % (len(data) - 1)], place)
            raise Killed
        real(descriptor, data, place)

    monkeypatch.setattr(chain, "_write", dies)
    for _ in range(2):
        state = RunState(tmp_path / "state.db", PLAN)
        try:
            for stage in range(3):
                for moved in ("visiting", "released"):
                    if state.stage(stage).state != "released":
                        state.move(stage, moved)
        except Killed:
            continue
    state.write_ledger()
    found = [*records(tmp_path / "ledger.jsonl")]
    verify(tmp_path / "ledger.jsonl")
    assert [r["entry"] for r in found] == list(range(1, 8))
    assert Counter(r["stage"] for r in found if r.get("state") == "released") == {0: 1, 1: 1, 2: 1}
    assert sum("cut" in r for r in found) == 1


def test_a_state_from_a_backup_is_noticed(tmp_path):
    RunState(tmp_path / "state.db", PLAN).move(0, "visiting")
    backup = (tmp_path / "state.db").read_bytes()
    RunState(tmp_path / "state.db", PLAN).move(0, "released")
    (tmp_path / "state.db").write_bytes(backup)
    with pytest.raises(ChainError, match="ahead of the run's state"):
        RunState(tmp_path / "state.db", PLAN).write_ledger()


def test_orders_and_refusals_are_in_the_ledger(finished, tmp_path):
    init_consortium(tmp_path / "c", "c", ("localhost",), 9443)
    out = tmp_path / "c" / "runs" / "tiny"
    state = RunState(out / "state.db", PLAN)
    for wanted in ("paused", "stopped", "running"):
        state.want(wanted)
    skip_site(open_run(tmp_path / "c", "tiny"), "ct-site")
    handoff = hand_off(ArtefactStore(tmp_path / "store"))
    state.refuse(handoff, None, "CredentialError")
    found = [*records(out / "ledger.jsonl")]
    orders = [r["order"] for r in found if r["kind"] == "order"]
    assert orders == ["paused", "stopped", "running", "skip-site", "running"]
    assert (found[-1]["kind"], found[-1]["error"], found[-1]["site"]) == ("refused", "CredentialError", "north")
    verify(out / "ledger.jsonl", [load_signing_key(tmp_path / "c" / "pki" / "coordinator.pem").public_key()])


def test_a_refused_report_is_in_the_ledger_with_its_digest(tmp_path, monkeypatch):
    from tests.federation.test_relay import run as run_relay
    from tests.federation.test_relay import spoiling, with_nan

    lift_guard(monkeypatch)
    plan = tiny_plan(("xray",))
    with pytest.raises(WeightsError):
        run_relay(plan, tmp_path, visit=spoiling(with_nan))
    refused, failed = [*records(tmp_path / "ledger.jsonl")][-2:]
    assert (refused["kind"], refused["error"]) == ("refused", "WeightsError")
    assert (failed["kind"], failed["state"], failed["error"]) == ("stage", "failed", "WeightsError")
    journal = [*records(tmp_path / "sites" / "xray-site" / "journal.jsonl")]
    assert refused["report"] in [r.get("report") for r in journal if r["kind"] == "answered"]


# The desk


@pytest.fixture
def home(tmp_path):
    return write_home(tmp_path / "north", "north", tmp_path / "images")


@pytest.fixture
def store(tmp_path):
    return ArtefactStore(tmp_path / "coordinator")


def journal_of(home):
    return [*records(home.root / "journal.jsonl")]


def nothing(home, hop):
    pass


def test_a_failure_and_a_refusal_are_journalled_by_class_only(home, store):
    courier, handoff = LoopbackCourier({"north": home}, fail), hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    with pytest.raises(SiteError):
        wait(courier, "north", handoff, CONFIG, lambda status: None)
    secret = "/data/patient-0042.dcm"
    for fields in ({"hop": secret}, {"hop": "s00-train\n"}):
        assert answer(Request("status", fields), home, nothing).fields == {"error": "ProtocolError"}
    get = {"sha256": "a" * 64, "size": 5, "offset": 0, "length": 5, "encoding": ""}
    answer(Request("get", get), home, nothing)
    answer(Request("start", {"handoff": secret, "attempt": 1}), home, nothing)
    found = journal_of(home)
    assert [(r["hop"], r["error"]) for r in found if r["kind"] == "failed"] == [("s00-train", "DataError")]
    assert [r["verb"] for r in found if r["kind"] == "refused"] == ["status", "get", "start"]  # the same one but once
    text = (home.root / "journal.jsonl").read_text()
    assert "patient" not in text and str(home.root) not in text
    assert found[-1]["handoff"] == sha256_hex(secret.encode())


def test_a_poll_without_news_is_not_journalled_again(home, store):
    courier, handoff = LoopbackCourier({"north": home}, fail), hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    for _ in range(5):
        courier.call("north", Request("status", {"hop": handoff.hop}))
    polls = [r for r in journal_of(home) if r.get("verb") == "status"]
    assert [(r["hop"], r["state"]) for r in polls] == [("s00-train", "failed")]
    (home.hop_folder(handoff.hop) / "status.json").unlink()
    courier.call("north", Request("status", {"hop": handoff.hop}))
    assert [r["state"] for r in journal_of(home) if r.get("verb") == "status"] == ["failed", "unknown"]


def test_a_message_that_cannot_be_read_is_journalled(home):
    from flwr.app import ConfigRecord, RecordDict
    from tests.federation.loopback import site_of_today

    site_of_today(RecordDict({"ctl": ConfigRecord({"verb": "run", "code": "patient-0042"})}), home, nothing)
    assert [(r["kind"], r["error"]) for r in journal_of(home)] == [("refused", "ProtocolError")]
    assert "patient" not in (home.root / "journal.jsonl").read_text()


@pytest.mark.parametrize("content", [b"not a journal\n", None])
def test_what_can_not_be_journalled_does_not_leave(home, store, content):
    courier, handoff = LoopbackCourier({"north": home}, fail), hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    journal = home.root / "journal.jsonl"
    journal.unlink()
    if content is None:
        journal.mkdir()  # as a full disk or a lack of permission
    else:
        journal.write_bytes(content)
    error = "OSError" if content is None else "ChainError"
    status = Request("status", {"hop": handoff.hop})
    for request in (Request("hello"), status, Request("get", {}), Request("purge", {"keep": ""})):
        assert answer(request, home, nothing).fields == {"error": error}
    answered = answer(Request("start", {"handoff": to_bytes(handoff).decode(), "attempt": 9}), home, nothing)
    assert answered.fields == {"error": error}
