"""The privacy account: Opacus's numbers, charged before the work and once a visit, never more than the budget."""

import json
import sys

import pytest
from opacus.accountants import RDPAccountant
from typer.testing import CliRunner

from invcoss_common.chain import records
from invcoss_common.errors import BudgetSpent, ChainError, DataError
from invcoss_site import journal, privacy
from invcoss_site.cli import app
from invcoss_site.home import write_home
from invcoss_site.journal import JOURNAL
from invcoss_site.policy import Dp, load_policy
from invcoss_site.privacy import ACCOUNT, Charge, charge, charged, epsilon

DELTA = 1e-5


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def home(tmp_path):
    return write_home(tmp_path / "north", "north", tmp_path)


def visit(number=0, **changes):
    values = {"visit": f"{number:064x}", "run": "demo", "hop": "s00-train", "noise_multiplier": 1.1, "steps": 30}
    return Charge.model_validate(values | {"sample_rate": 0.05, "statistics_noise": 8.0} | changes)


def opacus(*visits, delta=DELTA):
    """Step after step, as Opacus is told of in a training."""
    accountant = RDPAccountant()
    for one in visits:
        for _ in range(one.steps):
            accountant.step(noise_multiplier=one.noise_multiplier, sample_rate=one.sample_rate)
        accountant.step(noise_multiplier=one.statistics_noise, sample_rate=1.0)
    return accountant.get_epsilon(delta)


def journalled(home):
    file = home.root / JOURNAL
    return [record for record in records(file) if record["kind"] == "charged"] if file.exists() else []


def test_epsilon_is_that_of_opacus():
    visits = [visit(0), visit(1, noise_multiplier=0.8, sample_rate=0.3), visit(2, statistics_noise=2.0, steps=100)]
    for some in ([visits[0]], visits[:2], visits, visits[::-1]):
        for delta in (1e-4, 1e-7):
            assert epsilon(some, delta) == pytest.approx(opacus(*some, delta=delta), rel=1e-9)


def test_all_visits_add_up_and_each_is_on_record(home):
    first = charge(home, Dp(), visit(0), DELTA)
    assert first.epsilon == first.visit_epsilon == pytest.approx(opacus(visit(0)))
    second = charge(home, Dp(), visit(1, noise_multiplier=0.9), DELTA)
    assert second.epsilon == pytest.approx(opacus(visit(0), visit(1, noise_multiplier=0.9)))
    assert second.visit_epsilon == pytest.approx(opacus(visit(1, noise_multiplier=0.9)))
    assert second.visit_epsilon < second.epsilon
    assert (second.noise_multiplier, second.statistics_noise, second.sample_rate) == (0.9, 8.0, 0.05)
    assert (second.steps, second.delta) == (30, DELTA)
    assert [one.visit[-1] for one in charged(home.root)] == ["0", "1"]
    assert (home.root / ACCOUNT).stat().st_mode & 0o777 == 0o600
    on_record = journalled(home)
    assert [record["visit"][-1] for record in on_record] == ["0", "1"]
    assert on_record[1]["noise_multiplier"] == "0.9" and on_record[1]["steps"] == 30
    assert float(on_record[1]["epsilon"]) == second.visit_epsilon


def test_a_visit_that_goes_on_is_charged_once(home):
    first = charge(home, Dp(), visit(), DELTA)
    content = (home.root / ACCOUNT).read_bytes()
    assert charge(home, Dp(), visit(), DELTA) == first
    assert (home.root / ACCOUNT).read_bytes() == content
    assert len(journalled(home)) == 1


CHANGES = ({"visit": "f" * 64}, {"run": "other"}, {"hop": "s01-train"}, {"steps": 31}, {"sample_rate": 0.06})
CHANGES += ({"noise_multiplier": 1.2}, {"statistics_noise": 9.0})


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_any_other_is_charged_again(home, change):
    charge(home, Dp(), visit(), DELTA)
    spent = charge(home, Dp(), visit(**change), DELTA)
    assert len(charged(home.root)) == 2
    assert spent.epsilon == pytest.approx(opacus(visit(), visit(**change)))


def test_a_visit_beyond_the_budget_is_refused_and_charges_nothing(home):
    one, two = opacus(visit(), delta=1e-6), opacus(visit(), visit(1), delta=1e-6)
    policy = Dp(max_epsilon=(one + two) / 2, max_delta=1e-6)
    charge(home, policy, visit(), DELTA)
    before = (home.root / ACCOUNT).read_bytes()
    with pytest.raises(BudgetSpent, match=f"epsilon would be {two:.3g} at delta 1e-06, after {one:.3g} so far"):
        charge(home, policy, visit(1), DELTA)
    assert (home.root / ACCOUNT).read_bytes() == before
    assert len(journalled(home)) == 1
    charge(home, policy, visit(), DELTA)  # what is charged may go on
    charge(home, Dp(max_epsilon=two + 0.01, max_delta=1e-6), visit(1), DELTA)


