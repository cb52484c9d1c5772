"""The command `export`: the model card, the plain-torch folder, and every mistake as one line that names the remedy."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.server.exports import DP, MODALITIES, images_for, make_run, plan_of, random_model, source_of, tokens_of

from invcoss_common.command import run_command
from invcoss_common.errors import ChainError, PlanError, WeightsError
from invcoss_common.weights import write_model
from invcoss_server.cli import app
from invcoss_server.export.encoder import Encoder
from invcoss_server.export.folder import export, fitting
from invcoss_server.export.huggingface import write_huggingface
from invcoss_server.export.source import ExportError, open_source

TOLERANCE = 1e-5
PLAN = """\
name = "four"
size = "nano"
seed = 5
train = { steps = 40 }
stages = [{ site = "a", modality = "xray" }, { site = "b", modality = "ct" }]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("run"))


def card_of(source, folder, site_names: bool = True) -> str:
    export(source, folder / "out", (), site_names)
    return (folder / "out" / "README.md").read_text(encoding="utf-8")


def rows(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head and rule left out."""
    lines = card.split(f"\n{heading}", 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


# --- the plain-torch folder


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_very_snippets_of_the_card_give_our_features(source, tmp_path, monkeypatch, modality):
    export(source, tmp_path / "out", ("hf",), site_names=True)
    folder = tmp_path / "out" / "hf"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert set(re.findall(r"^(?:import|from) (\w+)", "".join(snippets), re.M)) == {
        "json",
        "math",
        "typing",
        "torch",
        "safetensors",
    }
    monkeypatch.chdir(folder)
    found: dict[str, object] = {}
    exec("".join(snippets), found)
    assert found["tokens"].shape == (2, 65, 128)
    images = images_for(source, modality)
    ours = tokens_of(source, modality, images)
    assert float((found["encoder"](images) - ours).detach().abs().max()) <= TOLERANCE  # as in fine-tuning
    with torch.no_grad():
        assert float((found["encoder"](images) - ours).abs().max()) <= TOLERANCE


def test_a_model_of_sequences(tmp_path):
    make_run(tmp_path / "run", plan_of(("ecg",), modalities={"ecg": {"ndim": 1, "normalisation": "range"}}))
    source = open_source(tmp_path / "run", None, ())
    assert fitting(source) == ("onnx", "hf")
    assert encoded(source, tmp_path, "ecg") <= TOLERANCE
    with pytest.raises(ExportError, match="monai is for 2-D and 3-D images; this is a model of ecg"):
        export(source, tmp_path / "monai", ("monai",), site_names=True)


def encoded(source, folder, modality: str) -> float:
    """The largest difference between the features of the plain-torch export in a new folder, and ours."""
    write_huggingface(source, folder)
    config = json.loads((folder / "config.json").read_text())
    encoder = Encoder(**config["encoder"]).eval()
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    images = images_for(source, modality)
    with torch.no_grad():
        return float((encoder(images) - tokens_of(source, modality, images)).abs().max())


def test_the_folder_says_how_inputs_are_prepared(source, tmp_path):
    export(source, tmp_path / "out", ("hf",), site_names=True)
    text = (tmp_path / "out" / "hf" / "preprocessor_config.json").read_text()
    inputs = json.loads(text)
    assert (inputs["image_mean"], inputs["image_std"], inputs["value_range"]) == (0.5, 0.25, [0, 1])
    assert inputs["modalities"]["mri"] == {
        "family": "3d_4x8x8",
        "channels": 1,
        "size": [16, 32, 32],
        "patch": [4, 8, 8],
        "normalisation": "percentile",
        "low": 0.2,
        "high": 99.8,
    }
    header = (tmp_path / "out" / "hf" / "README.md").read_text().split("---\n")[1]
    assert "license: other\n" in header and "- pathology\n" in header


# --- the model card


def test_the_card_has_stages_counts_digests_and_ledger(source, tmp_path):
    card = card_of(source, tmp_path)
    stages = rows(card, "## Where it comes from")
    assert stages[0] == ["1 xray", "xray-clinic", "40 steps", "1,234", "600", "40", "0.000"]
    assert stages[3] == ["4 mri", "mri-clinic", "40 steps", "1,234", "600", "40", "0.516"]
    assert source.sha256 in card and source.plan.digest() in card
    newest = (source.folder / "ledger.jsonl").read_bytes().splitlines()[-1]
    assert f"{json.loads(newest)['n']} entries, chained, not signed" in card


def test_the_card_has_the_forgetting_matrix(source, tmp_path):
    matrix = rows(card_of(source, tmp_path), "## What it kept")
    assert [row[0] for row in matrix] == ["1 xray", "2 pathology", "3 ct", "4 mri", "**forgetting**"]
    assert matrix[1][1:3] == ["0.016", "0.172"]
    assert matrix[4][1:] == ["**+0.047**", "**+0.031**", "**+0.016**", ""]


def test_the_card_has_audits_and_says_that_there_is_no_differential_privacy(source, tmp_path):
    card = card_of(source, tmp_path)
    audits = rows(card, "## Privacy")
    assert audits[0] == ["1 xray", "4", "1", "25.0 % (12.5 to 25.0)", "1", "0.53 (0.42 to 0.65)"]
    assert "**Differential privacy: none.**" in card and "**Not a medical device**" in card


def test_the_card_has_the_privacy_that_was_spent(tmp_path):
    make_run(tmp_path / "run", plan_of(("xray",), dp={"noise_multiplier": 1.25}), dp=DP)
    card = card_of(open_source(tmp_path / "run", None, ()), tmp_path)
    spent = card.split("**Differential privacy**", 1)[1]
    assert "| 1 xray | 3.5 | 1e-05 | 1.25 | 0.1 | 40 |" in spent
    assert "Differential privacy: none" not in card


def test_the_card_can_leave_site_names_out(source, tmp_path):
    card = card_of(source, tmp_path, site_names=False)
    assert "clinic" not in card
    assert [row[1] for row in rows(card, "## Where it comes from")] == ["site 1", "site 2", "site 3", "site 4"]
    export(source, tmp_path / "all", ("timm", "monai", "hf"), site_names=False)
    texts = [path for path in (tmp_path / "all").rglob("*") if path.suffix in (".md", ".json", ".py")]
    assert len(texts) > 20 and not [path for path in texts if "clinic" in path.read_text(encoding="utf-8")]


def test_the_card_of_an_unfinished_run_is_of_its_newest_released_model(tmp_path):
    make_run(tmp_path / "run", plan_of(), released=2)
    source = open_source(tmp_path / "run", None, ())
    assert source.modalities == ("xray", "pathology")
    card = card_of(source, tmp_path)
    assert "2 of 4 stages were done" in card and "3 ct" not in card


def test_a_skipped_stage_is_not_learned(tmp_path):
    state = make_run(tmp_path / "run", plan_of(("xray", "ct")), released=1)
    state.move(1, "skipped")
    assert open_source(tmp_path / "run", None, ()).modalities == ("xray",)


def test_an_altered_ledger_makes_no_card(tmp_path):
    source = source_of(tmp_path / "run", ("xray",))
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"kind":"released-pool"', '"kind":"refused-pool"', 1))
    with pytest.raises(ChainError, match=r"ledger.jsonl: line \d+ does not follow"):
        export(source, tmp_path / "out", (), site_names=True)
    assert not (tmp_path / "out").exists()


# --- a file of weights


def test_a_file_of_weights_needs_its_plan_and_has_a_card_without_a_record(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    write_model(tmp_path / "model.safetensors", random_model(plan_of(("xray", "ct"))))
    with pytest.raises(PlanError, match="for a file of weights, name its plan with --plan"):
        open_source(tmp_path / "model.safetensors", None, ())
    source = open_source(tmp_path / "model.safetensors", tmp_path / "plan.toml", ("ct",))
    assert source.modalities == ("ct",) and source.families.keys() == {"3d_4x8x8"}
    card = card_of(source, tmp_path)
    assert "Its run is not on record here" in card and "## What it kept" not in card and "## Privacy" not in card


def test_a_file_of_an_early_stage_has_the_families_of_that_stage(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    write_model(tmp_path / "model.safetensors", random_model(plan_of(("xray",))))
    assert open_source(tmp_path / "model.safetensors", tmp_path / "plan.toml", ()).modalities == ("xray",)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: {"weight": torch.zeros(3)}, "it has no tokeniser; name the plan that it was made by"),
        (lambda t: t | {"tokenisers.2d_9x9.weight": torch.zeros(3)}, "it has the tokeniser '2d_9x9'"),
        (lambda t: {n: v for n, v in t.items() if n != "norm.bias"}, "tensor 'norm.bias' is missing"),
        (lambda t: t | {"norm.bias": torch.full((128,), torch.nan)}, "'norm.bias' holds NaN"),
        (lambda t: t | {"norm.bias": torch.zeros(64)}, r"'norm.bias' is \(64,\)"),
        (None, "not a safetensors file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, spoil, says):
    (tmp_path / "plan.toml").write_text(PLAN)
    file = tmp_path / "model.safetensors"
    if spoil is None:
        file.write_bytes(b"\x80\x04pickle")
    else:
        save_file(spoil(random_model(plan_of(("xray", "ct"))).state_dict()), file)
    with pytest.raises(WeightsError, match=rf"model.safetensors: .*{says}"):
        open_source(file, tmp_path / "plan.toml", ())


# --- other mistakes


def test_a_modality_that_the_model_lacks(source):
    with pytest.raises(WeightsError, match="has not learned 'ultrasound'; it has: xray, pathology, ct, mri"):
        open_source(source.folder, None, ("xray", "ultrasound"))


def test_a_folder_that_is_no_run_and_a_run_without_a_model(tmp_path):
    with pytest.raises(PlanError, match="there is no run here"):
        open_source(tmp_path, None, ())
    make_run(tmp_path / "runs" / "four", plan_of(), released=0)
    with pytest.raises(PlanError, match=r"is a consortium; name one of its runs: .*/runs/four"):
        open_source(tmp_path, None, ())
    with pytest.raises(PlanError, match="no stage of run 'four' is released yet"):
        open_source(tmp_path / "runs" / "four", None, ())


def test_a_model_that_is_missing_or_another(tmp_path):
    source = source_of(tmp_path / "run", ("xray",))
    model = tmp_path / "run" / "artefacts" / source.sha256
    tensors = load_file(model)
    save_file(tensors | {"norm.bias": torch.zeros(128)}, model)
    with pytest.raises(WeightsError, match="is not the model that the run's state names"):
        open_source(tmp_path / "run", None, ())
    model.unlink()
    with pytest.raises(WeightsError, match="the model of stage 1 is missing"):
        open_source(tmp_path / "run", None, ())


def test_a_folder_that_exists_is_never_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ExportError, match="out exists, and is never overwritten; choose another --out, or remove it"):
        export(source, tmp_path / "out", ("hf",), site_names=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_kill_leaves_nothing_by_the_name_of_the_folder(source, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(export.__globals__["WRITERS"], "monai", killed)
        export(source, tmp_path / "out", ("timm", "monai"), site_names=True)
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out", ("timm",), site_names=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def command(monkeypatch, capsys, *arguments: object) -> tuple[object, str, str]:
    monkeypatch.setattr("sys.argv", ["invcoss-server", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(app)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command(source, tmp_path, monkeypatch, capsys):
    arguments = (source.folder, "--format", "timm", "--format", "card", "--modality", "xray", "--out", tmp_path / "out")
    status, out, _ = command(monkeypatch, capsys, *arguments)
    assert not status and out.splitlines() == [
        f"model card: {tmp_path / 'out' / 'README.md'}",
        f"timm:       {tmp_path / 'out' / 'timm'}",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "timm"]
    status, _, err = command(monkeypatch, capsys, *arguments)
    assert status == 1 and err.startswith(f"error: {tmp_path / 'out'} exists") and len(err.splitlines()) == 1
    status, out, _ = command(
        monkeypatch, capsys, source.folder, "--format", "card", "--out", tmp_path / "card", "--json", "--modality", "ct"
    )
    assert json.loads(out) == {
        "out": str(tmp_path / "card"),
        "model_sha256": source.sha256,
        "formats": [],
        "modalities": ["ct"],
    }
