"""The pinned launcher: which bundles and tasks a site refuses, and that Flower still has the names it replaces."""

import inspect
import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import suppress

import flwr.supernode.runtime.run_clientapp as runtime
import pytest
from flwr.clientapp import ClientApp

from invcoss_common.bundle import FEDERATION, MAX_BYTES, bundle_text, check_bundle
from invcoss_common.errors import BundleRefused
from invcoss_common.supervise import FLOWER_TASKS, launcher_folder
from invcoss_site.launch import APP_FAILED, check_only, load_installed, missing_names, plain_error


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
    assert "Message(Error(code=e_code, reason=reason), reply_to=message)" in source
    assert source.count("reply_message = ") == 3, "None, the app's answer, and that error; nothing else is sent"
    assert missing_names() == []


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


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bundle_that_unpacks_to_more_than_it_says_is_refused_before_it_does(method):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("pyproject.toml", bytes(32 << 20), method, 9)
    size = len(FEDERATION).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(BundleRefused):
            check_bundle(data.getvalue().replace((32 << 20).to_bytes(4, "little"), size))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_whatever_is_damaged_in_a_bundle_it_is_refused_or_the_same(method):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        archive.writestr("pyproject.toml", FEDERATION)
    whole = data.getvalue()
    for at in range(len(whole)):
        for changed in (whole[:at], whole[:at] + whole[at + 1 :], whole[:at] + b"\xff" + whole[at + 1 :]):
            with suppress(BundleRefused):
                check_bundle(changed)
                with zipfile.ZipFile(io.BytesIO(changed)) as archive:
                    assert archive.read("pyproject.toml").decode() == FEDERATION


def test_the_installed_app_answers_whatever_the_bundle_names():
    load = load_installed(default_app_ref="", app_path=None, multi_app=True)
    assert isinstance(load("somebody/else", "9.9.9", "0" * 64), ClientApp)


def test_an_app_that_cannot_be_loaded_tells_the_coordinator_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "invcoss_site.app", None)
    with pytest.raises(RuntimeError, match=r"^the site's software can't be loaded$"):
        load_installed()("", "", "")
    assert "invcoss_site.app" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "/images/MEIER-ANNA/0001.dcm"),
        RuntimeError("the app bundle of MEIER-ANNA"),
        BundleRefused("the app bundle lies in /images/MEIER-ANNA"),
        BundleRefused("MEIER-ANNA"),
        None,
    ],
)
def test_what_goes_wrong_around_the_app_is_not_told(error):
    told = plain_error(2, None if error is None else f"{type(error)}:<'{error}'>")
    assert (told.code, told.reason) == (2, APP_FAILED)


@pytest.mark.parametrize("data", [b"", b"PK" + bytes(2 * MAX_BYTES), bundle(LICENSE=""), bundle("no toml [")])
def test_why_a_bundle_is_refused_is_told(data):
    with pytest.raises(BundleRefused) as refused:
        check_only(data)
    reason = f"{type(refused.value)}:<'{refused.value}'>"
    assert plain_error(2, reason).reason == reason


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
