"""Make dist/invcoss-VERSION-bundle.tar.gz: all that a machine without internet needs, and its checksums.

    python deploy/bundle/make_bundle.py

The wheels are for this platform and this version of Python, in the versions that are installed beside this Python: run
it in the virtual environment that passed the tests, as `make bundle` does. pip takes them from where it always does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("plans", "docs", "deploy", "README.md", "CHANGELOG.md", "LICENSE")
EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "1580601600"))  # Hatchling's default, so that all files have one time


def main() -> None:
    """Make the bundle and print its checksum, which is to be compared by phone or in a signed mail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the bundle; default dist")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="also with an extra: simulation")
    asked = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with tempfile.TemporaryDirectory(dir=_made(asked.out)) as scratch:
        folder = Path(scratch) / f"invcoss-{version}"
        _collect_wheels(folder / "wheels", asked.extra)
        _collect_files(folder)
        _write_checksums(folder)
        draft = Path(scratch) / "bundle.tar.gz"
        _pack(folder, draft)
        bundle = draft.replace(asked.out / f"invcoss-{version}-bundle.tar.gz")
    print(f"{_sha256(bundle)}  {bundle}")


def _collect_wheels(wheels: Path, extras: list[str]) -> None:
    """Build our wheel and download those that it needs; no source archive, so nothing is compiled at the other end."""
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)], check=True
    )
    (ours,) = wheels.glob("*.whl")
    tested = sorted({f"{found.name}=={found.version}" for found in distributions() if found.name != "invcoss"})
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(tested))
        constraints.flush()
        wanted = f"{ours}[{','.join(extras)}]" if extras else str(ours)
        download = [*pip, "download", "--only-binary", ":all:", "--dest", str(wheels)]
        subprocess.run([*download, "--constraint", constraints.name, wanted], check=True)


def _collect_files(folder: Path) -> None:
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "deploy" / "bundle" / "install.sh", folder / "install.sh")
    python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "PLATFORM").write_text(f"{python} {sysconfig.get_platform()}\n")


def _write_checksums(folder: Path) -> None:
    """SHA256SUMS for people and install.sh; requirements.txt for pip, which then installs these very wheels."""
    pins = []
    for wheel in sorted((folder / "wheels").iterdir()):
        name, version = wheel.name.split("-")[:2]
        pins.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{_sha256(wheel)}\n")
    (folder / "requirements.txt").write_text("".join(pins))
    sums = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in _files(folder)]
    (folder / "SHA256SUMS").write_text("".join(sums))


def _pack(folder: Path, archive: Path) -> None:
    """The same files give the same bytes: sorted, of one owner, one time and two modes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = EPOCH
        info.mode = 0o755 if info.name.endswith(".sh") else 0o644
        return info

    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", 1, file, EPOCH) as packed,  # wheels are compressed already
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in _files(folder):
            tar.add(path, f"{folder.name}/{path.relative_to(folder).as_posix()}", filter=plain)


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
