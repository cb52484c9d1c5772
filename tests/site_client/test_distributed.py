"""Two processes under torchrun (gloo, CPU) train as one process does, hold the hop's lock, and end together."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import load, load_file
from tests.federation.plans import tiny_plan
from tests.site_client import together

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import DataError
from invcoss_common.model import build_model
from invcoss_common.records import HandOff, Pool, Report, Status, Task, from_bytes, to_bytes
from invcoss_common.weights import model_to_bytes
from invcoss_site import ranks
from invcoss_site.batches import TrainingBatches
from invcoss_site.desk import hop_status
from invcoss_site.home import load_home
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit
from invcoss_site.work import is_idle, start_process

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for a kill between two steps."""


def as_rank(monkeypatch, rank, count):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, str(value))


# ---- parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "count"), [(8, 2), (5, 2), (7, 3), (3, 4), (1, 2), (9, 1)])
def test_means_over_parts_average_to_the_mean_over_the_batch(monkeypatch, images, count):
    values = torch.rand(images, dtype=torch.float64)
    parts = []
    for rank in range(count):
        as_rank(monkeypatch, rank, count)
        parts.append(ranks.part_of(images))
    averaged = sum(part.weight * values[part.start : part.stop].mean() for part in parts) / count
    torch.testing.assert_close(averaged, values.mean())
    seen = [i for part in parts if part.weight for i in range(part.start, part.stop)]
    assert seen == list(range(images))


@pytest.mark.parametrize("geometry", [together.XRAY, together.CT])
def test_a_part_of_a_batch_is_prepared_as_in_the_whole(geometry):
    images = torch.rand(7, 1, *geometry.size).half().numpy()
    how = {"batch_size": 5, "crop_scale": 0.2, "flip": True, "seed": 1}
    whole = TrainingBatches(images, geometry, **how)
    for part in (slice(0, 3), slice(3, 5)):
        assert torch.equal(TrainingBatches(images, geometry, **how, part=part)[4], whole[4][part])


def test_a_process_that_torchrun_did_not_start_is_alone():
    assert (ranks.rank(), ranks.count()) == (0, 1)
    assert ranks.part_of(5) == ranks.Part(0, 5, 1.0)
    model, value = torch.nn.Linear(1, 1), torch.ones(2)
    assert ranks.synchronised(model) is model and ranks.averaged(value) is value and ranks.from_first(value) is value


