"""Evidence says what the records say; what was tampered with is NOT verified; nothing of the data is in it."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape

import pytest
from tests.federation.loopback import work_here
from tests.federation.test_desk import CONFIG, hand_off
from tests.federation.test_signatures import SignedCourier
from typer.testing import CliRunner

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file, sha256_hex
from invcoss_common.chain import parse_head, records, verify
from invcoss_common.errors import ChainError, DataError
from invcoss_common.keys import fingerprint, key_digest, load_signing_key
from invcoss_common.metrics import METRICS
from invcoss_common.model import build_model
from invcoss_common.phantoms import write_phantoms
from invcoss_common.records import Artefact, AuditFigures, DpSpent, Interval, Pool, Release, Report
from invcoss_common.weights import model_to_bytes
from invcoss_server.courier import deliver, fetch, wait
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.signatures import load_signatures
from invcoss_site import cli
from invcoss_site.enrol import init_site, join
from invcoss_site.evidence import gather
from invcoss_site.home import load_home, write_home
from invcoss_site.policy import POLICY, policy_digest
from invcoss_site.visit import visit

HALF = Interval(value=0.5, low=0.4, high=0.6)
FIGURES = AuditFigures(
    pool_images=64, train_images=33, heldout_images=22, copies=1, beyond=Interval(value=0.0625, low=0.02, high=0.15),
    refuse_share=0.1, closer=HALF, closer_by_chance=0.6, median_ratio=1.25, null_median_ratio=1.125,
    features_beyond=0.25, threshold=0.75, false_positive_rate=0.04,
)  # fmt: skip
SPENT = DpSpent(
    epsilon=2.5, visit_epsilon=1.25, delta=1e-5, noise_multiplier=1.5, statistics_noise=10, sample_rate=0.25, steps=2
)


def work(handoff, home, on_status):
    """A real visit, to whose report privacy spent is added; of an audit, the release."""
    if handoff.task.kind != "audit":
        report = visit(handoff, home, on_status)
        return report.model_copy(update={"dp": SPENT}) if handoff.dp else report
    pool = handoff.pools[0].artefact
    released = Artefact(sha256="e" * 64, size_bytes=pool.size_bytes - 4)
    release = Release(
        stage=0, pool=pool.sha256, released=released, dropped=(3, 7, 11, 60), figures=FIGURES, membership=HALF
    )
    counts = {"train_images": 33, "train_cases": 30, "heldout_images": 22, "quarantined_files": 1}
    return Report(
        run=handoff.run, hop=handoff.hop, sender=home.name, plan_digest=handoff.plan_digest,
        code_version=handoff.code_version, metrics=counts, release=release,
    )  # fmt: skip


class Coordinator:
    """Has one site do its hops, and fetches what they made."""

    def __init__(self, root):
        init_consortium(root / "chest", "chest", ("localhost",), 9443)
        write_phantoms(root / "sealed-images", "xray", 12, 0)
        request = init_site(root / "north", "north", root / "sealed-images")
        (root / "north" / POLICY).write_text("[cases]\nmin_train = 1\nmin_heldout = 1\n")
        join(root / "north", enrol_site(root / "chest", request.to_bytes()).to_bytes())
        self.home, self.store, self.count = load_home(root / "north"), ArtefactStore(root / "store"), 0
        self.courier = SignedCourier({"north": self.home}, load_signatures(root / "chest"))
        self.courier.start_work = work_here(work)

    def hop(self, hop, kind="train", run="demo", **changes):
        self.count += 1
        plain = hand_off(self.store)
        task = plain.task.model_copy(update={"kind": kind})
        model = self.store.put(model_to_bytes(build_model(task.model, task.families, seed=0)))
        pools = ()
        if kind == "audit":
            artefact = self.store.put(b"a pool that nobody opens here")
            pools = (Pool(stage=0, modality="xray", geometry=task.geometry, artefact=artefact),)
        values = {"task": task, "model": model, "pools": pools, "run": run, "hop": hop, "sequence": self.count}
        handoff = hand_off(self.store, audited=True, **(values | changes))
        deliver(self.courier, "north", handoff, self.store, CONFIG)
        report = wait(self.courier, "north", handoff, CONFIG, lambda status: None)
        for artefact in report.artefacts:
            fetch(self.courier, "north", artefact, self.store, CONFIG)
        return report


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The home of a site that trained with differential privacy, audited, and evaluated; then another run came."""
    coordinator = Coordinator(tmp_path_factory.mktemp("evidence"))
    trained = coordinator.hop("s00-train", dp={"noise_multiplier": 1.5})
    coordinator.hop("s00-audit", "audit", model=trained.model)
    coordinator.hop("s01-eval-00", "evaluate")
    coordinator.hop("s02-eval-01", "evaluate", run="again")
    return coordinator.home


