"""One visit as a process of its own: reads the hand-off from the spool, runs `visit`, writes status and report there.

    python -m invcoss_site.work ROOT HOP [--parent PID]

The network-facing side only starts it and reads the spool, so a lost connection never costs a training. Who works on a
hop holds a lock on it: a status of "running" without a lock is a worker that was killed. Where several processes train
together, the worker becomes torchrun and starts them with the same command; they all hold the lock.
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
from contextlib import suppress
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import InvcossError
from invcoss_common.records import HandOff, Report, Status, from_bytes, to_bytes
from invcoss_site import journal
from invcoss_site.handoffs import sign_report
from invcoss_site.home import SiteHome, load_home

Visit = Callable[[HandOff, SiteHome, Callable[[Status], None]], Report]

STATUS_EVERY_S = 1.0
SETTLE_S = 3.0  # torchrun notices the end of one process, and ends the others, well within this time
AGENT_LOCK = "agent.lock"  # in the spool; there is one where a site agent looks after it


def start_process(home: SiteHome, hop: str, parent: int | None = None) -> subprocess.Popen[bytes] | None:
    """Start the worker of `hop`, detached, unless there is one; with `parent`, it ends when that process does."""
    lock = take_lock(home, hop)
    if lock is None:
        return None
    home.log.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "invcoss_site.work", str(home.root), hop, "--locked"]
    command += ["--parent", str(parent)] if parent else []
    try:
        with (home.log / "visit.log").open("ab") as log:
            # The worker inherits the lock, so there is no instant between start and lock at which it seems dead. It is
            # stdin, an empty file, because torchrun hands no other descriptor on to the processes that it starts.
            worker = subprocess.Popen(command, stdin=lock, stdout=log, stderr=log, start_new_session=True)
        write_atomic(home.hop_folder(hop) / "worker", str(worker.pid).encode())
        return worker
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


def is_idle(home: SiteHome, hop: str) -> bool:
    """Whether nobody works on `hop` now."""
    lock = take_lock(home, hop)
    if lock is not None:
        os.close(lock)
    return lock is not None


def worker_group(home: SiteHome, hop: str) -> int | None:
    """The process group of the worker of `hop`, None if nobody works on it."""
    file = home.hop_folder(hop) / "worker"
    return int(file.read_text("ascii")) if file.exists() and not is_idle(home, hop) else None


def work(home: SiteHome, hop: str, visit: Visit) -> Status:
    """Run the visit of `hop`; its result, or the class of its error, is left in the spool. The caller has the lock.

    Returns the last status.
    """
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
        handoff = _handoff(home, hop)
        journal.begun(home, handoff)
        report = visit(handoff, home, note)
        journal.done(home, report)
        content = to_bytes(report)
        write_atomic(folder / "report.signature", sign_report(home, content).encode())
        write_atomic(folder / "report.json", content)
        final = last.model_copy(update={"state": "done", "error": ""})
    except Exception as error:
        log_error(home, "visit.log")
        final = last.model_copy(update={"state": "failed", "error": error_class(error)})
        with suppress(OSError, InvcossError):  # if the journal is what failed, no answer leaves either
            journal.failed(home, hop, final.error)
    write_atomic(folder / "status.json", to_bytes(final))
    return final


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
    parser.add_argument("--locked", action="store_true", help="stdin holds the hop's lock")
    asked = parser.parse_args()
    if asked.parent:
        threading.Thread(target=_end_with, args=(asked.parent,), daemon=True).start()
    home = load_home(asked.root)
    if not asked.locked:
        lock = take_lock(home, asked.hop)
        if lock is None:
            sys.exit(f"{asked.hop} is being worked on by another process")
        os.dup2(lock, 0)
    _work_together(home, asked.hop)


def _work_together(home: SiteHome, hop: str) -> None:
    """Do what falls to this process: start those of a training, be the first of them or the only one, or assist."""
    from invcoss_site import ranks  # here, because the process that only starts workers needs no torch

    wanted = ranks.processes(home.processes)
    if ranks.count() == 1 and wanted > 1 and _handoff(home, hop).task.kind == "train":
        command = ["-m", "invcoss_site.work", str(home.root), hop, "--locked", "--parent", str(os.getpid())]
        ranks.launch(wanted, home.hop_folder(hop), command)
    elif ranks.rank() == 0:
        sys.exit(work(home, hop, _visit).state != "done")
    else:
        _assist(home, hop)


def _visit(handoff: HandOff, home: SiteHome, on_status: Callable[[Status], None]) -> Report:
    from invcoss_site import ranks
    from invcoss_site.visit import visit

    try:
        return visit(handoff, home, on_status)
    except Exception:
        if ranks.count() > 1:
            time.sleep(SETTLE_S)  # if another process died, torchrun ends this one now: killed, not failed
        raise


def _assist(home: SiteHome, hop: str) -> None:
    """Train beside the first process; only that one writes to the spool."""
    try:
        from invcoss_site.visit import assist

        assist(_handoff(home, hop), home)
    except Exception:
        traceback.print_exc()
        time.sleep(2 * SETTLE_S)  # if the first process met the same error, it is the one to report it
        sys.exit(1)


def _handoff(home: SiteHome, hop: str) -> HandOff:
    return from_bytes(HandOff, (home.hop_folder(hop) / "handoff.json").read_bytes())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
