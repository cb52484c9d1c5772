"""The same over a real network: what two sites send over TLS, recorded before the gate, while things fail there."""

import socketserver
import sys
import threading
from contextlib import contextmanager

import pytest
from tests.federation.deployment import Deployment, plan_toml
from tests.federation.plans import tiny_plan
from tests.security.canaries import Canaries, plant, prepared
from tests.security.capture import messages, recording
from tests.security.search import Pattern, Search

from invcoss_server.events import Tail
from invcoss_server.provision import load_consortium
from invcoss_server.runs import EVENTS, add_run
from invcoss_site.home import write_home

pytestmark = pytest.mark.slow

GATE = "127.0.0.2"  # the recorder stands at 127.0.0.1, where sites look for the gate
XRAY, MRI = "xray-site", "mri-site"
PLAN = tiny_plan(("xray", "mri"), simulation={}, relay={"poll_s": 1.0, "answer_s": 30.0, "compress": True})
LEAKY = """#!/bin/sh
exec "{python}" -I -c '
import invcoss_site.app as app
from invcoss_common.records import Response
from invcoss_common.wire import encode_response

app.reply = lambda record, home, start_work: encode_response(Response({{"error": str(home.data)}}))

from invcoss_site.launch import main
main()
' "$@"
"""


class Planted(Deployment):
    """Sites in folders whose names are canaries, with canaries in their images, settings and environment."""

    def __post_init__(self):
        super().__post_init__()
        self.canaries = Canaries()
        self.indexes = {}
        self.site_env = {"PATIENT": self.canaries.word("environment variable")}

    def images(self, site):
        folder = self.root / self.canaries.word(f"{site}: data folder")
        if not folder.exists():
            modality = next(stage.modality for stage in self.plan.stages if stage.site == site)
            self.indexes[site] = plant(self.canaries, site, folder, modality, self.phantoms, seed=1)
        return folder

    def home_folder(self, site):
        return self.root / self.canaries.word(f"{site}: site's folder")

    def start(self, name="coordinator"):
        before = self.env
        self.env = before | (self.site_env if name != "coordinator" else {})
        super().start(name)
        self.env = before

    def use(self, site, index):
        """Let the site's settings name one of its indexes."""
        write_home(self.home_folder(site), site, self.images(site), (index,))


@contextmanager
def elsewhere():
    """An HTTP proxy, for whatever a process of a site may send to anybody but this machine; yields what came."""
    heads = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            heads.append(self.request.recv(4096))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", heads
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def relayed(tmp_path_factory):
    """A finished relay in which things failed; the services still run, and the recorder goes on."""
    with Planted(tmp_path_factory.mktemp("planted"), PLAN, phantoms=10, listen=GATE) as deployment:
        deployment.enrol()
        port = load_consortium(deployment.consortium).port
        pki = deployment.consortium / "pki"
        with recording(pki, ("127.0.0.1", port), (GATE, port)) as recorder, elsewhere() as (proxy, came):
            deployment.recorder, deployment.came = recorder, came
            deployment.site_env |= {"https_proxy": proxy, "http_proxy": proxy, "all_proxy": proxy}
            deployment.start()
            for site, (index, broken) in deployment.indexes.items():
                deployment.use(site, broken if site == XRAY else index)
                deployment.start(site)
            relay_with_failures(deployment)
            yield deployment
            deployment.stop()


def relay_with_failures(deployment):
    deployment.run(plan_toml(PLAN))
    run = deployment.state()

    def said(event):
        return any(one["event"] == event for one in Tail(run.folder / EVENTS, from_start=True).new())

    deployment.wait_until(
        lambda: run.outcome() is not None and not run.is_alive(), 600, "a visit without one readable image"
    )
    settings = deployment.home_folder(XRAY) / "site.toml"
    settings.write_text(f"{settings.read_text()}{deployment.canaries.word('wrong setting')} = 1\n")
    deployment.server("resume", deployment.consortium, PLAN.name)
    deployment.wait_until(lambda: said("absent"), 600, "answers of a site with wrong settings")
    deployment.use(XRAY, deployment.indexes[XRAY][0])
    for kind, site in (("trainer", XRAY), ("agent", XRAY), ("trainer", MRI), ("supernode", MRI)):
        deployment.wait_until(lambda kind=kind, site=site: deployment.kill(kind, site), 600, f"the {kind} of {site}")
    deployment.wait_until(run.is_done, 900, "the relay")
    deployment.site("doctor", deployment.home_folder(XRAY))


@pytest.fixture(scope="module")
def search(relayed):
    images = [prepared(relayed.home(stage.site), PLAN, number) for number, stage in enumerate(PLAN.stages)]
    return Search([*relayed.canaries.patterns(), *(pattern for stage in images for pattern in stage)])


def test_no_canary_is_in_what_sites_sent_over_tls(relayed, search):
    assert search.in_all(relayed.recorder.things()) == []
    assert search.searched > relayed.recorder.sent_bytes > 1_000_000


def test_no_canary_is_in_any_file_of_the_coordinator(relayed, search):
    assert search.in_folder(relayed.consortium) == []
    assert search.searched > 10_000_000
    assert search.in_bytes((relayed.root / "coordinator.log").read_bytes(), "terminal") == []


def test_sites_call_nobody_else(relayed):
    assert relayed.came == []


def test_the_same_search_finds_what_was_sent(relayed):
    """Nothing found is worth something only where the search sees what did leave."""
    records = list(messages(relayed.recorder.calls()))
    errors = {str(record["ctl"]["error"]) for record in records if "error" in record["ctl"]}
    statuses = [str(record["ctl"]["status"]) for record in records if "status" in record["ctl"]]
    assert "DataError" in errors
    assert any('"error":"DataError"' in status for status in statuses)
    run = relayed.state()
    model = (run.folder / "artefacts" / run.state.stage(0).model.sha256).read_bytes()
    middle = Pattern("model", "weights", model[len(model) // 2 : len(model) // 2 + 64])
    assert {hit.what for hit in Search([middle]).in_all(relayed.recorder.things())} == {"model"}


def test_what_must_not_be_sent_was_there_to_be_sent(relayed, search):
    """Names of quarantined files and texts of errors are in the sites' own logs."""
    found = {hit.what for site in PLAN.sites for hit in search.in_folder(relayed.home_folder(site))}
    for site in PLAN.sites:
        assert {f"{site}: damaged file name 0", f"{site}: data folder"} <= found
        assert f"{site}: cached training images" in found
    assert "wrong setting" in found


def test_a_leaky_site_is_found_out_over_the_same_wire(relayed, search):
    launcher = relayed.home_folder(XRAY) / "launcher" / "flwr-clientapp"
    honest = launcher.read_text()
    launcher.write_text(LEAKY.format(python=sys.executable))
    plan = tiny_plan(("xray",), name="leaky", simulation={}, relay={"poll_s": 0.3, "answer_s": 30.0})
    run = add_run(relayed.consortium, plan)
    try:
        relayed.wait_until(
            lambda: (
                {(hit.what, hit.form) for hit in search.in_all(relayed.recorder.things())}
                == {(f"{XRAY}: data folder", "plain")}
            ),
            60,
            "the leak",
        )
    finally:
        launcher.write_text(honest)
        run.state.want("stopped")