@pytest.mark.parametrize(("asked", "gpus", "expected"), [(None, 0, 1), (3, 0, 3), (None, 8, 8), (2, 8, 2), (9, 8, 8)])
def test_one_process_a_gpu_unless_the_site_says_otherwise(monkeypatch, asked, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks.processes(asked) == expected


@pytest.mark.parametrize("value", ["0", "65", "2.0", '"2"', "true"])
def test_the_number_of_processes_is_checked(tmp_path, value):
    (tmp_path / "site.toml").write_text(f'name = "north"\ndata = "x"\nprocesses = {value}\n')
    with pytest.raises(DataError, match="processes"):
        load_home(tmp_path)


# ---- the same training ------------------------------------------------------------------------------------------


def assert_alike(ended, expected):
    """Equal counters; losses to 1e-5, absolute; weights to 1e-5, absolute, in the mean over a tensor."""
    assert torch.equal(ended["counters"], expected["counters"])
    torch.testing.assert_close(ended["losses"], expected["losses"], rtol=0, atol=1e-5)
    assert_alike_weights(ended, expected)


def assert_alike_weights(ended, expected):
    """In the mean over each tensor, because Adam makes whole steps of the rounding errors of small gradients.

    So are those of all keys' biases, which are left out: a shift of all keys cancels in the softmax.
    """
    for name, tensor in expected.items():
        difference = (ended[name].double() - tensor.double()).abs()
        if name.endswith("qkv.bias"):
            difference.chunk(3)[1].zero_()
        assert float(difference.mean()) < 1e-5, name


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have run all cases; "resumed" went on from a checkpoint of one process."""
    out = tmp_path_factory.mktemp("together")

    def watch(progress):
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        together.run("resumed", out / "resumed.checkpoint", watch)
    launch = (
        "import sys; from pathlib import Path; from invcoss_site.ranks import launch;"
        "launch(2, Path(sys.argv[1]), ['-m', 'tests.site_client.together', sys.argv[1]])"
    )
    command = [sys.executable, "-c", launch, str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", together.CASES)
def test_two_processes_train_as_one(two_processes, case):
    first, second = (load_file(two_processes / f"{case}.rank{rank}") for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert_alike(first, together.run(case, None))
    assert (first["counters"][1] > 0) == (case == "skipped steps")


@pytest.mark.slow
def test_all_processes_give_up_at_the_same_step(two_processes):
    errors = [(two_processes / f"error.rank{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and "for 1 steps in a row" in errors[0]


# ---- a visit ----------------------------------------------------------------------------------------------------

HOP = "s01-train"
STEPS = 16


def site_with_a_hop(root, processes, **train):
    """The home of a site that learns X-ray after CT, with its hand-off delivered."""
    plan = tiny_plan(("ct", "xray"), train={"steps": STEPS, "batch_size": 5, "accumulate": 2, **train})
    home = simulated_home(plan, "xray-site", None, root)
    with (home.root / "site.toml").open("a") as file:
        file.write(f"processes = {processes}\n")
    pool = np.random.default_rng(0).integers(0, 256, (6, 1, *plan.geometry(0).size), dtype=np.uint8)
    old = {
        "stage": 0,
        "modality": "ct",
        "geometry": plan.geometry(0),
        "artefact": home.artefacts.put(save({"images": pool})),
    }
    families = (plan.geometry(0), plan.geometry(1))
    task = Task(
        kind="train",
        stage=1,
        modality_name="xray",
        modality=plan.modality(1),
        geometry=plan.geometry(1),
        spacing_mm=None,
        model=plan.model_shape,
        families=families,
        train=plan.train.model_copy(update={"checkpoint_every_s": 1e-9, "precision": "fp32"}),
        replay=plan.replay,
        evaluate=plan.evaluate,
        seed=plan.seed,
        threads=1,
    )
    handoff = HandOff(
        run=plan.name,
        hop=HOP,
        receiver=home.name,
        plan_digest=plan.digest(),
        code_version="0",
        task=task,
        model=home.artefacts.put(model_to_bytes(build_model(plan.model_shape, families, 1))),
        pools=(Pool(**old),),
    )
    write_atomic(home.hop_folder(HOP) / "handoff.json", to_bytes(handoff))
    return load_home(home.root), handoff


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def steps_saved(home):
    file = home.hop_folder(HOP) / "checkpoint.safetensors"
    if not file.exists():
        return 0
    with safe_open(file, "pt") as tensors:
        return int(tensors.get_tensor("counters")[0])


def rank_pids(worker):
    """Process ids of the two processes that torchrun started, the first one first."""
    found = {}
    for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split():
        found.update(
            {
                entry: int(pid)
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if entry[:5] == b"RANK="
            }
        )
    return found[b"RANK=0"], found[b"RANK=1"]


def ended(pid):
    return not Path(f"/proc/{pid}").exists() or b"State:\tZ" in Path(f"/proc/{pid}/status").read_bytes()


def weights(home, report):
    return load(home.artefacts.path(report.model).read_bytes())


@pytest.mark.slow
def test_processes_end_together_and_a_restart_goes_on_to_the_same_end(tmp_path):
    home, handoff = site_with_a_hop(tmp_path, processes=2)
    alone = load_home(shutil.copytree(home.root, tmp_path / "alone"))
    expected = visit(handoff, alone, lambda status: None)

    worker = start_process(home, HOP)
    until(lambda: steps_saved(home) > 0)
    first, second = rank_pids(worker)
    assert not is_idle(home, HOP) and hop_status(home, HOP).state == "running"
    os.kill(second, signal.SIGKILL)
    assert worker.wait(timeout=60) != 0
    assert ended(first) and is_idle(home, HOP)
    assert hop_status(home, HOP).error == "WorkerKilled"
    saved = steps_saved(home)
    assert saved < STEPS

    worker = start_process(home, HOP)
    until(lambda: steps_saved(home) > saved)
    first, second = rank_pids(worker)
    os.kill(second, signal.SIGSTOP)  # it can't see that torchrun is gone
    worker.kill()
    worker.wait()
    until(lambda: ended(first))
    assert not is_idle(home, HOP) and start_process(home, HOP) is None, "one process still lives"
    os.kill(second, signal.SIGCONT)
    until(lambda: ended(second))
    until(lambda: is_idle(home, HOP))
    assert saved < steps_saved(home) < STEPS

    fewer = load_home(shutil.copytree(home.root, tmp_path / "fewer"))
    reports = [(fewer, visit(handoff, fewer, lambda status: None))]  # on from there as one process
    assert start_process(home, HOP).wait(timeout=60) == 0
    assert hop_status(home, HOP).state == "done"
    reports.append((home, from_bytes(Report, (home.hop_folder(HOP) / "report.json").read_bytes())))
    for place, report in reports:
        np.testing.assert_allclose(report.curve, expected.curve, rtol=0, atol=1e-5)
        assert report.metrics["heldout_mim_loss"] == pytest.approx(expected.metrics["heldout_mim_loss"], abs=1e-5)
        assert_alike_weights(weights(place, report), weights(alone, expected))


@pytest.mark.slow
def test_an_error_of_the_first_process_is_reported_and_ends_the_other(tmp_path):
    home, _ = site_with_a_hop(tmp_path, processes=2)
    shutil.rmtree(home.data)
    assert start_process(home, HOP).wait(timeout=60) != 0
    assert hop_status(home, HOP) == Status(state="failed", error="DataError")
    assert is_idle(home, HOP)
