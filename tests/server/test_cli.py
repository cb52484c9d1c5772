"""The command line: every mistake a user can make is one line on stderr with its own exit code, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from invcoss_common.config import load_plan
from invcoss_common.model import build_model

PLANS = Path(__file__).parents[2] / "plans"


def run(command, *arguments):
    code = f"import sys; from {command}.cli import main; sys.argv[0] = 'invcoss'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def changed(path, old, new):
    text = (PLANS / "demo.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('modality = "xray"', 'modality = "xrya"', "unknown modality 'xrya'; known are ct, mri, pathology, xray"),
        ("batch_size = 32", "batchsize = 32", "train.batchsize: no such field; check the spelling"),
        ('size = "nano"', 'size = "huge"', "size: "),
        ("pool_size = 32", "pool_size = 1", "inversion.pool_size: "),
        ("steps = 250", "steps = -1", "train.steps: "),
        ("phantoms = 300", "phantoms = 1", "simulation.chest-clinic.phantoms: "),
        ("[simulation.chest-clinic]", "[simulation.chest-clinix]", "sites that no stage visits: chest-clinix"),
        ("steps = 250", "steps = ", "not a TOML file"),
    ],
)
def test_a_plan_that_cannot_be_run_is_one_line_and_exit_code_3(tmp_path, old, new, says):
    plan = changed(tmp_path / "plan.toml", old, new)
    status, _, err = run("invcoss_server", "simulate", plan, "--out", tmp_path / "out")
    assert status == 3, err
    assert err.startswith("error: ")
    assert says in err
    assert "plan.toml" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_and_missing_data(tmp_path):
    status, _, err = run("invcoss_server", "simulate", tmp_path / "none.toml")
    assert (status, len(err.splitlines())) == (3, 1)
    assert "can't read the plan" in err
    status, _, err = run("invcoss_server", "simulate", PLANS / "real-small.toml", "--out", tmp_path / "out")
    assert (status, len(err.splitlines())) == (4, 1)
    assert "--data" in err
    status, _, err = run(
        "invcoss_server", "simulate", PLANS / "real-small.toml", "--data", tmp_path, "--out", tmp_path / "out"
    )
    assert (status, len(err.splitlines())) == (4, 1)
    assert "no such folder" in err


def test_check_plan_prints_what_a_plan_amounts_to():
    status, out, _ = run("invcoss_server", "check-plan", PLANS / "paper.toml")
    assert status == 0
    assert "16x192x192" in out
    assert "300 epochs" in out


def test_check_data_says_what_is_used_and_what_is_not(tmp_path):
    assert run("invcoss_site", "phantoms", tmp_path / "a", "--modality", "xray", "--cases", 10)[0] == 0
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG")
    status, out, _ = run("invcoss_site", "check-data", tmp_path / "a", "--modality", "xray")
    assert status == 0
    assert "not used: 1" in out
    assert "broken.png: " in out
    status, out, _ = run(
        "invcoss_site", "check-data", tmp_path / "a", "--modality", "xray", "--index", "labels.csv", "--json"
    )
    assert json.loads(out)["images"] == {"train": 8, "heldout": 2, "train_cases": 8, "heldout_cases": 2}


def test_check_data_names_what_is_odd_and_a_pattern_chooses(tmp_path):
    assert run("invcoss_site", "phantoms", tmp_path, "--modality", "mri", "--cases", 10)[0] == 0
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b")
    status, out, _ = run("invcoss_site", "check-data", tmp_path, "--modality", "mri", "--only", "mri-*")
    assert status == 0
    assert "not used: 0" in out
    assert f"RAS: 10, first {tmp_path / 'mri-0000.nii.gz'}" in out
    assert run("invcoss_site", "phantoms", tmp_path / "x", "--modality", "xray", "--cases", 10)[0] == 0
    with Image.open(tmp_path / "x" / "xray-0000.png") as film:
        film.crop((0, 0, 160, 40)).save(tmp_path / "x" / "long.png")
    status, out, _ = run("invcoss_site", "check-data", tmp_path / "x", "--modality", "xray")
    assert "used, but look at them: 1" in out
    assert "long.png: 160 x 40 pixels" in out
    status, out, _ = run("invcoss_site", "check-data", tmp_path / "x", "--modality", "xray", "--json")
    assert len(json.loads(out)["warnings"]) == 1


@pytest.mark.parametrize("make", ["missing", "empty", "one"])
def test_a_useless_folder_is_one_line_and_exit_code_4(tmp_path, make):
    folder = tmp_path / "images"
    if make != "missing":
        folder.mkdir()
    if make == "one":
        assert run("invcoss_site", "phantoms", folder, "--modality", "xray", "--cases", 1)[0] == 0
        (folder / "labels.csv").unlink()
    status, _, err = run("invcoss_site", "check-data", folder, "--modality", "xray")
    assert status == 4
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_an_unknown_modality_is_exit_code_3(tmp_path):
    assert run("invcoss_site", "phantoms", tmp_path / "a", "--modality", "xrya")[0] == 3
    assert run("invcoss_site", "check-data", tmp_path, "--modality", "xrya")[0] == 3


@pytest.fixture(scope="module")
def weights():
    """The tensors of the demo plan's model."""
    plan = load_plan(PLANS / "demo.toml")
    geometries = [plan.geometry(number) for number in range(4)]
    return dict(build_model(plan.model_shape, geometries, 0).state_dict())


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: without(t, "cls_token"), "'cls_token' is missing"),
        (lambda t: t | {"patients": torch.zeros(3)}, "does not have, such as 'patients'"),
        (lambda t: t | {"cls_token": torch.zeros(1, 2, 128)}, "'cls_token' is (1, 2, 128)"),
        (lambda t: t | {"cls_token": torch.full((1, 1, 128), torch.nan)}, "'cls_token' holds NaN"),
        (lambda t: t | {"cls_token": torch.zeros(1, 1, 128, dtype=torch.float16)}, "torch.float16"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_and_exit_code_5(tmp_path, weights, spoil, says):
    save_file(spoil(weights), tmp_path / "model.safetensors")
    status, _, err = run("invcoss_server", "check-model", PLANS / "demo.toml", tmp_path / "model.safetensors")
    assert status == 5, err
    assert says in err
    assert len(err.splitlines()) == 1


def test_weights_that_fit_and_files_that_are_none(tmp_path, weights):
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    assert run("invcoss_server", "check-model", PLANS / "demo.toml", file)[0] == 0
    save_file(weights, file, {"note": "patient 7"})
    status, _, err = run("invcoss_server", "check-model", PLANS / "demo.toml", file)
    assert (status, len(err.splitlines())) == (5, 1)
    assert "metadata" in err
    torch.save(weights, file)
    status, _, err = run("invcoss_server", "check-model", PLANS / "demo.toml", file)
    assert (status, len(err.splitlines())) == (5, 1)
    assert "not a safetensors file" in err
    status, _, err = run("invcoss_server", "check-model", PLANS / "demo.toml", tmp_path / "none")
    assert (status, len(err.splitlines())) == (5, 1)
