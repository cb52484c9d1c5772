"""The desk behind the loopback courier: transfers continue, verbs may be repeated, nothing but the allowed leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from tests.federation.loopback import LoopbackCourier, lift_guard

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import EvaluateConfig, RelayConfig, ReplayConfig, TrainConfig
from invcoss_common.errors import DataError, ProtocolError, SiteError, SiteUnreachable
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.records import Artefact, HandOff, Report, Request, Response, Status, Task, to_bytes
from invcoss_common.wire import VERBS, decode_request, decode_response, encode_request, encode_response
from invcoss_server.courier import deliver, fetch, wait
from invcoss_site.desk import answer, hop_status
from invcoss_site.home import SiteHome, load_home, write_home
from invcoss_site.work import take_lock

HOP = "s00-train"
PART = 1 << 20
SECRET = "patient-0042.dcm"
CONFIG = RelayConfig(poll_s=0.01, stall_timeout_s=5, part_mib=1)
MODEL = bytes(range(256)) * 10_000


def hand_off(store: ArtefactStore, receiver: str = "north", **changes: object) -> HandOff:
    geometry = geometry_for(MODALITIES["xray"], "nano")
    task = Task(
        kind="train",
        stage=0,
        modality_name="xray",
        modality=MODALITIES["xray"],
        geometry=geometry,
        spacing_mm=None,
        model=SIZES["nano"].model,
        families=(geometry,),
        train=TrainConfig(steps=2),
        replay=ReplayConfig(),
        evaluate=EvaluateConfig(),
        seed=0,
        threads=1,
    )
    values = {"run": "demo", "hop": HOP, "receiver": receiver, "plan_digest": "0" * 64, "code_version": "0.1.0"}
    given: dict[str, object] = {**values, "task": task, "model": store.put(MODEL), "audited": True, **changes}
    if given.get("protocol") == 1:
        del given["audited"]
    return HandOff.model_validate(given)


def double(handoff: HandOff, home: SiteHome, on_progress: Callable[[Status], None]) -> Report:
    """A visit that answers with the model twice over."""
    model = home.artefacts.read(handoff.model, 0, handoff.model.size_bytes)
    on_progress(Status(state="running", step=1, steps=2))
    return Report(
        protocol=handoff.protocol,
        run=handoff.run,
        hop=handoff.hop,
        sender=home.name,
        plan_digest=handoff.plan_digest,
        code_version=handoff.code_version,
        model=home.artefacts.put(model * 2),
        metrics={"train_images": 2},
    )


def fail(handoff: HandOff, home: SiteHome, on_progress: Callable[[Status], None]) -> Report:
    raise DataError(f"{home.data / SECRET}: not an image")


@pytest.fixture(autouse=True)
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the visits here bring back is made up."""
    lift_guard(monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return write_home(tmp_path / "north", "north", tmp_path / "images")


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "coordinator")


def test_a_hop_is_delivered_waited_for_and_fetched(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, double)
    handoff = hand_off(store)
    seen: list[Status] = []

    sent = deliver(courier, "north", handoff, store, CONFIG)
    report = wait(courier, "north", handoff, CONFIG, seen.append)
    assert report.model is not None
    received = fetch(courier, "north", report.model, store, CONFIG)

    assert store.path(report.model).read_bytes() == MODEL * 2
    assert (sent, received) == (len(MODEL) + len(to_bytes(handoff)), 2 * len(MODEL))
    assert [status.state for status in seen] == ["done"]
    assert courier.calls.count(("north", "put")) == 3
    assert courier.calls.count(("north", "get")) == 5


def test_everything_may_be_repeated(home: SiteHome, store: ArtefactStore) -> None:
    visits = []

    def counted(handoff: HandOff, home: SiteHome, on_progress: Callable[[Status], None]) -> Report:
        visits.append(handoff.hop)
        return double(handoff, home, on_progress)

    courier = LoopbackCourier({"north": home}, counted)
    handoff = hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    assert deliver(courier, "north", handoff, store, CONFIG) == len(to_bytes(handoff))
    report = wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert report.model is not None
    fetch(courier, "north", report.model, store, CONFIG)
    assert fetch(courier, "north", report.model, store, CONFIG) == 0
    assert visits == [HOP]


def test_an_interrupted_transfer_continues_where_it_stands(home: SiteHome, store: ArtefactStore) -> None:
    class Breaks(LoopbackCourier):
        def call(self, site: str, request: Request) -> Response:
            response = super().call(site, request)
            if request.verb in ("put", "get") and self.calls.count((site, request.verb)) == 2:
                raise SiteUnreachable("the answer is lost")  # the site has acted on the request
            return response

    courier = Breaks({"north": home}, double)
    handoff = hand_off(store)
    with pytest.raises(SiteUnreachable):
        deliver(courier, "north", handoff, store, CONFIG)
    assert deliver(courier, "north", handoff, store, CONFIG) == len(MODEL) - 2 * PART + len(to_bytes(handoff))
    report = wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert report.model is not None
    with pytest.raises(SiteUnreachable):
        fetch(courier, "north", report.model, store, CONFIG)
    assert fetch(courier, "north", report.model, store, CONFIG) == 2 * len(MODEL) - PART
    assert store.has(report.model)


