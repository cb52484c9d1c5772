"""A site's own hours and bandwidth: nothing crosses outside them, the coordinator waits, restarts change nothing."""

from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace

import pytest
from tests.federation.loopback import LoopbackCourier, lift_guard
from tests.federation.test_desk import CONFIG, MODEL, double, hand_off

import invcoss_server.courier
import invcoss_site.transfer
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.errors import DataError, TransferClosed
from invcoss_common.records import Request
from invcoss_server.courier import deliver, fetch, wait
from invcoss_site.home import Transfer, load_home, write_home
from invcoss_site.transfer import check_open, count, within

NOON = time.mktime((2026, 3, 2, 12, 0, 0, 0, 0, -1))


class Clock:
    """Stands in for the module `time`: sleeping is what makes time go by."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.slept: list[float] = []
        self.localtime, self.strftime = time.localtime, time.strftime

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """What the visits here bring back is made up."""
    lift_guard(monkeypatch)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(NOON)
    monkeypatch.setattr(invcoss_site.transfer, "time", clock)
    monkeypatch.setattr(
        invcoss_server.courier, "time", SimpleNamespace(sleep=clock.sleep, monotonic=clock.time, time_ns=time.time_ns)
    )
    return clock


@pytest.fixture
def store(tmp_path):
    return ArtefactStore(tmp_path / "coordinator")


def home_with(tmp_path, transfer):
    """A site whose IT wrote `transfer` into site.toml."""
    write_home(tmp_path / "north", "north", tmp_path / "images")
    file = tmp_path / "north" / "site.toml"
    file.write_text(file.read_text() + f"[transfer]\n{transfer}\n")
    return load_home(tmp_path / "north")


def relay_one(home, store, told, config=CONFIG):
    """Deliver, wait for and fetch one model; the bytes sent and received, without the hand-off."""
    courier = LoopbackCourier({"north": home}, double)
    handoff = hand_off(store)
    sent = deliver(courier, "north", handoff, store, config, lambda: told.append("deliver"))
    report = wait(courier, "north", handoff, config, lambda status: None)
    assert report.model is not None
    received = fetch(courier, "north", report.model, store, config, lambda: told.append("fetch"))
    assert store.path(report.model).read_bytes() == MODEL * 2
    return courier, sent, received


def test_without_limits_nothing_waits(tmp_path, store, clock):
    home = write_home(tmp_path / "north", "north", tmp_path / "images")
    assert home.transfer == Transfer()
    told = []
    relay_one(home, store, told)
    assert (told, clock.slept) == ([], [])
    assert not (home.spool / "transfer.json").exists()


def test_the_coordinator_waits_for_the_hours_and_says_so_once(tmp_path, store, clock):
    home = home_with(tmp_path, 'hours = "20:00-06:00"')
    told = []
    courier, _, _ = relay_one(home, store, told)
    assert told == ["deliver"]
    assert 8 * 3600 <= clock.now - NOON < 8 * 3600 + 60
    assert clock.slept[:3] == [0.01, 0.02, 0.04] and max(clock.slept) == 30
    assert courier.calls.count(("north", "put")) == 3, "nothing large was sent in vain"
    assert not (home.log / "desk.log").exists(), "asking at the wrong time is no failure"


@pytest.mark.parametrize("compress", [False, True])
def test_what_crosses_keeps_to_the_bandwidth(tmp_path, store, clock, monkeypatch, compress):
    monkeypatch.setattr(invcoss_server.courier, "LONGEST_PAUSE_S", 0.1)
    home = home_with(tmp_path, "max_mbit_s = 1")
    told = []
    courier, sent, received = relay_one(home, store, told, CONFIG.model_copy(update={"compress": compress}))
    assert told == ["deliver", "fetch"]
    assert sent + received < (0.8 if compress else 1.01) * 3 * len(MODEL)
    last = len(MODEL) * 2 % (1 << 20)  # nothing waits for it
    assert (sent + received - last) * 8 / 1e6 - 1 < clock.now - NOON < (sent + received) * 8 / 1e6
    assert courier.calls.count(("north", "put")) == 3, "nothing large was sent in vain"


def test_a_hop_whose_artefacts_are_there_starts_at_any_time(tmp_path, store, clock):
    handoff = hand_off(store)
    home = write_home(tmp_path / "north", "north", tmp_path / "images")
    deliver(LoopbackCourier({"north": home}, double), "north", handoff, store, CONFIG)
    home = home_with(tmp_path, 'hours = "20:00-06:00"')
    courier = LoopbackCourier({"north": home}, double)
    deliver(courier, "north", handoff, store, CONFIG)
    assert courier.call("north", Request("status", {"hop": handoff.hop})).fields["report"]
    assert clock.slept == []


@pytest.mark.parametrize("verb", ["have", "put", "get"])
def test_no_verb_lets_a_part_cross_while_the_site_is_closed(tmp_path, store, clock, verb):
    home = home_with(tmp_path, 'hours = "20:00-06:00"')
    artefact = store.put(MODEL)
    fields = {"sha256": artefact.sha256, "size": artefact.size_bytes}
    fields |= {"have": {}, "put": {"offset": 0, "encoding": ""}, "get": {"offset": 0, "length": 9, "encoding": ""}}[
        verb
    ]
    with pytest.raises(TransferClosed, match="north"):
        LoopbackCourier({"north": home}, double).call("north", Request(verb, fields, MODEL if verb == "put" else b""))
    assert list(home.artefacts.folder.iterdir()) == []


def test_a_restart_forgets_nothing_and_a_clock_put_back_keeps_nobody_waiting(tmp_path, clock):
    home = home_with(tmp_path, "max_mbit_s = 1.0")
    check_open(home)
    count(home, 1_000_000)
    clock.now += 7.9
    with pytest.raises(TransferClosed):
        check_open(load_home(home.root))
    clock.now += 0.2
    check_open(load_home(home.root))
    count(home, 1_000_000)
    clock.now -= 3600
    check_open(home)


def test_parts_that_cross_at_once_all_count(tmp_path):
    home = home_with(tmp_path, "max_mbit_s = 0.001")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(count, [(home, 1_000)] * 20)
    shut = invcoss_site.transfer._shut(home)
    assert 150 < shut.until - time.time() <= 160


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        ("08:30-17:00", ["08:30", "16:59"], ["17:00", "23:00", "00:00", "08:29"]),
        ("00:00-23:59", ["00:00", "12:00", "23:58"], ["23:59"]),
        ("20:00-00:00", ["20:00", "23:59"], ["00:00", "19:59"]),
    ],
)
def test_hours_may_run_past_midnight(hours, inside, outside):
    assert all(within(hours, clock) for clock in inside)
    assert not any(within(hours, clock) for clock in outside)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("max_mbit_s = 0", "transfer.max_mbit_s"),
        ("max_mbit_s = -1.5", "transfer.max_mbit_s"),
        ("max_mbit_s = inf", "transfer.max_mbit_s"),
        ("max_mbit_s = nan", "transfer.max_mbit_s"),
        ("max_mbit_s = true", "transfer.max_mbit_s"),
        ('max_mbit_s = "10"', "transfer.max_mbit_s"),
        ('hours = "20-06"', "transfer.hours"),
        ('hours = "24:00-06:00"', "transfer.hours"),
        ('hours = "20:00-06:00 "', "transfer.hours"),
        ('hours = "20:00-06:60"', "transfer.hours"),
        ('hours = "06:00-06:00"', "leave hours out"),
        ("hours = 20:00:00", "transfer.hours"),
        ("max_mbit = 3", "transfer.max_mbit"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(tmp_path, line, names):
    with pytest.raises(DataError, match=names):
        home_with(tmp_path, line)
