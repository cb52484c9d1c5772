"""The index of files: what is read again, what a kill leaves, and what it says of files that can't be read."""

import os
import subprocess
import sys

import pytest

from invcoss_common.canonical import sha256_hex
from invcoss_site import file_index
from invcoss_site.file_index import open_index


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read."""
    names, sha256_file = [], file_index.sha256_file

    def note(path):
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(file_index, "sha256_file", note)
    return names


def files(folder, count=5):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / str(number)).write_bytes(b"file %d" % number)
    return sorted(folder.iterdir())


def digests(folder, paths):
    with open_index(folder / "cache" / "files.sqlite") as index:
        return list(index.digests(paths))


def test_a_digest_is_that_of_the_content_and_taken_once(tmp_path, read):
    paths = files(tmp_path / "data")
    expected = [sha256_hex(b"file %d" % number) for number in range(5)]
    assert digests(tmp_path, paths) == expected
    assert sorted(read) == ["0", "1", "2", "3", "4"]
    read.clear()
    assert digests(tmp_path, reversed(paths)) == expected[::-1]
    assert read == []


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_only_a_changed_file_is_read_again(tmp_path, read, change):
    paths = files(tmp_path / "data")
    digests(tmp_path, paths)
    status = paths[2].stat()
    new = b"another size" if change == "size" else b"FILE 2"
    if change == "inode":
        (tmp_path / "data" / "draft").write_bytes(new)
        (tmp_path / "data" / "draft").replace(paths[2])
    else:
        paths[2].write_bytes(new)
    time_ns = status.st_mtime_ns + (change == "time")
    os.utime(paths[2], ns=(time_ns, time_ns))
    read.clear()
    assert digests(tmp_path, paths)[2] == sha256_hex(new)
    assert read == ["2"]


def test_files_that_are_gone_or_can_not_be_read_have_no_digest(tmp_path):
    paths = files(tmp_path / "data")
    paths[1].unlink()
    paths[3].unlink()
    paths[3].mkdir()
    found = digests(tmp_path, paths)
    assert [digest is None for digest in found] == [False, True, False, True, False]


def test_deleted_files_are_forgotten(tmp_path):
    paths = files(tmp_path / "data")
    with open_index(tmp_path / "files.sqlite") as index:
        list(index.digests(paths))
        assert len(index) == 5
        paths[0].unlink()
        paths[4].unlink()
        index.forget_missing()
        assert len(index) == 3
    names = [os.fsencode(path) for path in paths]
    content = (tmp_path / "files.sqlite").read_bytes()
    assert names[1] in content


def test_a_file_that_changes_while_it_is_read_has_no_digest_yet(tmp_path, monkeypatch):
    paths = files(tmp_path / "data")

    def grows(path):
        path.write_bytes(path.read_bytes() + b"more")
        return "0" * 64

    monkeypatch.setattr(file_index, "sha256_file", grows)
    assert digests(tmp_path, paths) == [None] * 5
    monkeypatch.undo()
    assert digests(tmp_path, paths[:1]) == [sha256_hex(b"file 0more")]


def test_names_that_are_not_utf_8_are_names(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"x")
    assert digests(tmp_path, [path]) == [sha256_hex(b"x")]


def test_a_kill_keeps_what_was_committed(tmp_path, read):
    paths = files(tmp_path / "data", 20)
    program = f"""
import os
from pathlib import Path
from invcoss_site import file_index
file_index.COMMIT_EVERY_S, file_index.THREADS = 0, 1
known, sha256_file = [], file_index.sha256_file
def dies(path):
    known.append(path)
    return sha256_file(path) if len(known) < 12 else os._exit(9)
file_index.sha256_file = dies
with file_index.open_index(Path({str(tmp_path / "cache" / "files.sqlite")!r})) as index:
    list(index.digests(Path({str(tmp_path / "data")!r}).iterdir()))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    with open_index(tmp_path / "cache" / "files.sqlite") as index:
        kept = len(index)
        assert None not in index.digests(paths)
    assert kept + len(read) == 20


def test_a_damaged_index_is_begun_anew(tmp_path):
    paths = files(tmp_path / "data")
    first = digests(tmp_path, paths)
    database = tmp_path / "cache" / "files.sqlite"
    for damage in (b"no database at all" * 100, database.read_bytes()[:4096] + os.urandom(4096)):
        database.write_bytes(damage)
        assert digests(tmp_path, paths) == first


def test_the_index_is_for_its_owner_alone(tmp_path):
    digests(tmp_path, files(tmp_path / "data"))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "cache" / "files.sqlite").stat().st_mode & 0o777 == 0o600