def test_only_the_class_of_an_error_leaves(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, fail)
    handoff = hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    with pytest.raises(SiteError, match="DataError") as caught:
        wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert SECRET not in str(caught.value)
    assert SECRET in (home.log / "visit.log").read_text()
    for file in (home.hop_folder(HOP)).iterdir():
        assert SECRET not in file.read_text()


def test_a_failed_hop_runs_again_in_a_new_attempt_only(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, fail)
    handoff = hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    healthy = LoopbackCourier({"north": home}, double)
    repeated = {"handoff": to_bytes(handoff).decode(), "attempt": 7, "signature": ""}
    first_failure = (home.hop_folder(HOP) / "attempt").read_text()
    assert (
        healthy.call("north", Request("start", repeated | {"attempt": int(first_failure)})).fields["state"] == "failed"
    )
    assert healthy.call("north", Request("start", repeated)).fields["state"] == "done"


def test_a_killed_worker_is_started_again(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, double)
    courier.start_work = lambda home, hop: None  # a worker that dies before it writes anything
    handoff = hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    assert hop_status(home, HOP) == Status(state="failed", error="WorkerKilled")
    healthy = LoopbackCourier({"north": home}, double)
    assert wait(healthy, "north", handoff, CONFIG, lambda status: None).sender == "north"
    with pytest.raises(SiteError, match="WorkerKilled"):
        courier.call("north", Request("purge", {"keep": handoff.model.sha256}))
        deliver(courier, "north", handoff, store, CONFIG)
        wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert courier.calls.count(("north", "start")) == 2 + CONFIG.attempts


def test_another_hand_off_of_the_same_name_starts_from_nothing(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, double)
    deliver(courier, "north", hand_off(store), store, CONFIG)
    (home.hop_folder(HOP) / "checkpoint").write_bytes(b"of the first")
    other = hand_off(store, plan_digest="1" * 64)
    deliver(courier, "north", other, store, CONFIG)
    assert not (home.hop_folder(HOP) / "checkpoint").exists()
    assert wait(courier, "north", other, CONFIG, lambda status: None).plan_digest == "1" * 64

    lock = take_lock(home, HOP)  # as a worker would
    assert lock is not None
    with pytest.raises(SiteError, match="HopBusy"):
        deliver(courier, "north", hand_off(store), store, CONFIG)
    os.close(lock)


def test_a_site_that_stops_progressing_is_given_up(home: SiteHome, store: ArtefactStore) -> None:
    class Away(LoopbackCourier):
        def call(self, site: str, request: Request) -> Response:
            raise SiteUnreachable("no answer")

    config = CONFIG.model_copy(update={"stall_timeout_s": 0.1})
    with pytest.raises(SiteError, match="stall_timeout_s"):
        wait(Away({"north": home}, double), "north", hand_off(store), config, lambda status: None)


def test_what_is_refused(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, double)
    with pytest.raises(SiteError, match="ProtocolError"):  # for another site
        deliver(courier, "north", hand_off(store, receiver="south"), store, CONFIG)
    undelivered = {
        "handoff": to_bytes(hand_off(store, model=Artefact(sha256="a" * 64, size_bytes=9))).decode(),
        "signature": "",
    }
    with pytest.raises(SiteError, match="ProtocolError"):
        courier.call("north", Request("start", undelivered | {"attempt": 1}))
    with pytest.raises(SiteError, match="ProtocolError"):  # the model lies in the store, but no report names it
        fetch(courier, "north", hand_off(store).model, ArtefactStore(home.root / "elsewhere"), CONFIG)
    for hop in ("../../etc", "s00-train/..", ""):
        with pytest.raises(SiteError, match="ProtocolError"):
            courier.call("north", Request("status", {"hop": hop}))
    assert courier.call("north", Request("status", {"hop": "s07-train"})).fields["report"] == ""
    assert not home.hop_folder("s07-train").exists()


def test_purge_leaves_what_is_kept(home: SiteHome, store: ArtefactStore) -> None:
    courier = LoopbackCourier({"north": home}, double)
    handoff = hand_off(store)
    deliver(courier, "north", handoff, store, CONFIG)
    courier.call("north", Request("purge", {"keep": handoff.model.sha256}))
    assert [path.name for path in home.artefacts.folder.iterdir()] == [handoff.model.sha256]
    courier.call("north", Request("purge", {"keep": ""}))
    assert list(home.artefacts.folder.iterdir()) == []
    deliver(courier, "north", handoff, store, CONFIG)  # done, but its result is gone: worked on again
    report = wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert report.model is not None and home.artefacts.has(report.model)


