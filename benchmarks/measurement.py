"""What all benchmarks share: measuring time and memory, and writing numbers down with the machine they came from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import torch

from invcoss_common import __version__
from invcoss_common.canonical import write_atomic

MEASUREMENTS = Path("docs/measurements")
ROOT = Path(__file__).parent.parent


def write_measurement(
    what: str,
    figures: dict[str, float],
    config: dict[str, object],
    raw: object,
    markdown: str,
    folder: Path = MEASUREMENTS,
    hardware: str | None = None,
) -> Path:
    """Write `<what>_<hardware>_<date>.json` and the `.md` beside it; returns the path of the JSON file.

    `figures` are the numbers to quote, `raw` is what they were computed from. Raises ValueError on NaN or infinity.
    """
    surroundings = environment()
    path = folder / f"{stem(what, hardware)}.json"
    content = {"figures": dict(sorted(figures.items())), "config": config, "environment": surroundings, "raw": raw}
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    footer = (
        f"Measured {surroundings['utc']} on {surroundings['gpu'] or surroundings['cpu']}, "
        f"{surroundings['cores']} cores, {surroundings['threads']} threads, Python {surroundings['python']}, "
        f"PyTorch {surroundings['torch']}, commit {str(surroundings['commit'])[:12]}"
        f"{' with uncommitted changes' if surroundings['dirty'] else ''}; all numbers are in `{path.name}`."
    )
    write_atomic(path.with_suffix(".md"), f"{markdown.rstrip()}\n\n{footer}\n".encode())
    return path


def stem(what: str, hardware: str | None = None) -> str:
    """Name of a measurement's files without their ending."""
    return f"{what}_{hardware or hardware_name()}_{datetime.now(UTC):%Y-%m-%d}"


def hardware_name() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, object]:
    """Versions and hardware; nothing that names the machine, its user or its folders."""
    status = _git("status", "--porcelain", "--", ".", f":!{MEASUREMENTS}")
    return {
        "invcoss": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": importlib.metadata.version("flwr"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes).

    From `VmHWM` where there is one: `ru_maxrss` of a child begins at the peak of the process that started it.
    """
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def rss_mb() -> float:
    """Resident memory of this process now, in MB; its peak where the system does not say."""
    now = _status_mb("VmRSS")
    return peak_rss_mb() if now is None else now


def _status_mb(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:")), None)


class Meter:
    """Wall `seconds` of a `with` block, and `peak_mb`: the most memory it held beyond what was held when it began.

    Memory is the GPU's as PyTorch counts it where there is a GPU, else this process's resident memory.
    """

    seconds = 0.0
    peak_mb = 0.0

    def __enter__(self) -> Meter:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated() / 1e6
        else:
            with contextlib.suppress(OSError):  # not Linux: the peak then is that of the whole process
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to VmRSS
            self._held = rss_mb()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_rss_mb()
        self.peak_mb = max(0.0, peak - self._held)


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value, whose spread is unknown."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± spread` with about `digits` significant digits of the mean; without a spread for a single value."""
    middle = mean(values)
    size = math.floor(math.log10(abs(middle))) if middle else 0
    places = min(max(digits - 1 - size, 0), 4)
    text = f"{middle:.{places}f}"
    return f"{text} ± {spread(values):.{places}f}" if len(values) > 1 else text
