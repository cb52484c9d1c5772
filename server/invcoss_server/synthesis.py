"""Inversion of one stage as a process of its own, so that its memory comes back: model and statistics in, a pool out.

    python -m invcoss_server.synthesis FOLDER

`FOLDER` holds `job.json`; groups, checkpoints, `progress.json` and finally `pool.safetensors` are written there. A
killed synthesis that is started again goes on from its checkpoint and ends with the same pool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from invcoss_common.canonical import write_atomic
from invcoss_common.config import InversionConfig
from invcoss_common.errors import InvcossError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.pools import write_pool
from invcoss_common.statistics import statistics_from_bytes
from invcoss_common.weights import read_model
from invcoss_server.inversion import InversionProgress, invert

POOL = "pool.safetensors"
LOOK_S = 0.5


class Job(BaseModel):
    """Everything an inversion needs; `model` and `statistics` are paths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    statistics: Path
    shape: ModelShape
    families: tuple[Geometry, ...]
    geometry: Geometry
    inversion: InversionConfig
    mask_ratio: float
    seed: int
    threads: int | None


OnProgress = Callable[[InversionProgress], None]
Synthesise = Callable[[Job, Path, OnProgress], Path]


def synthesise_here(job: Job, folder: Path, on_progress: OnProgress) -> Path:
    """The file of the pool of `job`, made in this process; it is in `folder`."""
    if job.threads:
        torch.set_num_threads(job.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = invert(
        read_model(job.model, job.shape, job.families).to(device),
        statistics_from_bytes(job.statistics.read_bytes(), job.shape),
        job.geometry,
        job.inversion,
        mask_ratio=job.mask_ratio,
        seed=job.seed,
        folder=folder,
        on_progress=on_progress,
    )
    write_pool(folder / POOL, images)
    return folder / POOL


def synthesise_in_child(job: Job, folder: Path, on_progress: OnProgress) -> Path:
    """The same in a child process; raises InvcossError, naming the log, if that fails."""
    write_atomic(folder / "job.json", job.model_dump_json().encode())
    log = folder / "synthesis.log"
    seen = ""
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "invcoss_server.synthesis", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        while True:
            running = child.poll() is None
            if (progress := folder / "progress.json").exists() and (text := progress.read_text("utf-8")) != seen:
                seen = text
                on_progress(InversionProgress(**json.loads(text)))
            if not running:
                break
            time.sleep(LOOK_S)
    finally:
        child.kill()
        child.wait()
    if child.returncode != 0 or not (folder / POOL).exists():
        raise InvcossError(f"inversion ended with status {child.returncode}; see {log}, then start the run again")
    return folder / POOL


def main() -> None:
    """Do the job in the folder named on the command line; ends when the process that started it ends."""
    folder, parent = Path(sys.argv[1]), os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job = Job.model_validate_json((folder / "job.json").read_bytes())
    written = 0.0

    def note(progress: InversionProgress) -> None:
        nonlocal written
        if time.monotonic() - written > LOOK_S or progress.step == progress.steps:
            write_atomic(folder / "progress.json", json.dumps(asdict(progress)).encode())
            written = time.monotonic()

    synthesise_here(job, folder, note)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
