"""Whole visits and a run with differential privacy: what is charged when, what a kill changes, what leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from tests.federation.loopback import LoopbackCourier
from tests.federation.other_versions import site_of_version_1
from tests.federation.plans import tiny_plan

from invcoss_common.canonical import write_atomic
from invcoss_common.config import DpConfig, EvaluateConfig, ReplayConfig, TrainConfig
from invcoss_common.errors import BudgetSpent, DataError, ProtocolError
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.model import build_model
from invcoss_common.records import HandOff, Status, Task, to_bytes
from invcoss_common.weights import model_to_bytes
from invcoss_server.accept import check_report, check_statistics
from invcoss_server.relay import relay
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site import privacy, trainer, work
from invcoss_site import visit as visits
from invcoss_site.handoffs import keep
from invcoss_site.home import load_home, write_home
from invcoss_site.privacy import charged
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit

HOP = "s00-train"
XRAY = geometry_for(MODALITIES["xray"], "nano")
STEPS = 3
CASES, PER_CASE = 10, 2


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of ten cases, two each, and of one held-out case."""
    folder = tmp_path_factory.mktemp("images")
    lines = ["file,case,split"]
    for number in range(CASES * PER_CASE + 1):
        picture = np.random.default_rng(number).integers(0, 255, (70, 70), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        lines.append(f"{number}.png,c{number % CASES},train" if number < CASES * PER_CASE else f"{number}.png,h,test")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def home(images, tmp_path):
    site = write_home(tmp_path / "north", "north", images, ("labels.csv",))
    (site.root / "policy.toml").write_text("[cases]\nmin_heldout = 1\n")
    return site


def asked(home, **changes):
    """A hand-off for a private training, its model delivered; `changes` are of its fields."""
    task = Task(
        kind="train",
        stage=0,
        modality_name="xray",
        modality=MODALITIES["xray"],
        geometry=XRAY,
        spacing_mm=None,
        model=SIZES["nano"].model,
        families=(XRAY,),
        train=TrainConfig(steps=STEPS, batch_size=2, accumulate=2, checkpoint_every_s=1e-9),
        replay=ReplayConfig(),
        evaluate=EvaluateConfig(mask_draws=1),
        seed=0,
        threads=1,
    )
    model = home.artefacts.put(model_to_bytes(build_model(SIZES["nano"].model, [XRAY], seed=0)))
    values = {"run": "demo", "hop": HOP, "receiver": "north", "plan_digest": "0" * 64, "code_version": "0.1.0"}
    dp = DpConfig(noise_multiplier=1.0, statistics_noise=5.0)
    return HandOff.model_validate({**values, "task": task, "model": model, "dp": dp, **changes})


def run_visit(home, handoff=None, on_status=lambda status: None):
    return visit(handoff or asked(home), home, on_status)


def killed_when(home, phase, step, **how):
    def watch(status):
        if (status.phase, status.step) == (phase, step):
            raise Killed

    with pytest.raises(Killed):
        run_visit(home, on_status=watch, **how)


def weights(home, report):
    return load(home.artefacts.path(report.model).read_bytes())


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_report_says_what_was_spent_and_nothing_of_single_images(home):
    statuses = []
    report = run_visit(home, on_status=statuses.append)
    (one,) = charged(home.root)
    assert (one.noise_multiplier, one.statistics_noise, one.steps) == (1.0, 5.0, STEPS)
    assert one.sample_rate == 2 * 2 / CASES, "of cases, not of images"
    assert report.dp.epsilon == report.dp.visit_epsilon == privacy.epsilon([one], 1e-5)
    assert report.curve == ()
    assert len(statuses) > STEPS and {status.loss for status in statuses} == {0.0}
    assert (report.metrics["train_images"], report.metrics["train_cases"]) == (CASES * PER_CASE, CASES)
    handoff = asked(home)
    check_report(report, handoff)
    check_statistics(home.artefacts.path(report.statistics), report, handoff.task)
    shipped = load(home.artefacts.path(report.statistics).read_bytes())
    assert report.metrics["train_mim_loss"] == float(shipped["task_loss"]), "the noised one"


def test_epochs_are_passes_over_cases(home):
    task = asked(home).task
    task = task.model_copy(update={"train": task.train.model_copy(update={"steps": None, "epochs": 2})})
    assert run_visit(home, asked(home, task=task)).dp.steps == 2 * CASES / 4


KILLS = {"first": ("training", 1), "last": ("training", STEPS), "statistics": ("statistics", CASES)}
KILLS |= {"evaluation": ("evaluating", 1)}


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_visit_goes_on_to_the_same_release_and_is_charged_once(home, where):
    other = load_home(shutil.copytree(home.root, home.root.with_name("other")))
    killed_when(home, *KILLS[where])
    (spent,) = charged(home.root)
    secret = (home.secrets(HOP) / "dp-secret").read_bytes()
    report = run_visit(home)
    assert charged(home.root) == (spent,)
    # The same secret at another site, whose visit nobody kills.
    other.secrets(HOP).mkdir(parents=True)
    (other.secrets(HOP) / "dp-secret").write_bytes(secret)
    whole = run_visit(other)
    assert same(weights(home, report), weights(other, whole))
    assert report.statistics == whole.statistics
    assert report.dp == whole.dp


def test_the_secret_is_out_of_the_spool_for_its_owner_only_and_gone_when_the_hop_is_done(home):
    looked = []

    def looking(handoff, home, on_status):
        report = visit(handoff, home, on_status)
        (secret,) = home.secrets(HOP).iterdir()
        looked.append((secret.stat().st_mode & 0o777, secret.read_bytes()))
        assert home.spool not in secret.parents
        return report

    handoff = asked(home, audited=True)
    keep(home, handoff, to_bytes(handoff), "")
    write_atomic(home.hop_folder(HOP) / "status.json", to_bytes(Status(state="queued")))
    assert work.work(home, HOP, looking).state == "done"
    ((mode, secret),) = looked
    assert mode == 0o600
    assert not home.secrets(HOP).exists()
    files = [file for file in home.root.rglob("*") if file.is_file()]
    assert len(files) > 5 and not any(secret in file.read_bytes() for file in files)


def test_a_kill_right_after_the_charge_charges_once(home, monkeypatch):
    def kill(*given, **more):
        raise Killed

    monkeypatch.setattr(visits, "load_model", kill)
    with pytest.raises(Killed):
        run_visit(home)
    monkeypatch.undo()
    assert len(charged(home.root)) == 1
    assert run_visit(home).dp.epsilon == privacy.epsilon(charged(home.root), 1e-5)
    assert len(charged(home.root)) == 1


def test_nothing_is_trained_before_the_charge_is_on_disk(home, monkeypatch):
    def kill(*given, **more):
        raise Killed

    def look(model, images, *given, **more):
        assert len(charged(home.root)) == 1
        raise Killed

    monkeypatch.setattr(privacy, "write_atomic", kill)
    monkeypatch.setattr(visits, "train", lambda *given, **more: pytest.fail("trained, but not charged"))
    with pytest.raises(Killed):
        run_visit(home)
    assert charged(home.root) == ()
    monkeypatch.undo()
    monkeypatch.setattr(visits, "train", look)
    with pytest.raises(Killed):
        run_visit(home)


def test_asked_again_it_answers_with_the_same_release(home):
    first, second = run_visit(home), run_visit(home)
    assert (first.model, first.statistics, first.dp) == (second.model, second.statistics, second.dp)


def test_the_same_images_in_another_folder_are_the_same_release(home, images, tmp_path):
    first = run_visit(home)
    shutil.copytree(images, tmp_path / "moved")
    second = run_visit(write_home(home.root, "north", tmp_path / "moved", ("labels.csv",)))
    assert (first.model, first.statistics, first.dp) == (second.model, second.statistics, second.dp)
    assert len(charged(home.root)) == 1


REDONE = {
    "a lost folder": lambda home: [shutil.rmtree(folder) for folder in (home.hop_folder(HOP), home.secrets(HOP))],
    "a lost secret": lambda home: (home.secrets(HOP) / "dp-secret").unlink(),
    "another hand-off": lambda home: None,
    "other images": lambda home: None,
}


@pytest.mark.parametrize("why", REDONE)
def test_a_visit_done_anew_is_another_release_and_is_charged_again(home, images, tmp_path, why):
    first = run_visit(home)
    REDONE[why](home)
    handoff = asked(home, sequence=7) if why == "another hand-off" else asked(home)
    if why == "other images":
        others = shutil.copytree(images, tmp_path / "others")
        first_of_them = min(path for path in others.rglob("*.png"))
        Image.fromarray(255 - np.asarray(Image.open(first_of_them))).save(first_of_them)
        home = write_home(home.root, "north", others, ("labels.csv",))
    second = run_visit(home, handoff)
    assert len(charged(home.root)) == 2
    assert second.dp.epsilon == privacy.epsilon(charged(home.root), 1e-5) > first.dp.epsilon
    assert second.statistics != first.statistics, "other noise"
    if why == "a lost folder":  # in the others the checkpoint is there
        assert not same(weights(home, first), weights(home, second))


def test_a_visit_beyond_the_budget_is_refused_before_it_starts(home):
    spent = run_visit(home).dp.epsilon
    (home.root / "policy.toml").write_text(
        f"[cases]\nmin_heldout = 1\n[dp]\nmax_epsilon = {spent + 0.1}\nmax_delta = 1e-5\n"
    )
    shutil.rmtree(home.secrets(HOP))
    shutil.rmtree(home.hop_folder(HOP))
    before = charged(home.root)
    with pytest.raises(BudgetSpent, match=r"max_epsilon in policy\.toml"):
        run_visit(home)
    assert charged(home.root) == before
    assert not (home.hop_folder(HOP) / "checkpoint.safetensors").exists()


def test_without_opacus_nothing_is_trained(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    monkeypatch.setattr(visits, "train", lambda *given, **more: pytest.fail("trained"))
    with pytest.raises(DataError, match=r'pip install "invcoss\[dp\]"'):
        run_visit(home)
    assert charged(home.root) == ()


def test_a_visit_without_it_needs_no_opacus_and_charges_nothing(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    report = run_visit(home, asked(home, dp=None))
    assert report.dp is None and len(report.curve) == STEPS
    assert charged(home.root) == () and not home.secrets(HOP).exists()


def test_one_process_trains_it(home, monkeypatch):
    monkeypatch.setattr(work, "await_admission", lambda home, hop: asked(home))
    assert not work._trains(home, HOP)
    monkeypatch.setattr(work, "await_admission", lambda home, hop: asked(home, dp=None))
    assert work._trains(home, HOP)
    monkeypatch.setattr(trainer.ranks, "count", lambda: 2)
    with pytest.raises(AssertionError):
        trainer.train(None, None, XRAY, asked(home).task.train, seed=0, private=object())


def test_a_report_of_other_privacy_than_was_asked_for_is_refused(home):
    handoff, report = asked(home), run_visit(home)
    changes = [None] + [
        report.dp.model_copy(update={name: value})
        for name, value in (("delta", 1e-4), ("noise_multiplier", 0.9), ("statistics_noise", 4.0))
    ]
    for spent in changes:
        with pytest.raises(ProtocolError, match="other differential privacy"):
            check_report(report.model_copy(update={"dp": spent}), handoff)
    with pytest.raises(ProtocolError, match="other differential privacy"):
        check_report(report, asked(home, dp=None))


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_trains_with_it_evaluates_without_and_puts_it_on_record(tmp_path):
    plan = tiny_plan(dp={"noise_multiplier": 0.9, "statistics_noise": 4.0, "delta": 1e-4})
    homes = {site: simulated_home(plan, site, None, tmp_path) for site in plan.sites}
    relay(plan, LoopbackCourier(homes, visit), tmp_path / "run", synthesise_here)
    state = RunState(tmp_path / "run" / "state.db", plan)
    trained = {hop.hop: hop.report.dp for hop in state.hops() if hop.report.dp}
    assert set(trained) == {"s00-train", "s01-train"}
    assert state.hand_off("s00-train").dp == plan.dp and state.hand_off("s01-eval-00").dp is None
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    entered = {entry["hop"]: entry for entry in ledger if entry["kind"] == "accepted"}
    for hop, spent in trained.items():
        assert (entered[hop]["epsilon"], entered[hop]["delta"]) == (repr(spent.epsilon), "0.0001")
    assert "epsilon" not in entered["s01-eval-00"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "δ = 0.0001" in page
    assert all(f"{spent.epsilon:.3g}" in page for spent in trained.values())


def test_a_site_of_version_1_is_told_apart(tmp_path):
    plan = tiny_plan(("xray",), dp={})
    homes = {site: simulated_home(plan, site, None, tmp_path) for site in plan.sites}
    courier = LoopbackCourier(homes, visit, {"xray-site": site_of_version_1})
    with pytest.raises(
        ProtocolError, match="site 'xray-site' speaks protocol 1, which has none; it came with protocol 2"
    ):
        relay(plan, courier, tmp_path / "run", synthesise_here)
    assert not charged(homes["xray-site"].root)
