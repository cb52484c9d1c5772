"""Hand-offs and reports between enrolled sides: signed, in order, and refused otherwise, before they are looked at."""

import json

import pytest
from tests.federation.loopback import LoopbackCourier, lift_guard
from tests.federation.test_desk import CONFIG, double, hand_off

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.errors import CredentialError, SiteError
from invcoss_common.keys import generate_signing_key, sign
from invcoss_common.records import HANDOFF, REPORT, Request, to_bytes
from invcoss_server.courier import deliver, wait
from invcoss_server.provision import enrol_site, init_consortium, revoke_site
from invcoss_server.signatures import Signatures, load_signatures
from invcoss_site.enrol import init_site, join
from invcoss_site.home import load_home


class SignedCourier(LoopbackCourier):
    """Signs and checks as the coordinator of a federation does."""

    def __init__(self, homes, signatures):
        super().__init__(homes, double)
        self.signatures = signatures

    def sign(self, handoff):
        return self.signatures.sign(handoff)

    def check(self, site, report, signature):
        self.signatures.check(site, report, signature)


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """What the visits here bring back is made up."""
    lift_guard(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    init_consortium(tmp_path / "chest", "chest", ("localhost",), 9443)
    return tmp_path / "chest"


@pytest.fixture
def home(tmp_path, folder):
    (tmp_path / "images").mkdir()
    request = init_site(tmp_path / "north", "north", tmp_path / "images")
    join(tmp_path / "north", enrol_site(folder, request.to_bytes()).to_bytes())
    return load_home(tmp_path / "north")


@pytest.fixture
def store(tmp_path):
    return ArtefactStore(tmp_path / "coordinator")


@pytest.fixture
def courier(home, folder):
    return SignedCourier({"north": home}, load_signatures(folder))


def start(courier, content, signature, **changes):
    fields = {"handoff": content.decode(), "attempt": 1, "signature": signature}
    return courier.carry("north", Request("start", fields, **changes))


def test_signed_hand_off_and_report_pass(home, store, courier):
    handoff = hand_off(store, sequence=1)
    deliver(courier, "north", handoff, store, CONFIG)
    report = wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert report.sender == "north"
    deliver(courier, "north", handoff, store, CONFIG)  # the same one again is harmless


OTHER = generate_signing_key()
BAD_HAND_OFFS = {
    "unsigned": lambda content, key: (content, ""),
    "not base64": lambda content, key: (content, "%%%"),
    "signed by somebody else": lambda content, key: (content, sign(OTHER, HANDOFF, content)),
    "signed as a report": lambda content, key: (content, sign(key, REPORT, content)),
    "one byte altered": lambda content, key: (content.replace(b'"seed":0', b'"seed":1'), sign(key, HANDOFF, content)),
    "cut": lambda content, key: (content[:-1], sign(key, HANDOFF, content)),
    "longer": lambda content, key: (content + b" ", sign(key, HANDOFF, content)),
    "not even JSON, unsigned": lambda content, key: (b"\xc2\xa0{", ""),
}


@pytest.mark.parametrize("bad", BAD_HAND_OFFS)
def test_a_hand_off_without_the_coordinators_signature_is_refused_unread(home, store, courier, bad):
    handoff = hand_off(store, sequence=1)
    content, signature = BAD_HAND_OFFS[bad](to_bytes(handoff), courier.signatures.key)
    with pytest.raises(SiteError, match="CredentialError"):
        start(courier, content, signature)
    assert not home.hop_folder(handoff.hop).exists()
    assert not (home.spool / "sequence.json").exists()


def test_an_older_protocol_without_signatures_is_no_way_round(home, store, courier):
    fields = {"handoff": to_bytes(hand_off(store, protocol=1)).decode(), "attempt": 1}
    with pytest.raises(SiteError, match="CredentialError"):
        courier.carry("north", Request("start", fields, protocol=1))


def test_stale_and_replayed_hand_offs_are_refused(home, store, courier):
    first, second = hand_off(store, sequence=1), hand_off(store, sequence=2, hop="s01-train")
    for handoff in (first, second):
        deliver(courier, "north", handoff, store, CONFIG)
    for stale in (first, hand_off(store, sequence=2, hop="s02-train"), hand_off(store, sequence=0)):
        content = to_bytes(stale)
        with pytest.raises(SiteError, match="ProtocolError"):
            start(courier, content, courier.sign(content))
    assert json.loads((home.spool / "sequence.json").read_bytes())["demo"][0] == 2
    deliver(courier, "north", hand_off(store, run="another", sequence=1), store, CONFIG)  # runs are counted apart


BAD_REPORTS = {
    "unsigned": lambda home: "",
    "signed by another site": lambda home: sign(OTHER, REPORT, report_of(home)),
    "signature of another report": lambda home: sign(key_of(home), REPORT, report_of(home) + b" "),
    "signed as a hand-off": lambda home: sign(key_of(home), HANDOFF, report_of(home)),
}


def report_of(home):
    return (home.hop_folder("s00-train") / "report.json").read_bytes()


def key_of(home):
    from invcoss_common.keys import load_signing_key

    return load_signing_key(home.root / "keys" / "signing.pem")


@pytest.mark.parametrize("bad", BAD_REPORTS)
def test_a_report_without_the_sites_signature_is_refused_unread(home, store, courier, bad):
    handoff = hand_off(store, sequence=1)
    deliver(courier, "north", handoff, store, CONFIG)
    (home.hop_folder("s00-train") / "report.signature").write_text(BAD_REPORTS[bad](home))
    with pytest.raises(CredentialError, match="lacks the signature of site 'north'"):
        wait(courier, "north", handoff, CONFIG, lambda status: None)


def test_a_report_of_a_revoked_site_is_refused(home, store, courier, folder):
    handoff = hand_off(store, sequence=1)
    deliver(courier, "north", handoff, store, CONFIG)
    revoke_site(folder, "north")
    with pytest.raises(CredentialError, match="site 'north' has no valid key"):
        wait(courier, "north", handoff, CONFIG, lambda status: None)


def test_signatures_hold_across_a_restart_of_the_coordinator(home, store, courier, folder):
    assert Signatures is type(load_signatures(folder))
    handoff = hand_off(store, sequence=1)
    deliver(courier, "north", handoff, store, CONFIG)
    again = SignedCourier({"north": home}, load_signatures(folder))
    assert wait(again, "north", handoff, CONFIG, lambda status: None).sender == "north"
