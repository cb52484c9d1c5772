"""Nothing of a site's images, names and texts leaves it in a whole relay in which every function of its fails once."""

import pytest
import torch
from tests.federation.loopback import lift_guard
from tests.federation.plans import tiny_plan
from tests.security.canaries import Canaries, plant, prepared
from tests.security.failures import AppCourier, FailingCourier
from tests.security.search import Search, word_patterns

from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.errors import InvcossError, SiteError
from invcoss_common.records import Request
from invcoss_common.statistics import record_statistics
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.relay import relay
from invcoss_server.runs import Outcome, write_outcome
from invcoss_server.signatures import load_signatures
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site import app
from invcoss_site.enrol import init_site, join
from invcoss_site.home import load_home, write_home
from invcoss_site.policy import POLICY
from invcoss_site.simulated import SMALL

pytestmark = pytest.mark.slow

PLAN = tiny_plan(("xray", "mri"), simulation={}, relay={"poll_s": 0.01, "part_mib": 1, "stall_timeout_s": 20.0})
VERBS = {"hello", "have", "put", "start", "status", "get", "purge", "abort"}


def enrolled(canaries, site, consortium, root):
    """A site in folders whose names are canaries, with canaries in its images, settings and policy."""
    data, home = root / canaries.word(f"{site}: data folder"), root / canaries.word(f"{site}: site's folder")
    modality = next(stage.modality for stage in PLAN.stages if stage.site == site)
    index, _ = plant(canaries, site, data, modality, 10, seed=1)
    join(home, enrol_site(consortium, init_site(home, site, data).to_bytes()).to_bytes())
    write_home(home, site, data, (index,))
    with (home / "site.toml").open("a") as settings:
        settings.write(f"# {canaries.word(f'{site}: settings')}\n")
    write_atomic(home / POLICY, SMALL + f"# {canaries.word(f'{site}: policy')}\n".encode())
    return load_home(home)


@pytest.fixture(scope="module", autouse=True)
def without_waiting_for_the_disk():
    """A thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A consortium of two enrolled sites: its folder, their homes, and what was planted."""
    root, canaries = tmp_path_factory.mktemp("planted"), Canaries()
    init_consortium(root / "consortium", "chest", ("localhost",), 9443)
    homes = {site: enrolled(canaries, site, root / "consortium", root) for site in PLAN.sites}
    return root / "consortium", homes, canaries


