"""The pinned launcher: which bundles and tasks a site refuses, and that Flower still has the two names it replaces."""

import inspect
import io
import os
import subprocess
import sys
import zipfile

import flwr.supernode.runtime.run_clientapp as runtime
import pytest
from flwr.clientapp import ClientApp

from invcoss_common.bundle import FEDERATION, MAX_BYTES, bundle_text, check_bundle
from invcoss_common.errors import BundleRefused
from invcoss_common.supervise import FLOWER_TASKS, launcher_folder
from invcoss_site.launch import check_only, load_installed


def bundle(text=FEDERATION, **others):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"pyproject.toml": text, ".info/CONTENT": "", **others}.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_flower_still_has_what_the_launcher_replaces_and_calls_it_so():
    source = inspect.getsource(runtime.run_clientapp)
    assert "install_from_fab(fab.content, skip_prompt=True)" in source
    assert "load_client_app_fn = get_load_client_app_fn(" in source
    assert "run.fab_id, run.fab_version, fab.hash_str" in source


def test_flowers_own_bundle_of_our_text_is_accepted(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(FEDERATION)
    env = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flwr = [str(sys.executable).rpartition("/")[0] + "/flwr", "build", "--app", "app"]
    subprocess.run(flwr, cwd=tmp_path, env=env, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.fab")
    check_bundle(built.read_bytes())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bundle(**{"invcoss_site/app.py": "print('hello')"}), "carries 1 files besides its configuration"),
        (bundle(LICENSE=""), "code is never accepted"),
        (bundle(bundle_text("invcoss-federation", {"run": "", "more": ""})), "not the one of the software"),
        (bundle(FEDERATION.replace("invcoss_site.app:app", "evil:app")), "not the one of the software"),
        (bundle("no toml ["), "not the one of the software"),
        (bundle(FEDERATION + "#" * (2 * MAX_BYTES)), "unpacks to more"),
        (b"PK" + bytes(2 * MAX_BYTES), "far fewer"),
        (b"not a zip file", "can't be read"),
        (b"", "can't be read"),
    ],
)
def test_any_other_bundle_is_refused(data, words):
    with pytest.raises(BundleRefused, match=words):
        check_only(data, skip_prompt=True)


def test_the_installed_app_answers_whatever_the_bundle_names():
    load = load_installed(default_app_ref="", app_path=None, multi_app=True)
    assert isinstance(load("somebody/else", "9.9.9", "0" * 64), ClientApp)


def test_an_app_that_cannot_be_loaded_tells_the_coordinator_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "invcoss_site.app", None)
    with pytest.raises(RuntimeError, match=r"^the site's software can't be loaded$"):
        load_installed()("", "", "")
    assert "invcoss_site.app" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "module", "words"),
    [
        ("flwr-clientapp", "invcoss_site.launch", "Run a Flower ClientApp"),
        ("flwr-serverapp", "invcoss_server.launch", "Run a Flower ServerApp"),
    ],
)
def test_every_other_task_of_flower_is_refused(tmp_path, task, module, words):
    from flwr.supercore.superexec.executor.subprocess_executor import TASK_TYPE_TO_COMMAND

    folder = launcher_folder(tmp_path / "launcher", task, module)
    assert {path.name for path in folder.iterdir()} == set(TASK_TYPE_TO_COMMAND.values()) == set(FLOWER_TASKS)
    for name in set(FLOWER_TASKS) - {task}:
        done = subprocess.run([folder / name, "--token", "x"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "no task of this kind is run here\n")
    done = subprocess.run([folder / task, "--help"], capture_output=True, text=True, check=False)
    assert words in done.stdout


def test_the_coordinator_unpacks_its_own_bundle_only(monkeypatch):
    from invcoss_server import launch

    assert "install_from_fab(fab.content, skip_prompt=True)" in inspect.getsource(launch.runtime.run_serverapp)
    unpacked = []
    monkeypatch.setattr(launch, "_unpack", lambda data, skip_prompt: unpacked.append(data))
    launch.check_and_unpack(bundle(), skip_prompt=True)
    with pytest.raises(BundleRefused, match="code is never accepted"):
        launch.check_and_unpack(bundle(**{"server.py": ""}), skip_prompt=True)
    assert unpacked == [bundle()]
