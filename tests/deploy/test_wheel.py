"""The wheel holds all three packages with their data, its commands load, and the Flower bundle carries no code."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common/invcoss_common", "site_client/invcoss_site", "server/invcoss_server")

pytestmark = pytest.mark.slow


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for package in PACKAGES:
        folder = ROOT / package
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        expected |= {f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in files}
    assert "invcoss_server/report.html.j2" in expected
    assert inside == expected


@pytest.mark.parametrize("name", ["invcoss-server", "invcoss-site"])
def test_every_command_loads(name):
    (command,) = entry_points(group="console_scripts", name=name)
    assert callable(command.load())


def test_the_flower_bundle_carries_configuration_only(tmp_path):
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([flwr, "build", "--app", ROOT], cwd=tmp_path, check=True, capture_output=True)
    bundles = [*tmp_path.glob("*.fab"), *ROOT.glob("*.fab")]
    assert len(bundles) == 1
    names = set(zipfile.ZipFile(bundles[0]).namelist())
    bundles[0].unlink()
    assert names == {"pyproject.toml", "README.md", "LICENSE", ".info/CONTENT"}


def test_the_apps_named_for_flower_load():
    components = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    for target in components.values():
        module, name = target.split(":")
        code = f"import {module} as m; assert m.{name}"
        subprocess.run([sys.executable, "-c", code], check=True)
