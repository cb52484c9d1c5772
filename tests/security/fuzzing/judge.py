"""Whether a side does right by an object: refuses it in one line, or takes it rightly, in bounded time and memory."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.security.fuzzing.sides import Kind

LONGEST_S = 5.0
MEMORY_BYTES = 64 << 20  # beyond what the process has; the largest object here has 2 MiB


@dataclass(frozen=True)
class Verdict:
    """`outcome`: "taken", or the class of the error that refused it; `failure`: what is wrong with that, or ""."""

    outcome: str
    failure: str
    seconds: float
    trace: str = ""


def judge(kind: Kind, data: bytes) -> Verdict:
    """Give `data` to what receives objects of this kind, and look at what comes of it."""
    began, failure, trace = time.perf_counter(), "", ""
    try:
        with bounded():
            kind.receive(data)
        outcome = "taken"
        if kind.sealed and data not in kind.originals:
            failure = "an altered object was taken"
    except kind.refusals as error:
        outcome = type(error).__name__
        if data in kind.originals:
            failure = f"a whole object was refused: {error}"
        elif not str(error).isprintable() or len(str(error)) > 1000:
            failure = f"a refusal that is not one short line: {str(error)[:300]!r}"
    except Exception as error:
        outcome = type(error).__name__
        failure, trace = f"{outcome}: {str(error)[:300]!r}", traceback.format_exc()
    seconds = time.perf_counter() - began
    if not failure and seconds > LONGEST_S:
        failure = f"it took {seconds:.1f} s"
    return Verdict(outcome, failure, seconds, trace)


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError after LONGEST_S, MemoryError where more than MEMORY_BYTES are asked for."""

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
