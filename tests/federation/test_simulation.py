"""A federation as a real Flower run: the same model as over the loopback, failures in full, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.federation.loopback import LoopbackCourier
from tests.federation.plans import tiny_plan

from invcoss_common.canonical import sha256_file
from invcoss_server.flower_run import MARK
from invcoss_server.relay import relay
from invcoss_server.simulate import EVENTS
from invcoss_server.synthesis import synthesise_here
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit

pytestmark = pytest.mark.slow

PLAN = """
name = "tiny"
size = "nano"
seed = 3
threads = 1
[train]
steps = {steps}
batch_size = 4
[inversion]
pool_size = 4
steps = 3
batch_size = 2
width = 16
images_per_generator = 2
[relay]
poll_s = 0.02
stall_timeout_s = 120.0
[[stages]]
site = "xray-site"
modality = "xray"
[[stages]]
site = "ct-site"
modality = "ct"
[simulation.xray-site]
phantoms = 12
[simulation.ct-site]
{ct}
"""


def command(folder, out, *more, steps=3, ct="phantoms = 12"):
    plan = folder / "plan.toml"
    plan.write_text(PLAN.format(steps=steps, ct=ct))
    return [sys.executable, "-c", "from invcoss_server.cli import main; main()", "simulate", plan, "--out", out, *more]


def left_behind(out):
    """Processes that carry the mark of a simulation in `out`."""
    wanted, found = f"{MARK}={out.resolve()}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in file.read_bytes().split(b"\0"):
                found.append((file.parent / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_over_flower_the_model_is_the_same_as_over_the_loopback(tmp_path):
    plan = tiny_plan()
    homes = {site: simulated_home(plan, site, None, tmp_path / "loopback") for site in plan.sites}
    relay(plan, LoopbackCourier(homes, visit), tmp_path / "loopback", synthesise_here)

    out = tmp_path / "flower"
    done = subprocess.run(command(tmp_path, out, "--json"), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {(loss["after_stage"], loss["of_stage"]) for loss in result["losses"]} == {(0, 0), (1, 0), (1, 1)}
    assert [(audit["stage"], audit["dropped"]) for audit in result["audits"]] == [(0, []), (1, [])]
    for name in ("model", "models/stage-00-xray", "pools/stage-00-xray", "pools/stage-01-ct"):
        file = f"{name}.safetensors"
        assert sha256_file(out / file) == sha256_file(tmp_path / "loopback" / file), name
    assert left_behind(out) == []


def test_a_failing_site_shows_its_traceback_and_its_exit_code_and_the_run_goes_on_later(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    (data / "ct").mkdir(parents=True)
    (data / "ct" / "scan.nii.gz").write_bytes(b"not a scan")
    broken = command(tmp_path, out, "--data", data, ct='folder = "ct"')
    done = subprocess.run(broken, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 8
    assert "Traceback" in done.stderr
    assert "scan.nii.gz" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: site 'ct-site' failed with DataError")
    assert left_behind(out) == []

    from invcoss_common.phantoms import write_phantoms

    write_phantoms(data / "ct", "ct", 6, 0)
    done = subprocess.run(broken, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (out / EVENTS).read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "released"] == [0, 1]
    hops = [event["hop"] for event in events if event["event"] == "hop"]
    assert hops.count("s00-train") == 1, "what was done before the failure is not done again"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_simulation_ended_in_the_middle_leaves_nothing_and_goes_on(tmp_path, how):
    out, log = tmp_path / "run", tmp_path / "stderr"
    with log.open("wb") as stderr:
        started = subprocess.Popen(command(tmp_path, out, steps=60), stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        deadline = time.monotonic() + 200
        while b'"phase": "training"' not in ((out / EVENTS).read_bytes() if (out / EVENTS).exists() else b""):
            assert time.monotonic() < deadline and started.poll() is None, log.read_text()
            time.sleep(0.05)
    finally:
        os.kill(started.pid, how)
        started.wait(timeout=60)
    if how == signal.SIGTERM:
        assert started.returncode == 128 + signal.SIGTERM
        assert left_behind(out) == []
    done = subprocess.run(command(tmp_path, out, steps=60), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert left_behind(out) == []
    assert (out / "report.html").exists()
