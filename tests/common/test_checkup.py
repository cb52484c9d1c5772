"""A check-up goes on after what failed, blames the first cause, and each of its common steps says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from invcoss_common import checkup
from invcoss_common.checkup import GIB, Checkup, Doubt, disk, gpu, memory, report, software
from invcoss_common.errors import CredentialError, DataError, InvcossError


def fail(error):
    raise error


def examine(made: Checkup) -> None:
    made.step("a", lambda: "well")
    made.step("b", lambda: fail(DataError("no images")), ("a",))
    made.step("c", lambda: fail(AssertionError("must not run")), ("b",))
    made.step("d", lambda: "never", ("a", "c"))
    made.step("e", lambda: Doubt("little"))
    made.step("f", lambda: fail(CredentialError("no key")))
    made.step("g", lambda: fail(FileNotFoundError(2, "No such file", "/x")))
    made.step("h", lambda: fail(KeyError("h")))


def test_each_step_is_told_and_the_first_failure_decides(capsys):
    assert report(examine, as_json=False) == 4
    assert capsys.readouterr().out.splitlines() == [
        "ok         a               well",
        "failed     b               no images",
        "not tried  c               because of 'b'",
        "not tried  d               because of 'b'",
        "warning    e               little",
        "failed     f               no key",
        "failed     g               /x: No such file; see to it and try again",
        "failed     h               this check itself failed (KeyError: 'h'); report it",
    ]
    assert report(examine, as_json=True) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["steps"][1] == {"step": "b", "state": "failed", "text": "no images"}
    assert report(lambda made: made.step("e", lambda: Doubt("little")), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {
        "steps": [{"step": "e", "state": "warning", "text": "little"}],
        "ok": True,
    }


def test_disk(monkeypatch, tmp_path):
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(InvcossError, match="too little for models and images; make room, at least 20 GiB"):
        disk(tmp_path)
    free = 19 * GIB
    assert isinstance(disk(tmp_path), Doubt)
    free = 20 * GIB
    assert disk(tmp_path) == f"20.0 GiB free at {tmp_path}"


def test_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup, "MEMORY", tmp_path / "meminfo")
    for said, begins, kind in (
        ("MemTotal: 9999999 kB\nMemAvailable:    2097152 kB\n", "2.0 GiB available: enough for a trial; end", Doubt),
        ("MemAvailable:    4194304 kB\n", "4.0 GiB available", str),
        ("MemTotal: 9999999 kB\n", "this machine does not say", Doubt),
    ):
        (tmp_path / "meminfo").write_text(said)
        assert memory().startswith(begins)
        assert type(memory()) is kind


def test_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu("training") == "none: training runs on the CPU"
    monkeypatch.setattr(checkup, "NVIDIA", tmp_path)
    assert gpu("training").startswith("a GPU is there and can't be used (this PyTorch was built without CUDA")

    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\nmore", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert "(The NVIDIA driver on your system is too old): training runs on the CPU; install" in gpu("training")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="Card", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert gpu("training") == "Card (80 GiB), Card (80 GiB)"


def test_software(monkeypatch):
    assert software().startswith(f"invcoss {metadata.version('invcoss')}, flwr {metadata.version('flwr')}, torch ")
    for declared, says in (
        (["flwr<1"], "flwr: .* is installed, and <1 is needed; install InvCoSS-relay again"),
        (["no-such-thing>=1"], "no-such-thing: nothing is installed, and >=1 is needed"),
    ):
        monkeypatch.setattr(metadata, "requires", lambda _, declared=declared: declared)
        with pytest.raises(InvcossError, match=says):
            software()
    monkeypatch.setattr(metadata, "requires", lambda _: ['no-such-thing>=1; extra == "dev"'])
    software()
