"""One visit as a process of its own: reads the hand-off from the spool, runs `visit`, writes status and report there.

    python -m invcoss_site.work ROOT HOP [--parent PID]

The network-facing side only starts it and reads the spool, so a lost connection never costs a training. Who works on a
hop holds a lock on it: a status of "running" without a lock is a worker that was killed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.records import HandOff, Report, Status, from_bytes, to_bytes
from invcoss_site.home import SiteHome, load_home

Visit = Callable[[HandOff, SiteHome, Callable[[Status], None]], Report]

STATUS_EVERY_S = 1.0


def start_process(home: SiteHome, hop: str, parent: int | None = None) -> None:
    """Start the worker of `hop`, detached, unless there is one; with `parent`, it ends when that process does."""
    lock = take_lock(home, hop)
    if lock is None:
        return
    home.log.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "invcoss_site.work", str(home.root), hop, "--lock", str(lock)]
    command += ["--parent", str(parent)] if parent else []
    try:
        with (home.log / "visit.log").open("ab") as log:
            # The worker inherits the lock, so there is no instant between start and lock at which it seems dead.
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock]
            )
    finally:
        os.close(lock)


def take_lock(home: SiteHome, hop: str) -> int | None:
    """A file descriptor that holds the lock of `hop` until it is closed, or None when a worker has it."""
    folder = home.hop_folder(hop)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def work(home: SiteHome, hop: str, visit: Visit) -> None:
    """Run the visit of `hop`; its result, or the class of its error, is left in the spool. The caller has the lock."""
    folder = home.hop_folder(hop)
    last, written = Status(state="running"), 0.0

    def note(status: Status) -> None:
        nonlocal last, written
        last = status
        if time.monotonic() - written >= STATUS_EVERY_S:
            write_atomic(folder / "status.json", to_bytes(status))
            written = time.monotonic()

    try:
        note(last)
        report = visit(from_bytes(HandOff, (folder / "handoff.json").read_bytes()), home, note)
        write_atomic(folder / "report.json", to_bytes(report))
        final = last.model_copy(update={"state": "done", "error": ""})
    except Exception as error:
        log_error(home, "visit.log")
        final = last.model_copy(update={"state": "failed", "error": error_class(error)})
    write_atomic(folder / "status.json", to_bytes(final))


def error_class(error: Exception) -> str:
    """The only thing about an error that may leave a site: the name of its class."""
    name = type(error).__name__
    return name if name.isascii() and name.isalpha() and len(name) <= 48 else "Error"


def log_error(home: SiteHome, file_name: str) -> None:
    """Append the traceback of the error being handled to a log that stays at the site."""
    home.log.mkdir(parents=True, exist_ok=True)
    with (home.log / file_name).open("a", encoding="utf-8") as log:
        log.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        traceback.print_exc(file=log)


def main() -> None:
    parser = argparse.ArgumentParser(description="Work on one hop in a site's spool.")
    parser.add_argument("root", type=Path, help="the site's folder")
    parser.add_argument("hop")
    parser.add_argument("--parent", type=int, help="end when this process, our parent, ends")
    parser.add_argument("--lock", type=int, help="descriptor of the hop's lock, if the parent took it")
    asked = parser.parse_args()
    if asked.parent:
        threading.Thread(target=_end_with, args=(asked.parent,), daemon=True).start()
    home = load_home(asked.root)
    if asked.lock is None and take_lock(home, asked.hop) is None:
        sys.exit(f"{asked.hop} is being worked on by another process")
    work(home, asked.hop, _visit)


def _visit(handoff: HandOff, home: SiteHome, on_progress: Callable[[Status], None]) -> Report:
    from invcoss_site.visit import visit  # here, because the process that only starts workers needs no torch

    return visit(handoff, home, on_progress)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
