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
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.chain import records
from invcoss_common.errors import InvcossError, error_class
from invcoss_common.records import HandOff, Report, Status, to_bytes
from invcoss_site import journal
from invcoss_site.approval import BEGAN, await_admission
from invcoss_site.handoffs import check_artefacts, sign_report, taken
from invcoss_site.home import SiteHome, load_home
from invcoss_site.permission import check_audit, check_worked
from invcoss_site.policy import load_policy
from invcoss_site.uploads import check_upload

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
    """Run the visit of `hop`, once it may begin; its result, or the class of its error, is left in the spool.

    Nothing that the spool holds is used before it was verified here. The caller has the lock. Returns the last status.
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
        handoff, policy = await_admission(home, hop), load_policy(home.root)
        began = _first_start(folder)
        check_artefacts(home, handoff)
        if handoff.task.kind == "train":  # what is trained is as large
            check_upload(home, policy.egress, handoff.model.size_bytes)
        if handoff.task.kind == "audit":
            check_audit(policy, handoff, records(home.root / journal.JOURNAL))
        journal.begun(home, handoff)

        def watch(status: Status) -> None:
            check_worked(policy, time.time() - began)
            note(status)

        from invcoss_site.guard_report import released  # here, because a site's desk needs no torch

        report = released(visit(handoff, home, watch), handoff, home, policy)
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
    if final.state == "done":
        shutil.rmtree(home.secrets(hop), ignore_errors=True)
    return final


def _first_start(folder: Path) -> float:
    """When the work of a hop first began (seconds since 1970), which is now unless it was killed or has failed."""
    file = folder / BEGAN
    if not file.exists():
        write_atomic(file, str(time.time()).encode())
    return float(file.read_text("ascii"))


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
    if ranks.count() == 1 and wanted > 1 and _trains(home, hop):
        command = ["-m", "invcoss_site.work", str(home.root), hop, "--locked", "--parent", str(os.getpid())]
        ranks.launch(wanted, home.hop_folder(hop), command)
    elif ranks.rank() == 0:
        sys.exit(work(home, hop, _visit).state != "done")
    else:
        _assist(home, hop)


def _trains(home: SiteHome, hop: str) -> bool:
    """Whether the hop, once it may begin, is a training for several processes; if it can't be taken, `work` says why.

    One with differential privacy is for one process: its steps have a batch of random size, or none.
    """
    with suppress(Exception):
        handoff = await_admission(home, hop)
        return handoff.task.kind == "train" and handoff.dp is None
    return False


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

        assist(taken(home, load_policy(home.root), hop), home)  # the first process verifies all else before it joins
    except Exception:
        traceback.print_exc()
        time.sleep(2 * SETTLE_S)  # if the first process met the same error, it is the one to report it
        sys.exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
