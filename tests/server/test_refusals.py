"""What an operator hears of a site that refuses, or that waits for its people or its hours."""

import json
import time

import pytest
from rich.console import Console
from tests.federation.plans import tiny_plan
from tests.federation.test_desk import hand_off
from tests.server.consortium import alive, make_consortium, plan_of
from typer.testing import CliRunner

from invcoss_common import errors
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import RelayConfig
from invcoss_common.errors import PolicyRefused, SiteError, SiteUnreachable
from invcoss_common.records import Response, Status, to_bytes
from invcoss_server import cli
from invcoss_server.courier import site_error, wait
from invcoss_server.events import Events
from invcoss_server.follow import describe
from invcoss_server.progress import ProgressView
from invcoss_server.runs import EVENTS, Outcome, add_run, write_outcome

CONFIG = RelayConfig(poll_s=0.01, stall_timeout_s=0.2)
WAITS = {phase: Status(state="queued", phase=phase) for phase in ("approval", "hours")}
REFUSALS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PolicyRefused)]


class Scripted:
    """A site whose status is each of `statuses` for so many seconds; None is no answer."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.since = time.monotonic()

    def call(self, site, request):
        (status, seconds), *later = self.statuses
        if later and time.monotonic() - self.since > seconds:
            self.statuses, self.since = later, time.monotonic()
        if status is None:
            raise SiteUnreachable("no answer")
        return Response({"status": to_bytes(status).decode(), "report": "", "signature": ""})


def waited(tmp_path, *statuses):
    """What `wait` raises, after how long, and which statuses it passed on."""
    seen, began = [], time.monotonic()
    with pytest.raises(SiteError) as caught:
        wait(Scripted(*statuses), "north", hand_off(ArtefactStore(tmp_path)), CONFIG, seen.append)
    return caught.value, time.monotonic() - began, seen


@pytest.mark.parametrize("phase", WAITS)
def test_a_hop_that_waits_at_the_site_is_waited_for(tmp_path, phase):
    refused = Status(state="failed", error="NotApproved")
    error, seconds, seen = waited(tmp_path, (WAITS[phase], 3 * CONFIG.stall_timeout_s), (refused, 9))
    assert "NotApproved" in str(error)
    assert seconds > 3 * CONFIG.stall_timeout_s
    assert seen == [WAITS[phase], refused]


@pytest.mark.parametrize("afterwards", [Status(state="queued"), Status(state="running", phase="approval"), None])
def test_after_that_silence_counts_again(tmp_path, afterwards):
    error, seconds, _ = waited(tmp_path, (WAITS["approval"], 2 * CONFIG.stall_timeout_s), (afterwards, 9))
    assert isinstance(error, SiteUnreachable)
    assert "stall_timeout_s" in str(error)
    assert seconds > 3 * CONFIG.stall_timeout_s


# What is said


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_told_in_our_words_and_needs_the_operator(kind):
    error = site_error("north", kind.__name__)
    text = str(error)
    assert text.startswith(f"site 'north' refused by its own policy, {kind.__name__}: ")
    assert kind.__doc__.splitlines()[0].rstrip(".") in text
    assert text.endswith("; agree with the site, then go on with the run")
    assert len(text.splitlines()) == 1
    assert (type(error), error.site) == (SiteError, "north")
    assert Outcome(type(error).__name__, text, error.site).needs_operator


def test_what_to_do_about_a_plan_that_is_not_allowed():
    text = str(site_error("north", "PlanNotAllowed"))
    assert "[trust] plans" in text
    assert "check-plan shows its digest" in text


@pytest.mark.parametrize(
    ("answered", "told"),
    [
        ("DataError", "failed with DataError: A site's data can't be used as they are; the site's own log"),
        ("LookupError", "failed with LookupError; the site's own log"),
        ("annotations", "failed with Error; the site's own log"),
        ("PatientSevenHasFlu", "failed with Error; the site's own log"),
        ("/data/patient-7.dcm", "failed with Error; the site's own log"),
        ("", "failed with Error; "),
    ],
)
def test_other_errors_and_what_is_none(answered, told):
    text = str(site_error("north", answered))
    assert told in text
    assert "patient" not in text


@pytest.fixture
def run(tmp_path):
    return add_run(make_consortium(tmp_path / "chest", "a"), plan_of("one", "a"))


def test_a_run_that_a_policy_refused_has_failed_and_says_why(tmp_path, run):
    error = site_error("a", "TooFewCases")
    write_outcome(run.folder, Outcome("SiteError", str(error), "a"))
    line = describe(tmp_path / "chest", "one")
    assert (line.state, line.error) == ("failed", str(error))


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("approval", "s00-train at a waits for approval at the site"),
        ("hours", "s00-train at a waits for the hours in which the site works"),
    ],
)
def test_status_logs_and_progress_say_what_is_waited_for(tmp_path, run, phase, words):
    Events(run.folder / EVENTS).add("status", hop="s00-train", site="a", **WAITS[phase].model_dump())
    with alive(run):
        assert describe(tmp_path / "chest", "one").doing == words
    logs = CliRunner().invoke(cli.app, ["logs", str(tmp_path / "chest"), "one"]).stdout
    assert logs.endswith(f" status {words}\n")
    as_json = CliRunner().invoke(cli.app, ["logs", str(tmp_path / "chest"), "one", "--json"]).stdout
    assert json.loads(as_json)["phase"] == phase
    view = ProgressView(tiny_plan())
    view.progress.live.console = Console(quiet=True)
    view.show(json.loads((run.folder / EVENTS).read_text()))
    assert view.progress.tasks[0].description == words