def test_a_visit_charged_when_the_budget_was_larger_may_go_on(home):
    charge(home, Dp(), visit(), DELTA)
    assert charge(home, Dp(max_epsilon=1e-3), visit(), DELTA).epsilon > 1


def test_noise_that_protects_nobody_is_refused(home):
    with pytest.raises(BudgetSpent, match="protects nobody"):
        charge(home, Dp(), visit(noise_multiplier=1e-3), DELTA)
    assert charged(home.root) == () and journalled(home) == []


@pytest.mark.parametrize("where", ["before the journal", "after the journal", "after the account"])
def test_a_kill_never_leaves_less_than_is_spent(home, monkeypatch, where):
    charge(home, Dp(), visit(), DELTA)
    write, note = privacy.write_atomic, journal.note

    def kill(*_given, **_more):
        raise Killed

    def then_kill(*given, **more):
        write(*given, **more)
        raise Killed

    if where == "before the journal":
        monkeypatch.setattr(journal, "note", kill)
    else:
        monkeypatch.setattr(privacy, "write_atomic", then_kill if where == "after the account" else kill)
    with pytest.raises(Killed):
        charge(home, Dp(), visit(1), DELTA)
    monkeypatch.setattr(privacy, "write_atomic", write)
    monkeypatch.setattr(journal, "note", note)
    # No step was taken without the charge, which is there once when the visit goes on.
    assert len(charged(home.root)) == (2 if where == "after the account" else 1)
    assert charge(home, Dp(), visit(1), DELTA).epsilon == pytest.approx(opacus(visit(), visit(1)))
    assert len(charged(home.root)) == 2
    assert {record["visit"][-1] for record in journalled(home)} == {"0", "1"}


def test_what_cannot_be_journalled_is_not_charged(home):
    (home.root / JOURNAL).write_text("no record\n")
    with pytest.raises(ChainError):
        charge(home, Dp(), visit(), DELTA)
    assert charged(home.root) == ()


@pytest.mark.parametrize("content", [b"", b"[{]", b"{}", b'[{"visit": "x"}]', b"\xff"])
def test_a_damaged_account_is_an_error_not_a_new_one(home, content):
    charge(home, Dp(), visit(), DELTA)
    (home.root / ACCOUNT).write_bytes(content)
    with pytest.raises(DataError, match="not a privacy account") as caught:
        charge(home, Dp(), visit(1), DELTA)
    assert "\n" not in str(caught.value)
    assert (home.root / ACCOUNT).read_bytes() == content


def test_without_opacus_the_error_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(DataError, match=r'pip install "invcoss\[dp\]"'):
        charge(home, Dp(), visit(), DELTA)
    assert charged(home.root) == () and journalled(home) == []


def test_the_command_shows_what_is_spent_and_left(home):
    show = ["privacy", str(home.root)]
    empty = json.loads(CliRunner().invoke(app, [*show, "--json"]).stdout)
    assert (empty["visits"], empty["epsilon"], empty["left"]) == ([], 0.0, None)
    charge(home, Dp(), visit(), DELTA)
    charge(home, Dp(), visit(1, hop="s02-train", noise_multiplier=2.0), DELTA)
    (home.root / "policy.toml").write_text("[dp]\nmax_epsilon = 6.0\nmax_delta = 1e-6\nrequired = true\n")
    shown = json.loads(CliRunner().invoke(app, [*show, "--json"]).stdout)
    total = opacus(visit(), visit(1, noise_multiplier=2.0), delta=1e-6)
    assert shown["epsilon"] == pytest.approx(total)
    assert shown["left"] == pytest.approx(6.0 - total) and shown["delta"] == 1e-6
    assert [row["epsilon"] for row in shown["visits"]] == [
        pytest.approx(opacus(visit(), delta=1e-6)),
        pytest.approx(opacus(visit(1, noise_multiplier=2.0), delta=1e-6)),
    ]
    text = CliRunner().invoke(app, show).stdout
    assert "s02-train" in text and f"{total:.4g}" in text and f"left of 6: {6.0 - total:.4g}" in text
    assert "without differential privacy" not in text
    (home.root / "policy.toml").write_text("")
    assert not load_policy(home.root).dp.required
    assert "without differential privacy are allowed too" in CliRunner().invoke(app, show).stdout
