"""The quickstart of the documentation: its very commands, in an empty folder, by a shell, end with a finished relay."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.federation.deployment import BIN

from invcoss_common.supervise import free_port

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "quickstart-federation.md"
SERVICES = 'echo "$!" >>pids'
PORT, PLAN = "--port 9443", "plans/quickstart.toml"


def commands():
    blocks = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def marked(root):
    """Processes of the quickstart in `root`, by the mark in their environment; those that ended are not counted."""
    mark, found = f"INVCOSS_TEST={root}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def test_at_most_eight_commands_and_all_of_them_ours():
    assert 0 < len(commands()) <= 8
    for command in commands():
        assert re.match(r"invcoss-(server|site) [a-z-]+ ", command), command
    assert sum(PORT in command for command in commands()) == 1
    assert sum(PLAN in command for command in commands()) == 1


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder in which a shell ran the document's commands, and what they printed; the services still run."""
    root = tmp_path_factory.mktemp("quickstart")
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "INVCOSS_TEST": str(root), "OMP_NUM_THREADS": "1"}
    script = ["set -e"]
    for command in commands():
        script.append(command.replace(PORT, f"--port {free_port()}").replace(PLAN, str(ROOT / PLAN)))
        if command.endswith("&"):
            script.append(SERVICES)
    began = time.monotonic()
    try:
        with (root / "printed").open("wb") as printed:  # a file, because services that hold a pipe would keep it open
            done = subprocess.run(
                ["bash", "-c", "\n".join(script)],
                env=env,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                timeout=600,
                check=False,
            )
        text = (root / "printed").read_text("utf-8")
        assert done.returncode == 0, text
        print(f"quickstart: {time.monotonic() - began:.0f} s")
        yield root, env, text
    finally:
        for process in marked(root):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def server(quickstart, *arguments):
    root, env, _ = quickstart
    done = subprocess.run(
        ["invcoss-server", *arguments], env=env, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def standing(quickstart):
    told = json.loads(server(quickstart, "status", "consortium", "--json"))
    assert told["served"] is True
    (run,) = told["runs"]
    return run


@pytest.mark.slow
def test_the_relay_ends_with_matrix_report_and_model(quickstart):
    root, _, text = quickstart
    for words in ("stage 1 of 2: xray at north", "stage 2 of 2: ct at south", "after stage", "forgetting"):
        assert words in text
    for kind in ("report", "model"):
        (path,) = re.findall(rf"^{kind}: +(\S+)$", text, re.MULTILINE)
        assert (root / path).stat().st_size > 10_000
    assert "relay starts; asks a site again after 120 s without an answer (answer_s)" in text
    assert "is started again" not in text  # nothing ended that should not have
    assert "\x1b" not in text
    run = standing(quickstart)
    assert (run["run"], run["state"], run["error"]) == ("quickstart", "finished", "")
    assert [stage["state"] for stage in run["stages"]] == ["released", "released"]


@pytest.mark.slow
def test_the_commands_for_later_on_the_finished_run(quickstart):
    events = [
        json.loads(line) for line in server(quickstart, "logs", "consortium", "quickstart", "--json").splitlines()
    ]
    kinds = [event["event"] for event in events]
    assert kinds.count("released") == 2
    assert kinds.count("hop") == 5
    assert kinds.count("audited") == 2
    assert server(quickstart, "logs", "consortium", "quickstart").count("\n") == len(events)
    for order in ("pause", "resume"):
        server(quickstart, order, "consortium", "quickstart")
        assert standing(quickstart)["state"] == "finished"
    assert server(quickstart, "run", "consortium", str(ROOT / PLAN)).count("forgetting") == 1  # at once: all is done


@pytest.mark.slow
def test_stopping_the_services_leaves_no_process(quickstart):
    root, _, _ = quickstart
    services = [int(line) for line in (root / "pids").read_text().split()]
    assert len(services) == 3
    assert len(marked(root)) > 10
    for service in services:
        os.kill(service, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while marked(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(root) == []
    assert "Traceback" not in (root / "printed").read_text("utf-8")
