"""The site's policy: its file and its generated documentation, and every rule of it as a row of a table."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from tests.federation.test_desk import hand_off
from typer.testing import CliRunner

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.checkup import Doubt
from invcoss_common.config import DpConfig, TrainConfig
from invcoss_common.errors import (
    AuditRequired,
    DataError,
    DpRequired,
    LimitExceeded,
    OutsideHours,
    PlanNotAllowed,
    TaskNotAllowed,
    TooFewCases,
)
from invcoss_common.keys import generate_ec_key, generate_signing_key, public_text
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.model import build_model
from invcoss_common.phantoms import _PHANTOMS
from invcoss_common.records import Artefact, Pool
from invcoss_site import cli, doctor, policy
from invcoss_site.enrol import TRIAL_CASES, init_site
from invcoss_site.inventory import take_inventory
from invcoss_site.permission import check, check_hours, check_images, check_size, check_worked
from invcoss_site.policy import POLICY, SitePolicy, load_policy, policy_text, readable_policy, settings

KEY = public_text(generate_signing_key().public_key())
PLAN, OTHER = "0" * 64, "1" * 64
GB = 10**9


def of(**tables):
    return SitePolicy.model_validate(tables)


# The file


def test_without_a_file_the_defaults_hold_and_one_that_says_nothing_is_the_same(tmp_path):
    assert load_policy(tmp_path) == SitePolicy()
    (tmp_path / POLICY).write_text(policy_text())
    assert load_policy(tmp_path) == SitePolicy()


def test_every_setting_of_the_generated_file_can_be_switched_on_alone_and_together():
    lines = policy_text().splitlines()
    switched_off = [number for number, line in enumerate(lines) if re.match(r"#\w+ = ", line)]
    found = [lines[number].removeprefix("#").partition(" = ")[0] for number in switched_off]
    assert found == [setting.name for setting in settings(SitePolicy())]
    for number in switched_off:
        one = [line.removeprefix("#") if at == number else line for at, line in enumerate(lines)]
        SitePolicy.model_validate(tomllib.loads("\n".join(one)))
    all_on = [line.removeprefix("#") if at in switched_off else line for at, line in enumerate(lines)]
    everything = SitePolicy.model_validate(tomllib.loads("\n".join(all_on)))
    unset = [f"{s.table}.{s.name}" for s in settings(SitePolicy()) if s.value is None]
    assert [f"{s.table}.{s.name}" for s in settings(everything) if not s.is_default] == unset


def test_every_setting_and_table_says_what_it_is():
    assert all(len(setting.description) > 10 and setting.description != "None" for setting in settings(SitePolicy()))
    assert all(len(line) <= 120 for line in policy_text().splitlines())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[work]\nmax_epoch = 3\n", r"policy\.toml: work\.max_epoch: no such setting; check the spelling"),
        ("[work]\nmax_steps = 0\n", r"policy\.toml: work\.max_steps: "),
        ('[work]\nkinds = ["look"]\n', r"policy\.toml: work\.kinds\.0: "),
        ('[work]\nhours = "8-17"\n', r"policy\.toml: work\.hours: "),
        ('[work]\nhours = "08:00-08:00"\n', r"work\.hours: begins and ends at the same minute"),
        ('[trust]\nplans = ["abc"]\n', r"policy\.toml: trust\.plans\.0: "),
        ('[trust]\ncoordinators = ["ssh-rsa AAAA"]\n', r"trust\.coordinators\.0: not a public key"),
        ("[dp]\nmax_epsilon = inf\n", r"policy\.toml: dp\.max_epsilon: "),
        ("[work\n", r"policy\.toml: not a TOML file"),
        (b"\xff", r"policy\.toml: not a TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_setting(tmp_path, text, says):
    (tmp_path / POLICY).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=says):
        load_policy(tmp_path)
    with pytest.raises(DataError):
        readable_policy(tmp_path)


def test_who_may_not_read_the_policy_has_none_which_is_not_the_default(tmp_path, monkeypatch):
    assert readable_policy(tmp_path) == SitePolicy()
    (tmp_path / POLICY).write_text("[work]\nmax_steps = 3\n")
    assert readable_policy(tmp_path) == of(work={"max_steps": 3})
    monkeypatch.setattr(policy.os, "access", lambda path, mode: False)  # the tests may run as root, who may read all
    assert readable_policy(tmp_path) is None


def test_init_writes_the_file_and_never_over_one(tmp_path):
    (tmp_path / "images").mkdir()
    init_site(tmp_path / "north", "north", tmp_path / "images")
    assert (tmp_path / "north" / POLICY).read_text() == policy_text()
    (tmp_path / "south").mkdir()
    (tmp_path / "south" / POLICY).write_text("[work]\nmax_steps = 3\n")
    init_site(tmp_path / "south", "south", tmp_path / "images")
    assert load_policy(tmp_path / "south") == of(work={"max_steps": 3})


# The rules that need the hand-off alone

DP = DpConfig(noise_multiplier=1.0, delta=1e-5)
REFUSED = {
    "another plan": ({"trust": {"plans": [OTHER]}}, {}, PlanNotAllowed, r"plans .* add it"),
    "a kind": ({"work": {"kinds": ["evaluate", "audit"]}}, {}, TaskNotAllowed, r"'train' .*\[work\] kinds"),
    "a modality": ({"work": {"modalities": ["ct", "mri"]}}, {}, TaskNotAllowed, r"'xray' .*modalities .* ct, mri"),
    "steps": ({"work": {"max_steps": 1}}, {}, LimitExceeded, r"2 steps, and \[work\] max_steps in policy.toml is 1$"),
    "epochs": ({"work": {"max_epochs": 4.5}}, {"train": {"epochs": 5}}, LimitExceeded, r"5 epochs, .*_epochs .* 4\.5$"),
    "parameters": ({"work": {"max_parameters": 763_039}}, {}, LimitExceeded, r"763,040 parameters, .* is 763,039$"),
    "parameters of every kind": (
        {"work": {"max_parameters": 1000}}, {"kind": "evaluate"}, LimitExceeded, "max_parameters"
    ),
    "disk": ({"work": {"max_disk_gb": 1.5}}, {"pools": 2}, LimitExceeded, r"2\.\d+ GB, .*max_disk_gb .* is 1\.5$"),
    "no privacy": ({"dp": {"required": True}}, {}, DpRequired, r"without differential privacy, .*\[dp\] required"),
    "little noise": ({"dp": {"min_noise_multiplier": 1.1}}, {"dp": DP}, DpRequired, r"noise of 1, .* is 1\.1$"),
    "large delta": ({"dp": {"max_delta": 1e-6}}, {"dp": DP}, DpRequired, r"delta of 1e-05, .*max_delta .* is 1e-06$"),
    "no audit": ({}, {"audited": False}, AuditRequired, r"relay\.audit .* protocol 2\), and \[audit\] required"),
    "an old protocol, without audit": ({}, {"protocol": 1}, AuditRequired, r"protocol 1\)"),
}  # fmt: skip
ALLOWED = {
    "everything by default": ({}, {}),
    "this plan": ({"trust": {"plans": [OTHER, PLAN]}}, {}),
    "this kind and modality": ({"work": {"kinds": ["train"], "modalities": ["xray"]}}, {}),
    "as many steps and parameters": ({"work": {"max_steps": 2, "max_parameters": 763_040}}, {}),
    "as many epochs": ({"work": {"max_epochs": 5}}, {"train": {"epochs": 5}}),
    "an evaluation of any length": ({"work": {"max_steps": 1}}, {"kind": "evaluate"}),
    "enough disk": ({"work": {"max_disk_gb": 2.1}}, {"pools": 2}),
    "privacy": ({"dp": {"required": True, "min_noise_multiplier": 1, "max_delta": 1e-5}}, {"dp": DP}),
    "an evaluation without privacy and audit": (
        {"dp": {"required": True}}, {"kind": "evaluate", "audited": False}
    ),
    "no audit where none is required": ({"audit": {"required": False}}, {"audited": False}),
    "an old protocol where no audit is required": ({"audit": {"required": False}}, {"protocol": 1}),
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """`made(**changes)` is a hand-off; `kind`, `train` change its task, `pools` is a number of pools of 1 GB."""

    def make(pools=0, kind="train", train=None, **changes):
        handoff = hand_off(ArtefactStore(tmp_path), plan_digest=PLAN, **changes)
        task = handoff.task.model_copy(update={"kind": kind, "train": TrainConfig(**train or {"steps": 2})})
        large = Artefact(sha256="a" * 64, size_bytes=GB)
        pool = Pool(stage=0, modality="xray", geometry=task.geometry, artefact=large)
        return handoff.model_copy(update={"task": task, "pools": (pool,) * pools})

    return make


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_policy_refuses(made, case):
    tables, changes, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        check(of(**tables), made(**changes))


@pytest.mark.parametrize("case", ALLOWED)
def test_what_the_policy_allows(made, case):
    tables, changes = ALLOWED[case]
    check(of(**tables), made(**changes))


@pytest.mark.parametrize("size", ["nano", "tiny", "small"])
def test_parameters_are_counted_as_the_model_is_built(size):
    geometries = [geometry_for(modality, size) for modality in MODALITIES.values()]
    for families in (geometries[:1], geometries[2:3], geometries):
        model = build_model(SIZES[size].model, families, 0)
        assert SIZES[size].model.parameters(families) == sum(p.numel() for p in model.parameters())


# The rules that need the images, the time or a size


def images(train=40, train_cases=20, heldout_cases=10):
    return train, train_cases, heldout_cases


IMAGES_REFUSED = {
    "training cases": ({"cases": {"min_train": 21}}, {}, TooFewCases, r"20 training cases of xray, .*min_train .* 21$"),
    "held-out cases": ({"cases": {"min_heldout": 11}}, {}, TooFewCases, r"10 held-out cases of xray, .*min_heldout"),
    "held-out cases of an evaluation": ({"cases": {"min_heldout": 11}}, {"kind": "evaluate"}, TooFewCases, "held-out"),
    "held-out cases of an audit": ({"cases": {"min_heldout": 11}}, {"kind": "audit"}, TooFewCases, "held-out"),
    "steps that are many epochs": (
        {"work": {"max_epochs": 10}}, {"train": {"steps": 51, "batch_size": 4, "accumulate": 2}}, LimitExceeded,
        r"10\.2 epochs, and \[work\] max_epochs in policy\.toml is 10$"
    ),
    "epochs that are many steps": (
        {"work": {"max_steps": 49}}, {"train": {"epochs": 10, "batch_size": 8}}, LimitExceeded, "50 steps, .*max_steps"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES_REFUSED)
def test_what_is_refused_once_the_images_are_known(made, case):
    tables, changes, error, says = IMAGES_REFUSED[case]
    with pytest.raises(error, match=says):
        check_images(of(**tables), made(**changes).task, *images())


def test_what_is_allowed_once_the_images_are_known(made):
    enough = of(cases={"min_train": 20, "min_heldout": 10}, work={"max_epochs": 10, "max_steps": 50})
    for train in ({"steps": 50, "batch_size": 8}, {"epochs": 10, "batch_size": 8}):
        check_images(enough, made(train=train).task, *images())
    few = of(cases={"min_train": 21, "min_heldout": 10}, work={"max_epochs": 1})
    for kind in ("evaluate", "audit"):  # which train on nothing
        check_images(few, made(kind=kind).task, *images())


def test_hours_of_the_day():
    check_hours(SitePolicy(), "12:00")
    night = of(work={"hours": "18:00-07:00"})
    for clock in ("18:00", "23:59", "06:59"):
        check_hours(night, clock)
    for clock in ("07:00", "17:59"):
        with pytest.raises(OutsideHours, match=rf"it is {clock}, and \[work\] hours in policy.toml is 18:00-07:00"):
            check_hours(night, clock)


def test_hours_of_work_and_room():
    check_worked(SitePolicy(), 1e9)
    check_worked(of(work={"max_hours": 2}), 7200)
    with pytest.raises(LimitExceeded, match=r"2\.5 hours, and \[work\] max_hours in policy.toml is 2$"):
        check_worked(of(work={"max_hours": 2}), 9000)
    check_size(of(work={"max_disk_gb": 1}), GB)
    with pytest.raises(LimitExceeded, match="max_disk_gb"):
        check_size(of(work={"max_disk_gb": 1}), GB + 10**7)


@pytest.mark.parametrize("modality", _PHANTOMS)
def test_the_made_up_images_of_a_trial_are_enough_for_the_default_policy(tmp_path, modality):
    for number in range(TRIAL_CASES):
        (tmp_path / f"{modality}-{number:04d}{_PHANTOMS[modality].suffix}").touch()
    items = take_inventory(tmp_path, MODALITIES[modality]).items
    held_out = sum(item.held_out for item in items)
    assert held_out >= SitePolicy().cases.min_heldout
    assert len(items) - held_out >= SitePolicy().cases.min_train


# What people see


def shown(*arguments):
    done = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_shows_what_is_in_force(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "is not there: the defaults hold" in shown("policy", tmp_path)
    (tmp_path / POLICY).write_text(f'[trust]\nplans = ["{PLAN}"]\n[work]\nmax_epochs = 3\n')
    assert json.loads(shown("policy", tmp_path, "--json")) == load_policy(tmp_path).model_dump(mode="json")
    lines = shown("policy", tmp_path).splitlines()
    row = next(line for line in lines if "work.max_epochs" in line)
    assert re.search(r"work\.max_epochs\s.*3\.0\s.*no\s.*passes over", row)
    assert lines[-1] == f"from {tmp_path / POLICY}"


SURPRISES = {
    "": "any plan of the coordinator is done, unasked",
    "[trust]\napproval = true\n": None,
    f'[trust]\nplans = ["{PLAN}"]\n': None,
    f'[trust]\napproval = true\ncoordinators = ["{KEY}"]\n': "further keys",
    "[trust]\napproval = true\n[cases]\nmin_heldout = 2\n": "fewer cases than by default",
    "[trust]\napproval = true\n[audit]\nrequired = false\n": "without this site's audit",
    "[trust]\napproval = true\n[dp]\nrequired = true\n": "spent without limit",
    "[trust]\napproval = true\n[dp]\nrequired = true\nmax_epsilon = 3\n": None,
}


@pytest.mark.parametrize("text", SURPRISES)
def test_doctor_tells_what_may_surprise(tmp_path, text):
    (tmp_path / POLICY).write_text(text)
    found, doubt = doctor._policy(tmp_path), SURPRISES[text]
    assert isinstance(found, Doubt) == (doubt is not None)
    assert found == str(tmp_path / POLICY) if doubt is None else doubt in found


def test_doctor_says_when_there_is_no_file_and_when_it_is_wrong(tmp_path):
    assert f"{POLICY} is not there, so the defaults hold" in doctor._policy(tmp_path)
    (tmp_path / POLICY).write_text("[work]\nmax_step = 1\n")
    with pytest.raises(DataError, match="max_step"):
        doctor._policy(tmp_path)


def test_only_a_signing_key_can_be_a_coordinator_s():
    assert of(trust={"coordinators": [KEY]}).trust.coordinators == (KEY,)
    node_key = public_text(generate_ec_key().public_key())
    with pytest.raises(ValueError, match="coordinators"):
        of(trust={"coordinators": [node_key]})


DOCS = (Path(__file__).parents[2] / "docs" / "policy.md").read_text("utf-8")


def test_the_docs_have_every_setting_in_the_table_of_its_own():
    tables = re.split(r"^\| `\[(\w+)\]` \|", DOCS, flags=re.MULTILINE)[1:]
    named = {
        (table, name)
        for table, rows in zip(tables[::2], tables[1::2], strict=True)
        for row in re.findall(r"^\| (`.*?) \|", rows.partition("\n\n")[0], flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {(setting.table, setting.name) for setting in settings(SitePolicy())}


def test_the_example_in_the_docs_is_a_policy(tmp_path):
    (tmp_path / POLICY).write_text(re.findall(r"```toml\n(.*?)```", DOCS, flags=re.DOTALL)[0])
    careful = load_policy(tmp_path)
    assert careful.trust.approval and careful.dp.required and careful.work.hours == "19:00-05:00"
    assert not isinstance(doctor._policy(tmp_path), Doubt)