@pytest.mark.parametrize("version", VERBS)
def test_every_verb_survives_the_wire(version: int) -> None:
    samples: dict[type, str | int] = {str: "", int: 7}
    for verb, form in VERBS[version].items():
        blob = b"x" * 9 if form.part == "asks" else b""
        request = Request(verb, {k: samples[t] for k, t in form.asks.items()}, blob, 1 if verb == "hello" else version)
        assert decode_request(encode_request(request)) == request
        response = Response({k: samples[t] for k, t in form.answers.items()}, b"x" if form.part == "answers" else b"")
        assert decode_response(encode_response(response), request) == response
        failure = Response({"error": "DataError"})
        assert decode_response(encode_response(failure), request) == failure


RAW = Array("uint8", (3,), "raw.bytes", b"abc")
HELLO = ConfigRecord({"verb": "hello"})
STATUS = ConfigRecord({"verb": "status", "hop": HOP})


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"ctl": MetricRecord({"verb": 1})}),
        RecordDict({"ctl": ConfigRecord({"verb": "delete"})}),
        RecordDict({"ctl": ConfigRecord({"verb": "hello", "extra": 1})}),
        RecordDict({"ctl": ConfigRecord({"verb": "hello", "protocol": 2})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": HOP, "protocol": 0})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": HOP, "protocol": 3})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": HOP, "protocol": "2"})}),
        RecordDict({"ctl": ConfigRecord({"verb": "abort", "hop": HOP})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status"})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": 1})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": True})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": ["a"]})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": b"a"})}),
        RecordDict({"ctl": ConfigRecord({"verb": "status", "hop": "x" * (1 << 21)})}),
        RecordDict({"ctl": HELLO, "images": ArrayRecord({"part": RAW})}),
        RecordDict({"ctl": HELLO, "part": ArrayRecord({"part": RAW})}),
        RecordDict({"ctl": STATUS, "part": ConfigRecord({"a": 1})}),
        RecordDict({"ctl": STATUS, "part": ArrayRecord({"part": RAW, "more": RAW})}),
        RecordDict({"ctl": STATUS, "part": ArrayRecord({"part": Array("uint8", (0,), "raw.bytes", b"")})}),
        RecordDict({"ctl": STATUS, "part": ArrayRecord({"part": Array("uint8", (3,), "numpy.ndarray", b"abc")})}),
    ],
)
def test_a_message_outside_the_protocol_is_refused(record: RecordDict) -> None:
    with pytest.raises(ProtocolError):
        decode_request(record)


def test_an_answer_outside_the_protocol_is_refused() -> None:
    for fields in ({}, {"received": "1"}, {"received": 1, "path": "x"}, {"error": "E", "received": 1}):
        with pytest.raises(ProtocolError):
            decode_response(RecordDict({"ctl": ConfigRecord(dict(fields))}), Request("put"))
    with pytest.raises(ProtocolError):
        decode_response(
            RecordDict({"ctl": ConfigRecord({"error": "E"}), "part": ArrayRecord({"part": RAW})}), Request("get")
        )


def test_a_desk_that_cannot_write_its_log_still_answers(home: SiteHome) -> None:
    home.root.joinpath("log").write_text("a file where the folder should be")
    assert answer(Request("status", {"hop": "?"}), home, lambda home, hop: None).fields == {"error": "ProtocolError"}


def test_site_toml_is_read_back_and_checked(tmp_path: Path) -> None:
    home = write_home(tmp_path / "a", "north", Path('im"ages ü'), ("train.csv",))
    assert load_home(tmp_path / "a") == home
    assert (home.data, home.index) == (tmp_path / "a" / 'im"ages ü', ("train.csv",))
    (tmp_path / "a" / "site.toml").write_text('name = "north"\ndata = "x"\nspool = "y"\n')
    with pytest.raises(DataError, match="spool"):
        load_home(tmp_path / "a")
    with pytest.raises(DataError, match=r"site\.toml"):
        load_home(tmp_path)


def test_a_worker_ends_with_its_parent_and_frees_its_lock(home: SiteHome) -> None:
    folder = home.hop_folder(HOP)
    folder.mkdir(parents=True)
    os.mkfifo(folder / "handoff.json")  # the worker stays where it opens its hand-off
    start = (
        "import os, sys, time; from pathlib import Path; from invcoss_site.home import load_home;"
        "from invcoss_site.work import start_process;"
        f"start_process(load_home(Path(sys.argv[1])), {HOP!r}, parent=os.getpid()); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", start, str(home.root)])
    try:
        _until(lambda: (folder / "status.json").exists())
        assert hop_status(home, HOP) == Status(state="running")
        assert take_lock(home, HOP) is None
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _until(lambda: hop_status(home, HOP).error == "WorkerKilled")


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
