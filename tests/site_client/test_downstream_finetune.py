"""Each published task end to end in miniature; resuming after a kill; what is wrong is said before training begins."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.site_client import published
from typer.testing import CliRunner

from invcoss_common.errors import DataError, PlanError, TrainingError, WeightsError
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.model import build_model
from invcoss_common.weights import write_model
from invcoss_site.cli import app
from invcoss_site.downstream import table
from invcoss_site.downstream.finetune import CaseResult, Result, Start, finetune, look_through, new_model
from invcoss_site.downstream.metrics import Score
from invcoss_site.downstream.model import entering
from invcoss_site.downstream.sets import find_cases
from invcoss_site.downstream.sets.cases import of_split
from invcoss_site.downstream.task import TASKS
from invcoss_site.downstream.train import BEST, LAST, Machine, learning_rate, task_loss

torch.set_num_threads(1)

CPU = Machine(torch.device("cpu"), keep_mb=100)
SIZE = {1: (16,), 2: (32, 32), 3: (8, 16, 16)}
MAKERS = {
    "pubmed20k": published.pubmed,
    "chestxr": published.chestxr,
    "qatav2": published.qata,
    "ricord": published.ricord_resized,
    "lits": published.lits,
    "vs": published.vs_prepared,
    "la": published.la_prepared,
    "nct-crc-he": published.nct,
    "glas": published.glas,
}


def small(name, **changes):
    """The published task on inputs that a nano model sees in milliseconds."""
    task = TASKS[name]
    recipe = {
        "size": SIZE[task.ndim],
        "epochs": 1,
        "iterations": 2,
        "check_every": None,
        "batch": 2,
        "spacing_mm": None,
    }
    return task.model_copy(update=recipe | changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    families = [geometry_for(MODALITIES[name], "nano") for name in ("xray", "ct")]
    write_model(path, build_model(SIZES["nano"].model, families, seed=5))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_a_published_task_trains_validates_tests_and_saves_what_it_predicts(tmp_path, weights, name):
    MAKERS[name](tmp_path / "data")
    task = small(name)
    cases = find_cases(task, tmp_path / "data")
    look_through(task, cases, lambda done, of: None)
    out = tmp_path / "out"
    result = finetune(task, cases, Start(weights), out, 0, CPU)
    tests = of_split(cases, "test")
    assert [case.id for case in result.cases] == [case.id for case in tests]
    assert set(result.scores) >= ({"dice", "hd95_voxels"} if task.kind == "segment" else {"acc", "auc", "f1"})
    assert (out / BEST).exists() == (task.picked == "best") == (result.validation is not None)
    if task.kind == "classify":
        rows = list(csv.DictReader((out / "predictions/classes.csv").read_text().splitlines()))
        assert [row["id"] for row in rows] == [case.id for case in tests]
        assert sum(float(rows[0][f"p_{kind}"]) for kind in task.classes) == pytest.approx(1, abs=1e-5)
        right = [row["label"] == row["predicted"] for row in rows]
        assert result.scores["acc"][0] == pytest.approx(np.mean(right))
    else:
        masks, overlays = ([*(out / "predictions" / kind).iterdir()] for kind in ("masks", "overlays"))
        assert len(masks) == len(overlays) == len(tests)
        if task.ndim == 2:
            with Image.open(masks[0]) as mask, Image.open(tests[0].files[0]) as image:
                assert mask.size == image.size
        elif name == "lits":
            assert nib.load(masks[0]).shape == (20, 18, 10)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [1, 2]
    before = (out / LAST).stat().st_mtime_ns
    assert finetune(task, cases, Start(weights), out, 0, CPU) == result  # done is done
    assert (out / LAST).stat().st_mtime_ns == before


def made(folder):
    folder.mkdir(parents=True)
    return folder


# --- going on


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path, weights):
    published.qata(tmp_path / "data")
    task = small("qatav2", epochs=3)
    script = f"""
        import os, signal
        from pathlib import Path
        from tests.site_client.test_downstream_finetune import CPU, Start, find_cases, finetune, small
        task = small("qatav2", epochs=3)
        def die(standing):
            if standing.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        start = Start(Path({str(weights)!r}))
        finetune(task, find_cases(task, Path({str(tmp_path / "data")!r})), start, Path({str(tmp_path / "killed")!r}), 7, CPU, die)
    """  # noqa: E501 - of a script
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert load_file(tmp_path / "killed" / LAST)["counters"][0] == 2  # one step was lost
    cases = find_cases(task, tmp_path / "data")
    time.sleep(1)  # TensorBoard orders its files by the second; starting a program anew takes longer
    steps = []
    again = finetune(
        task, cases, Start(weights), tmp_path / "killed", 7, CPU, lambda standing: steps.append(standing.step)
    )
    assert steps == [3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "killed" / "tensorboard")).Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]  # each once
    whole = finetune(task, cases, Start(weights), tmp_path / "whole", 7, CPU)
    assert again.cases == whole.cases and again.picked_step == whole.picked_step
    a, b = (load_file(tmp_path / run / LAST) for run in ("killed", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a if name != "seconds")
    other = finetune(task, cases, Start(weights), tmp_path / "other", 8, CPU)
    assert other.cases != whole.cases  # the seed matters


def test_a_folder_with_another_run_is_refused(tmp_path, weights):
    published.chestxr(tmp_path / "data")
    task = small("chestxr")
    cases = find_cases(task, tmp_path / "data")
    finetune(task, cases, Start(weights), tmp_path / "out", 0, CPU)
    for other, start, seed, what in (
        (task.model_copy(update={"lr": 1e-3}), Start(weights), 0, "task"),
        (task, Start(weights, random_init=True), 0, "random_init"),
        (task, Start(weights), 1, "seed"),
    ):
        with pytest.raises(PlanError, match=rf"out: holds a run with other {what}; give another --out"):
            finetune(other, cases, start, tmp_path / "out", seed, CPU)


def test_a_damaged_checkpoint_is_named(tmp_path, weights):
    published.chestxr(tmp_path / "data")
    task = small("chestxr")
    made(tmp_path / "out").joinpath(LAST).write_bytes(b"half of it")
    with pytest.raises(TrainingError, match=r"last\.safetensors: not a checkpoint, or damaged"):
        finetune(task, find_cases(task, tmp_path / "data"), Start(weights), tmp_path / "out", 0, CPU)


# --- what is trained, and how


def test_the_same_seed_gives_the_same_head_on_pre_trained_and_on_random_weights(weights):
    task = small("glas")
    found, random, again = (
        new_model(task, Start(weights, random_init=chance), seed, None).state_dict()
        for chance, seed in ((False, 3), (True, 3), (True, 4))
    )
    heads = [name for name in found if ".encoder." not in name]
    blocks = [name for name in found if ".blocks." in name and name.endswith("fc1.weight")]
    assert heads and all(torch.equal(found[name], random[name]) for name in heads)
    assert blocks and not any(torch.equal(found[name], random[name]) for name in blocks)
    assert not any(torch.equal(random[name], again[name]) for name in blocks)


def test_what_was_scaled_to_mean_0_enters_as_pre_training_saw_images():
    x = torch.tensor([-2.0, 0.0, 2.0])
    assert entering(small("glas"), x).tolist() == [0.0, 0.5, 1.0]
    assert entering(small("lits"), x).tolist() == [0.0, 0.5, 1.0]
    assert torch.equal(entering(small("chestxr"), x), x) and torch.equal(entering(small("pubmed20k"), x), x)


def test_the_published_fall_of_the_learning_rate():
    task = TASKS["qatav2"]
    assert [learning_rate(task, epoch) for epoch in (0, 50, 99)] == pytest.approx(
        [1e-4, 1e-4 * 0.5**0.9, 1e-4 * 0.01**0.9]
    )


def test_the_loss_of_masks_is_least_where_they_are_right():
    task, truth = small("glas"), torch.zeros(2, 1, 8, 8)
    truth[:, :, 2:5] = 1
    right, wrong = (float(task_loss(task, sign * 20 * (2 * truth - 1), truth)) for sign in (1, -1))
    assert right == pytest.approx(0, abs=1e-3) and wrong > 10


def test_training_that_runs_away_ends_with_advice(tmp_path, weights):
    published.chestxr(tmp_path / "data")
    task = small("chestxr", iterations=30).model_copy(update={"lr": 1e30})
    with pytest.raises(TrainingError, match=r"chestxr: loss or gradient is no finite number at step .*; lower lr"):
        finetune(task, find_cases(task, tmp_path / "data"), Start(weights), tmp_path / "out", 0, CPU)


# --- what is wrong is said first, by name


def run(*words):
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


def refused(kind, *words):
    outcome = run(*words)
    assert isinstance(outcome.exception, kind), outcome.output
    return str(outcome.exception)


def test_a_wrong_folder_shows_the_expected_layout_and_nothing_is_written(tmp_path, weights):
    published.glas(tmp_path / "data")
    out = tmp_path / "out"
    text = refused(DataError, "ChestXR", "--data", tmp_path / "data", "--weights", weights, "--out", out)
    assert str(tmp_path / "data") in text and "Chest_XR/{train,validation}/{covid,normal,pneumonia}" in text
    assert not out.exists()


def test_weights_that_do_not_fit_are_named(tmp_path, weights):
    published.glas(tmp_path / "data")
    command = ("GlaS", "--data", tmp_path / "data", "--out", tmp_path / "out", "--weights")
    tensors = load_file(weights)
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors | {"blocks.0.mlp.fc1.weight": torch.zeros(4, 4)}, wrong)
    assert str(wrong) in refused(WeightsError, *command, wrong)
    save_file({"cls_token": torch.zeros(1, 1, 100)}, wrong)
    assert f"{wrong}: not the weights of a model" in refused(WeightsError, *command, wrong)
    deep = {name: tensor for name, tensor in tensors.items() if "2d" not in name}
    save_file(deep, wrong)
    assert f"{wrong}: this model never saw 2-D images" in refused(WeightsError, *command, wrong)
    assert str(tmp_path / "none") in refused(WeightsError, *command, tmp_path / "none")


def test_masks_of_the_wrong_shape_and_unknown_classes_are_all_listed_before_training(tmp_path, weights):
    published.qata(tmp_path / "data")
    folder = tmp_path / "data" / "QaTa-COV19-v2" / "Test Set" / "Ground-truths"
    for name in ("mask_scan_1.png", "mask_scan_2.png"):
        Image.fromarray(published.blob((9, 9))).save(folder / name)
    text = refused(DataError, "QaTav2", "--data", tmp_path / "data", "--weights", weights, "--out", tmp_path / "out")
    assert "2 of 13 cases can't be used" in text and all(f"mask_scan_{n}.png" in text for n in (1, 2))
    published.lits(tmp_path / "lits")
    mask = next((tmp_path / "lits").rglob("segmentation-1.nii"))
    published.volume(mask, published.blob((20, 18, 10)) * np.uint8(7))
    with pytest.raises(DataError, match=r"segmentation-1\.nii.*7"):
        look_through(small("lits"), find_cases(small("lits"), tmp_path / "lits"), lambda done, of: None)


def test_labels_out_of_range_and_patients_in_two_splits_are_named(tmp_path, weights):
    file = tmp_path / "task.toml"
    file.write_text(
        'name = "own"\nkind = "classify"\ninput = "xray"\nsize = [32, 32]\nclasses = ["well", "ill"]\n'
        'epochs = 1\niterations = 1\nbatch = 2\n[data]\nindex = "labels.csv"\npatient = "patient"\n'
    )
    lines = ["file,label,patient,split"]
    for number in range(6):
        published.picture(tmp_path / "data" / f"{number}.png", number)
        split = ("train", "val", "test")[number % 3]
        lines.append(f"{number}.png,{('well', 'ill')[number // 3]},p{number},{split}")
    command = ("--task-file", file, "--data", tmp_path / "data", "--weights", weights, "--out", tmp_path / "out")
    index = tmp_path / "data" / "labels.csv"
    index.write_text("\n".join(lines).replace("3.png,ill", "3.png,dead"))
    text = refused(DataError, *command)
    assert str(index) in text and "row 5: its label (dead) is not one of well, ill" in text
    index.write_text("\n".join(lines).replace("p5", "p0"))
    text = refused(DataError, *command)
    assert "5.png: patient p0 is in test and, with" in text and "in train" in text
    index.write_text("\n".join(lines))
    done = run(*command, "--seeds", "0,1", "--json")
    assert done.exit_code == 0, done.output
    assert '"tasks_with_data": 1' in done.output and (tmp_path / "out/own/seed-1/predictions/classes.csv").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("GlaS", "--task-file", "x.toml", "--data", "."), "exactly one of TASK and --task-file"),
        (("--data", "."), "exactly one of TASK and --task-file"),
        (("Glass", "--data", "."), "no task 'Glass'; known are PubMed20k"),
        (("GlaS",), "give --data"),
        (("--all",), "--all needs --data-root"),
        (("GlaS", "--data", ".", "--seeds", "0,x"), "--seeds 0,x"),
        (("GlaS", "--data", ".", "--seeds", "1,1"), "each seed once"),
    ],
    ids=str,
)
def test_commands_that_make_no_sense(weights, words, what):
    assert what in refused(PlanError, *words, "--weights", weights)


# --- the table


def test_all_gives_a_table_that_says_which_rows_have_no_data(tmp_path, weights):
    published.pubmed(tmp_path / "root" / "PubMed20k")
    out = tmp_path / "out"
    command = ("--all", "--data-root", tmp_path / "root", "--weights", weights, "--out", out, "--seeds", "0,10")
    done = run(*command, "--epochs", "1", "--iterations", "2", "--batch", "2")
    assert done.exit_code == 0, done.output
    assert done.output.count("no data") >= 8 and f"there is no folder {tmp_path / 'root' / 'GlaS'}" in " ".join(
        done.output.split()
    )
    page = (out / "table.md").read_text()
    assert page.count("| no data |") == 8 and "AVG up" in page and "of 1 of 9 tasks; not to be compared" in page
    assert "AVG down: –" in page
    made(tmp_path / "root" / "glas")
    assert "no Grade.csv" in refused(DataError, *command)  # a folder that is there must be right
    assert "no task has data" in refused(DataError, *command[:2], made(tmp_path / "empty"), *command[3:])


def result(task, seed, scores):
    return Result(
        task=task,
        seed=seed,
        random_init=False,
        lr=1e-4,
        steps=1,
        picked_step=1,
        validation=None,
        train_seconds=1,
        images_per_s=1,
        scores={},
        cases=tuple(CaseResult(id=str(n), patient=str(n), scores=each) for n, each in enumerate(scores)),
    )


def test_a_row_is_the_mean_of_its_seeds_and_the_averages_are_over_all_values():
    seeds = [result("glas", seed, [{"dice": 0.5 + seed / 10, "hd95_voxels": 4.0}] * 3) for seed in (0, 2)]
    row = table.row(seeds)
    assert row["dice"].value == pytest.approx(0.6) and row["dice"].lo == pytest.approx(0.6)
    rows = {
        "glas": row,
        "chestxr": {name: Score(value, value, value) for name, value in (("acc", 0.9), ("auc", 0.8), ("f1", 0.7))},
        "lits": {"dice": Score(0.2, 0.1, 0.3), "dice_liver": Score(0.9, 0.9, 0.9), "hd95_voxels": Score(8.0, 7, 9)},
        "ricord": None,
    }
    assert table.average(rows, table.UP) == pytest.approx((60 + 90 + 80 + 70 + 20) / 5)
    assert table.average(rows, table.DOWN) == pytest.approx((4 + 8) / 2)


# --- probes


def test_probes_of_a_task(tmp_path, weights):
    published.pubmed(tmp_path / "data")
    command = ["--data", str(tmp_path / "data"), "--weights", str(weights)]
    done = CliRunner().invoke(app, ["probe", "pubmed20k", *command])
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["knn", "acc"], ["linear", "acc"]]
    published.glas(tmp_path / "glas")
    masks = CliRunner().invoke(app, ["probe", "glas", "--data", str(tmp_path / "glas"), "--weights", str(weights)])
    assert isinstance(masks.exception, PlanError) and "probes are for tasks that classify" in str(masks.exception)
