"""A site's policy in a whole relay: what it refuses is not done, the operator hears why, and the run can go on."""

import threading
import time
from contextlib import contextmanager

import pytest
from tests.federation.loopback import LoopbackCourier
from tests.federation.plans import tiny_plan

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import SiteError
from invcoss_server.relay import relay
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site import approval
from invcoss_site.policy import POLICY
from invcoss_site.simulated import SMALL, simulated_home
from invcoss_site.visit import checkpoint_path, visit

PLAN = tiny_plan(("xray",), relay={"poll_s": 0.02, "audit": False})  # 12 images: 10 to train on, 2 held out
HOP = "s00-train"


@pytest.fixture
def home(tmp_path):
    return simulated_home(PLAN, "xray-site", None, tmp_path)


def run(home, out):
    relay(PLAN, LoopbackCourier({"xray-site": home}, visit), out, synthesise_here)


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ("[cases]\nmin_train = 11\nmin_heldout = 1\n", "TooFewCases"),
        ("[cases]\nmin_heldout = 3\n", "TooFewCases"),
        ("[cases]\nmin_heldout = 1\n[work]\nmax_epochs = 1.1\n", "LimitExceeded"),  # 3 steps of 4 images are 1.2
        ("[cases]\nmin_heldout = 1\n", "AuditRequired"),
    ],
)
def test_a_visit_that_the_policy_refuses_trains_nothing_and_goes_on_once_it_may(home, tmp_path, policy, error):
    audit = "" if error == "AuditRequired" else "[audit]\nrequired = false\n"
    write_atomic(home.root / POLICY, (policy + audit).encode())
    with pytest.raises(SiteError, match=f"site 'xray-site' refused by its own policy, {error}: "):
        run(home, tmp_path)
    state = RunState(tmp_path / "state.db", PLAN)
    assert state.stage(0).state == "failed"
    assert not checkpoint_path(home, HOP).exists()
    write_atomic(home.root / POLICY, SMALL)
    run(home, tmp_path)
    assert state.stage(0).state == "released"


@contextmanager
def a_person_who_says(home, word):
    """Somebody at the site who looks for what waits and gives their word on it; `found` are the hops."""
    found, over = [], threading.Event()

    def look():
        while not over.is_set():
            for one in list(approval.pending(home)):
                found.append(one.handoff.hop)
                approval.decide(home, one.handoff.hop, word)
            time.sleep(0.02)

    person = threading.Thread(target=look)
    person.start()
    try:
        yield found
    finally:
        over.set()
        person.join()


@pytest.mark.parametrize("word", ["approved", "denied"])
def test_a_simulated_site_waits_for_a_person_too(home, tmp_path, monkeypatch, word):
    monkeypatch.setattr(approval, "LOOK_S", 0.05)
    write_atomic(home.root / POLICY, SMALL + b"[trust]\napproval = true\n")
    with a_person_who_says(home, word) as found:
        if word == "approved":
            run(home, tmp_path)
        else:
            with pytest.raises(SiteError, match=r"NotApproved: A person at the site said no"):
                run(home, tmp_path)
    assert found == [HOP]