@pytest.fixture(scope="module")
def relayed(planted, tmp_path_factory):
    """The courier of a relay that is finished although its sites failed at every step, and the errors on the way."""
    consortium, homes, canaries = planted
    out, errors = consortium / "runs" / "tiny", []
    courier = FailingCourier(homes, load_signatures(consortium), canaries, tmp_path_factory.mktemp("spare"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "leave_to_agent", courier.start_here)
        while not errors or errors[-1]:
            try:
                relay(PLAN, courier, out, synthesise_here)
                errors.append("")
            except SiteError as error:
                errors.append(str(error))
                write_outcome(out, Outcome(type(error).__name__, str(error), error.site))  # as the server's app does
        for verb, fields in (("abort", {"hop": "s00-train"}), ("purge", {"keep": ""})):
            for _ in range(2):
                try:
                    courier.call(PLAN.sites[0], Request(verb, fields))
                except SiteError as error:
                    errors.append(str(error))
    return courier, errors


@pytest.fixture(scope="module")
def search(planted, relayed):
    """For everything that was planted, and for the images as their sites compute with them."""
    _, homes, canaries = planted
    images = [prepared(homes[stage.site], PLAN, number) for number, stage in enumerate(PLAN.stages)]
    return Search([*canaries.patterns(), *(pattern for stage in images for pattern in stage)])


def test_every_function_of_a_site_failed_at_every_step_and_the_relay_was_finished(planted, relayed):
    courier, errors = relayed
    assert {step.split()[0] for step in courier.tried} == VERBS | {"work"}
    assert {step for step in courier.tried if step.startswith("work")} >= {
        "work at xray-site: train",
        "work at xray-site: audit",
        "work at xray-site: eval",
        "work at mri-site: train",
    }
    assert sum(courier.tried.values()) > 500
    assert courier.missed == []
    assert len(errors) > 10
    state = RunState(planted[0] / "runs" / "tiny" / "state.db", PLAN)
    assert [state.stage(number).state for number in range(2)] == ["released"] * 2


def test_no_canary_is_in_anything_that_a_site_sent(relayed, search):
    courier, errors = relayed
    assert search.in_bytes("\n".join(errors).encode(), "errors") == []
    assert search.in_all(courier.sent) == []
    assert search.searched > 10_000_000


def test_no_canary_is_in_any_file_of_the_coordinator(planted, search):
    assert search.in_folder(planted[0]) == []
    assert search.searched > 10_000_000


def test_the_same_search_finds_what_was_sent(planted, relayed):
    """Nothing found is worth something only where the search sees what did leave."""
    courier, _ = relayed
    state = RunState(planted[0] / "runs" / "tiny" / "state.db", PLAN)
    model = (planted[0] / "runs" / "tiny" / "artefacts" / state.stage(0).model.sha256).read_bytes()
    left = [*word_patterns("digest", sha256_hex(model)), *word_patterns("class", "CredentialError")]
    assert {hit.what for hit in Search(left).in_all(courier.sent)} == {"digest", "class"}
    assert {hit.what for hit in Search(left).in_folder(planted[0])} >= {"digest"}
    assert any(data == model[: 1 << 20] for _, data in courier.sent)


def test_the_same_search_finds_at_the_sites_what_the_coordinator_must_not_have(planted, relayed, search):
    """Names of quarantined files and texts of errors were there to be sent: they are in the sites' own logs."""
    _, homes, canaries = planted
    found = {hit.what for home in homes.values() for hit in search.in_folder(home.root)}
    for site in PLAN.sites:
        assert {f"{site}: damaged file name 0", f"{site}: data folder"} <= found
        assert {f"{site}: cached training images", f"{site}: cached held-out images"} <= found
    assert {"text of an error", "class of an error", "note of an error", "cause of an error"} <= found
    images = {hit.what for home in homes.values() for hit in search.in_folder(home.data)}
    everywhere = found | images | {f"{site}: name of the other index" for site in PLAN.sites}
    assert set(canaries.noise) <= images
    assert set(canaries.words) - everywhere == {f"{site}: {name}" for site in PLAN.sites for name in ("site's folder",)}


# A leak is found


@pytest.fixture
def leaky(planted, monkeypatch):
    consortium, homes, _ = planted
    courier = AppCourier(homes, load_signatures(consortium))
    monkeypatch.setattr(app, "leave_to_agent", courier.start_here)
    return courier


def test_a_site_that_sends_the_text_of_an_error_is_found_out(planted, leaky, search, monkeypatch):
    homes = planted[1]
    monkeypatch.setattr("invcoss_site.desk.error_class", str)
    parts = homes["xray-site"].spool / "artefacts"
    parts.rename(parts.with_name("moved"))
    parts.write_text("a file where a folder should be")
    with pytest.raises(SiteError):
        leaky.call("xray-site", Request("have", {"sha256": "0" * 64, "size": 5}))
    parts.unlink()
    parts.with_name("moved").rename(parts)
    found = search.in_all(leaky.sent)
    assert {(hit.what, hit.form) for hit in found} == {("xray-site: site's folder", "plain")}


def test_a_site_that_sends_pixels_as_statistics_is_found_out(tmp_path, planted, leaky, search, monkeypatch):
    """Nobody can tell them from honest statistics who does not know the images."""

    def with_pixels(model, batches, *args, **more):
        batches = list(batches)
        honest = record_statistics(model, batches, *args, **more)
        honest.mean.copy_(torch.cat(batches).flatten()[: honest.mean.numel()].reshape(honest.mean.shape))
        return honest

    monkeypatch.setattr("invcoss_site.visit.record_statistics", with_pixels)
    lift_guard(monkeypatch)
    plan = tiny_plan(("xray",), name="leaky", simulation={}, relay={"poll_s": 0.01, "stall_timeout_s": 20.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("invcoss_server.relay.invert_stage", lambda *_: None)
        with pytest.raises((InvcossError, AssertionError)):  # the relay has no pool and ends there
            relay(plan, leaky, tmp_path, synthesise_here)
    for found in (search.in_all(leaky.sent), search.in_folder(tmp_path)):
        assert ("xray-site: training images at the input size", "prepared floats <f4") in {
            (hit.what, hit.form) for hit in found
        }
