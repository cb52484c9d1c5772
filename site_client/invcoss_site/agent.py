"""The site agent: looks after the spool, works on what waits there, and starts again what was killed.

    python -m invcoss_site.agent ROOT

It alone needs the site's images. The network-facing side writes hand-offs into the spool and reads results from it; the
two share nothing else. One hop is worked on at a time, so that the GPU holds one model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import InvcossError
from invcoss_common.records import Status, from_bytes, to_bytes
from invcoss_common.supervise import alone, stop_on_signals
from invcoss_site import journal
from invcoss_site.approval import admit, note_waiting
from invcoss_site.home import SiteHome, load_home
from invcoss_site.work import AGENT_LOCK, is_idle, start_process, worker_group

LOOK_S = 0.3
STARTS = 3  # times that a worker is started from the same point before its hop has failed


class Agent:
    """Looks after the spool of one site."""

    def __init__(self, home: SiteHome) -> None:
        self.home = home
        self.worker: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Stop what is to be aborted, then see that the oldest hop that is not finished and may begin is worked on."""
        if self.worker is not None and self.worker.poll() is not None:
            self.worker = None
        hops = sorted(self.home.spool.glob("s*/status.json"), key=lambda file: file.stat().st_mtime)
        for hop in (file.parent.name for file in hops):
            if self._to_abort(hop):
                self._abort(hop)
        unfinished = [file.parent.name for file in hops if _status(file).state in ("queued", "running")]
        idle = [hop for hop in unfinished if is_idle(self.home, hop)]
        ready = [hop for hop in idle if not self._to_abort(hop) and not self._waits(hop)]
        if ready and idle == unfinished:
            self._work_on(ready[0])

    def end(self) -> None:
        """End the worker, if this agent started one; its checkpoint stays."""
        if self.worker is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGKILL)
            self.worker.wait()

    def _waits(self, hop: str) -> bool:
        """Whether the work of `hop` may not begin yet, which is then said in its status."""
        try:
            waits = admit(self.home, hop)[1]
        except Exception:  # the worker meets the same, and has it in its log
            return False
        if waits:
            note_waiting(self.home, hop, waits)
        return waits is not None

    def _work_on(self, hop: str) -> None:
        file = self.home.hop_folder(hop) / "status.json"
        status = _status(file)
        if self._starts(hop, status) > STARTS:
            self._fail(hop, status, "WorkerKilled")
        else:
            self.worker = start_process(self.home, hop)

    def _fail(self, hop: str, status: Status, error: str) -> None:
        journal.failed(self.home, hop, error)
        failed = status.model_copy(update={"state": "failed", "error": error})
        write_atomic(self.home.hop_folder(hop) / "status.json", to_bytes(failed))

    def _starts(self, hop: str, status: Status) -> int:
        """How often a worker was started from where `status` stands, with this time."""
        folder = self.home.hop_folder(hop)
        point, file = [(folder / "attempt").read_text("utf-8"), status.phase, status.step], folder / "starts.json"
        before = json.loads(file.read_bytes()) if file.exists() else {}
        starts = before["starts"] + 1 if before.get("point") == point else 1
        write_atomic(file, json.dumps({"point": point, "starts": starts}).encode())
        return int(starts)

    def _to_abort(self, hop: str) -> bool:
        return (self.home.hop_folder(hop) / "abort").exists()

    def _abort(self, hop: str) -> None:
        folder = self.home.hop_folder(hop)
        group = worker_group(self.home, hop)
        if group is not None:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return  # its end is seen at the next look
        status = _status(folder / "status.json")
        if status.state in ("queued", "running"):
            self._fail(hop, status, "Aborted")
        (folder / "abort").unlink()


def main() -> None:
    """Look after a spool until asked to end; an InvcossError is one line on stderr and the error's exit code."""
    parser = argparse.ArgumentParser(description="Look after a site's spool.")
    parser.add_argument("root", type=Path, help="the site's folder")
    stop = stop_on_signals()
    try:
        home = load_home(parser.parse_args().root)
        home.spool.mkdir(parents=True, exist_ok=True)
        with alone(home.spool / AGENT_LOCK, f"{home.root}: another site agent looks after this spool"):
            _look_until(stop, Agent(home))
    except InvcossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _look_until(stop: threading.Event, agent: Agent) -> None:
    try:
        while not stop.wait(LOOK_S):
            agent.look()
    finally:
        agent.end()


def _status(file: Path) -> Status:
    return from_bytes(Status, file.read_bytes())


if __name__ == "__main__":
    main()
