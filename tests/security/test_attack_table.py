"""Every attack of the table is refused with the right class of error, and leaves nothing behind."""

from __future__ import annotations

import json
import re

import pytest
from tests.security.attack_table import BEGIN, DOCS, END, as_markdown
from tests.security.attacked import AttackedCoordinator, AttackedSite, make_worlds
from tests.security.attacks_on_coordinator import ON_COORDINATOR
from tests.security.attacks_on_site import LAUNCHER, ON_SITE, WORKER, pool_of

from invcoss_common.chain import verify
from invcoss_common.errors import BundleRefused, InvcossError, SiteError
from invcoss_common.keys import load_signing_key


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("worlds"))


def told_of(answer):
    """The class of the error in an answer that says nothing else, directly or as the status of a hop."""
    if set(answer.fields) == {"error"}:
        return answer.fields["error"]
    status = json.loads(answer.fields["status"])
    assert (status["state"], answer.fields["report"], answer.fields["signature"], answer.blob) == (
        "failed",
        "",
        "",
        b"",
    )
    return status["error"]


@pytest.mark.parametrize("attack", ON_SITE, ids=lambda attack: attack.name)
def test_a_site_refuses_it_and_keeps_nothing(worlds, tmp_path, attack):
    site = AttackedSite(worlds, tmp_path)
    with pytest.raises((SiteError, BundleRefused)) as caught:
        attack.act(site)
    recorded = [record for record in site.recorded() if record["kind"] in ("refused", "failed")]
    if attack.refuses == LAUNCHER:
        assert (type(caught.value).__name__, recorded) == (attack.error, [])
        assert re.search(attack.says, str(caught.value))
    else:
        assert re.search(attack.says, site.told())
        assert told_of(site.answer) == attack.error, "the attacker gets the class, and nothing else"
        assert [(record["kind"], record["error"]) for record in recorded] == [
            ("failed" if attack.refuses == WORKER else "refused", attack.error)
        ]
    assert site.changed(by_worker=attack.refuses == WORKER) == set()
    kinds = {record["kind"] for record in site.recorded()} - {"refused", "failed"}
    assert kinds <= ({"answered", "accepted", "begun"} if attack.refuses == WORKER else {"answered"})
    verify(site.home.root / "journal.jsonl", [load_signing_key(site.home.root / "keys" / "signing.pem").public_key()])


@pytest.mark.parametrize("attack", ON_COORDINATOR, ids=lambda attack: attack.name)
def test_a_coordinator_refuses_it_and_keeps_nothing(worlds, tmp_path, attack):
    run = AttackedCoordinator(worlds, tmp_path, attack.who)
    with pytest.raises(InvcossError) as caught:
        run.go_on(attack.act)
    assert type(caught.value).__name__ == attack.error
    assert re.search(attack.says, str(caught.value))
    assert run.snapshot() == run.before
    entered = [(record["kind"], record["error"]) for record in run.entered() if "error" in record]
    assert ("stage", attack.error) in entered
    assert {kind for kind, _ in entered} <= {"refused", "stage"}
    assert not [record for record in run.entered() if record["kind"] not in ("refused", "stage")]


@pytest.mark.parametrize("phase", ["train", "audit", "evaluate"])
def test_what_is_not_an_attack_is_taken(worlds, tmp_path, phase):
    """The same run goes on to its end with the honest site, so that nothing above is refused for another reason."""
    run = AttackedCoordinator(worlds, tmp_path, phase)
    run.go_on(lambda hostile, request, response: response)
    assert (run.out / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_hand_offs_that_are_altered_are_good_ones(worlds, tmp_path, kind):
    site = AttackedSite(worlds, tmp_path)
    site.start(site.hand_off(kind))
    assert [record for record in site.recorded() if record["kind"] in ("refused", "failed")] == []


def test_a_site_audits_another_pool_of_its_own_model_within_its_limit_and_the_same_again(worlds, tmp_path):
    site = AttackedSite(worlds, tmp_path)
    for seed in (0, 1, 0, 1):  # with that of the run they are three
        handoff = site.with_pool(pool_of(site, seed), "audit")
        site.sequence += 1
        site.start(handoff)
    with pytest.raises(SiteError, match="LimitExceeded"):
        site.start(site.with_pool(pool_of(site, 2), "audit"))
    assert len([record for record in site.recorded() if record["kind"] == "audited"]) == 4


def test_there_is_one_row_an_attack_and_the_docs_have_them_all():
    for attacks in (ON_SITE, ON_COORDINATOR):
        assert len({attack.name for attack in attacks}) == len(attacks) > 40
    text = DOCS.read_text("utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == as_markdown(), (
        "write the table anew: python -m tests.security.attack_table"
    )