@pytest.fixture
def copy(site, tmp_path):
    """A copy of the site's folder to tamper with."""
    shutil.copytree(site.root, tmp_path / "north")
    return load_home(tmp_path / "north")


def run_command(*arguments):
    done = CliRunner().invoke(cli.app, ["evidence", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def written(home, name="demo-s00"):
    """The page as the text that is read, and the JSON."""
    page = (home.root / "evidence" / f"{name}.html").read_text("utf-8")
    text = " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)).split())
    return text, json.loads((home.root / "evidence" / f"{name}.json").read_bytes())


def report_of(home, hop):
    return json.loads((home.hop_folder(hop) / "report.json").read_bytes())


def test_every_figure_is_that_of_the_records(site):
    told = json.loads(run_command(site.root, "s00", "--json"))
    text, evidence = written(site)
    assert told["failed"] == [] and "✓ Verified." in text and "NOT VERIFIED" not in text
    assert told["json"] == str(site.root / "evidence" / "demo-s00.json")
    works = {work["hop"]: work for work in evidence["works"]}
    assert list(works) == ["s00-train", "s00-audit", "s01-eval-00"]
    journal = [*records(site.root / "journal.jsonl")]
    for hop, work in works.items():
        report = report_of(site, hop)
        assert {n["name"]: n["value"] for n in work["numbers"]} == report["metrics"]
        assert all(
            n["unit"] == METRICS[n["name"]].unit and n["high"] == METRICS[n["name"]].high for n in work["numbers"]
        )
        assert (work["curve"], work["release"], work["dp"]) == (report["curve"], report["release"], report["dp"])
        assert work["report"] == sha256_file(site.hop_folder(hop) / "report.json")
        assert work["handoff"] == sha256_file(site.hop_folder(hop) / "handoff.json")
        assert {check["result"] for check in work["checks"]} == {"verified"}
        assert work["policy"] == evidence["policy_sha256"] == sha256_file(site.root / POLICY)
        accepted, done = (
            next(r for r in journal if (r["kind"], r.get("hop")) == (kind, hop)) for kind in ("accepted", "done")
        )
        assert (work["accepted"], work["done"]) == (accepted["time"], done["time"])
        assert work["signer"] in text and work["report"] in text and work["handoff"] in text and work["plan"] in text
        for record in (r for r in journal if r.get("report") == work["report"] and r["kind"] == "answered"):
            assert work["reports_sent"][work["report"]]["first"] <= record["time"]
        for left in work["artefacts"]:
            gets = [r for r in journal if r.get("verb") == "get" and r["artefact"] == left["sha256"]]
            assert left["sent"] == {
                "answers": len(gets), "bytes": sum(r["bytes"] for r in gets), "first": gets[0]["time"],
                "last": gets[-1]["time"],
            }  # fmt: skip
            assert left["sent"]["bytes"] > left["size_bytes"] == report[left["what"]]["size_bytes"]
            assert left["sha256"] == report[left["what"]]["sha256"]
    assert [left["what"] for left in works["s00-train"]["artefacts"]] == ["model", "statistics"]
    for value in (
        "60 of 64 images released, 4 dropped",
        "0.062 [0.020, 0.150]",
        "0.500 [0.400, 0.600]",
        "ε 1.25 in this visit, ε 2.5 over all",
    ):
        assert value in text
    assert str(verify(site.root / "journal.jsonl").head) == evidence["journal_head"]


def test_the_tensors_are_those_of_the_model_that_left(tmp_path):
    from safetensors import safe_open

    coordinator = Coordinator(tmp_path)
    report = coordinator.hop("s00-train")
    found = gather(coordinator.home, 0, None)
    for left, artefact in zip(found.works[0].artefacts, report.artefacts, strict=True):
        with safe_open(coordinator.store.path(artefact), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {tensor.name: tensor.shape for tensor in left.tensors} == shapes
    checks = {check.what: check.result for check in found.checks}
    assert checks["s00-train: model"] == checks["s00-train: statistics"] == "verified"
    path = coordinator.home.artefacts.path(report.model)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [check.what for check in gather(coordinator.home, 0, None).failed] == ["s00-train: model"]
    path.unlink()
    assert not gather(coordinator.home, 0, None).failed


def test_nothing_of_the_data_is_in_it(site):
    run_command(site.root, "s00")
    names = {path.name for path in (site.data).rglob("*") if path.is_file()}
    assert len(names) > 10
    words = names | {name.partition(".")[0] for name in names} - {"labels"} | {"sealed-images", str(site.root), ".pem"}
    for suffix in ("html", "json"):
        content = (site.root / "evidence" / f"demo-s00.{suffix}").read_text("utf-8")
        assert [word for word in words if word in content] == []
        assert "http" not in content and "<script" not in content and "src=" not in content


def alter(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def exchange_report(home):
    """A report of the same form with another figure, and the signature that was there."""
    report = report_of(home, "s00-audit")
    report["release"]["dropped"] = [3]
    (home.hop_folder("s00-audit") / "report.json").write_text(json.dumps(report))


def journal(home):
    return home.root / "journal.jsonl"


def a_line_less(home):
    lines = journal(home).read_bytes().splitlines(keepends=True)
    journal(home).write_bytes(b"".join([*lines[:-2], lines[-1]]))


def train(home, name):
    return home.hop_folder("s00-train") / name


TAMPERED = {
    "a record altered": ("journal", lambda h: alter(journal(h), b'"bytes":', b'"bytes":1')),
    "a record deleted": ("journal", a_line_less),
    "no record": ("journal", lambda h: alter(journal(h), b'"kind":"answered"', b'"kind":[{}]')),
    "no journal": ("journal", lambda h: journal(h).unlink()),
    "a release": ("s00-audit: report", exchange_report),
    "no report": ("s00-train: report", lambda h: train(h, "report.json").write_bytes(b"{}")),
    "a report unsigned": ("s00-train: report", lambda h: train(h, "report.signature").unlink()),
    "a hand-off": ("s00-train: hand-off", lambda h: alter(train(h, "handoff.json"), b'"seed":0', b'"seed":7')),
    "no hand-off": ("s00-train: hand-off", lambda h: train(h, "handoff.json").write_bytes(b"{}")),
    "signed by somebody else": (
        "s00-train: hand-off",
        lambda h: shutil.copy(train(h, "report.signature"), train(h, "handoff.signature")),
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_not_verified(copy, what):
    check, tamper = TAMPERED[what]
    tamper(copy)
    with pytest.raises(ChainError, match="NOT VERIFIED") as raised:
        run_command(copy.root, "s00")
    assert raised.value.exit_code == 10
    page, (text, evidence) = (copy.root / "evidence" / "demo-s00.html").read_text("utf-8"), written(copy)
    assert '<div class="verdict failed">' in page and "NOT VERIFIED What follows must not be relied on" in text
    assert "✓ Verified." not in text
    assert check in [c.what for c in gather(copy, 0, "demo").failed]
    assert str(copy.root) not in page and evidence["run"] == "demo"


def test_an_end_that_was_cut_off_is_found_against_the_head(copy):
    journal = copy.root / "journal.jsonl"
    head = str(verify(journal).head)
    assert not gather(copy, 0, "demo", (), parse_head(head)).failed
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert not gather(copy, 0, "demo").failed
    with pytest.raises(ChainError, match="the journal is truncated"):
        run_command(copy.root, "s00", "--head", head)


def test_what_the_spool_no_longer_holds_is_told_from_the_journal(site, copy):
    before = gather(site, 0, "demo").works[0]
    shutil.rmtree(copy.hop_folder("s00-train"))
    found = gather(copy, 0, "demo")
    work = found.works[0]
    assert not work.held and not found.failed
    assert (work.hop, work.accepted, work.done, work.handoff, work.report) == (
        before.hop, before.accepted, before.done, before.handoff, before.report
    )  # fmt: skip
    assert [(left.sha256, left.sent) for left in work.artefacts] == [(le.sha256, le.sent) for le in before.artefacts]
    assert (work.reports_sent, work.numbers, work.artefacts[0].tensors) == (before.reports_sent, (), ())
    run_command(copy.root, "s00")
    text = written(copy)[0]
    assert "What is no longer held is told from the journal alone" in text and "that is still held, holds" in text


@pytest.mark.parametrize("stage", ["0", "1", "s0", "s00-train"])
def test_a_stage_is_called_as_its_hops(site, stage):
    with pytest.raises(DataError, match=f"STAGE '{stage}': .* give s00"):
        cli.evidence(site.root, stage)


def test_runs_are_told_apart(site, tmp_path):
    assert [work.hop for work in gather(site, 1, None).works] == ["s02-eval-01"]
    assert gather(site, 1, "again").run == "again"
    for stage, run in ((1, "demo"), (7, None), (0, "nobody")):
        with pytest.raises(DataError, match=r"--run of one of these: s00 --run demo, s01 --run again$"):
            gather(site, stage, run)
    empty = write_home(tmp_path / "south", "south", tmp_path)
    with pytest.raises(DataError, match=r"one of these: nothing$"):
        gather(empty, 0, None)


def test_the_same_hop_of_a_later_run_takes_the_spool_and_not_the_evidence(tmp_path):
    coordinator = Coordinator(tmp_path)
    first = coordinator.hop("s00-train", run="first")
    for file in coordinator.store.folder.iterdir():
        file.unlink()  # or the coordinator would not fetch what it has
    second = coordinator.hop("s00-train", run="second", sequence=1, plan_digest="1" * 64)
    assert first.model == second.model  # the same seed and data
    home = coordinator.home
    with pytest.raises(DataError, match="s00 --run first, s00 --run second"):
        gather(home, 0, None)
    old, new = gather(home, 0, "first"), gather(home, 0, "second")
    assert (old.works[0].held, new.works[0].held) == (False, True) and not old.failed and not new.failed
    times = [r["time"] for r in records(home.root / "journal.jsonl") if r.get("verb") == "get"]
    lefts = [(*work.artefacts, work.reports_sent[work.report]) for work in (old.works[0], new.works[0])]
    assert [left.sent.answers for model_and_statistics in lefts for left in model_and_statistics[:2]] == [3, 1, 3, 1]
    assert lefts[0][0].sent.first == times[0] and lefts[1][0].sent.first == times[4]
    assert lefts[0][0].sha256 == lefts[1][0].sha256
    assert new.works[0].plan == "1" * 64 and old.works[0].plan == ""


def test_a_change_of_policy_since_is_told(copy):
    before = policy_digest(copy.root)
    (copy.root / POLICY).write_text("[cases]\nmin_train = 2\n")
    run_command(copy.root, "s00")
    text, evidence = written(copy)
    assert f"The work on s00-train began under another one: {before}" in text
    assert f"policy.toml, sha256 {evidence['policy_sha256']}" in text and evidence["policy_sha256"] != before
    assert evidence["policy"]["cases"] == {"min_train": 2, "min_heldout": 5}


def test_refusals_and_approvals_are_in_it(copy):
    from invcoss_site.journal import note

    for kind in ("approved", "denied"):
        note(copy, kind, {"run": "demo", "hop": "s01-eval-00"})
    note(copy, "refused", {"verb": "start", "hop": "s00-audit", "error": "TaskNotAllowed"})
    note(copy, "audited", {"run": "demo", "hop": "s00-audit", "pool": "a" * 64, "dropped": 4})
    note(copy, "refused", {"verb": "status", "hop": "s09-train", "error": "ProtocolError"})
    work = {work.hop: work for work in gather(copy, 0, "demo").works}
    assert [d["kind"] for d in work["s01-eval-00"].decisions] == ["approved", "denied"]
    assert [d["kind"] for d in work["s00-audit"].decisions] == ["refused", "audited"]
    run_command(copy.root, "s00")
    assert "refused hop s00-audit, error TaskNotAllowed, verb start" in written(copy)[0]


def test_earlier_keys_of_the_site_may_be_given(copy, site):
    from invcoss_common.keys import generate_signing_key, public_text, save_key

    old = load_signing_key(copy.root / "keys" / "signing.pem").public_key()
    save_key(generate_signing_key(), copy.root / "keys" / "signing.pem")
    assert gather(copy, 0, "demo").journal.result == "failed"
    found = gather(copy, 0, "demo", [old])
    assert not found.failed and found.site_key != fingerprint(key_digest(old))
    run_command(copy.root, "s00", "--key", public_text(old))


def test_in_a_simulation_nobody_signs_and_that_is_said(copy):
    (copy.root / "join.json").unlink()
    found = gather(copy, 0, "demo")
    assert not found.failed and {check.result for check in found.checks} == {"open"}
    run_command(copy.root, "s00")
    text = written(copy)[0]
    assert "Nothing contradicts, but not everything could be verified" in text and "✓ Verified." not in text
    assert sha256_hex((copy.root / "evidence" / "demo-s00.json").read_bytes()) in text
