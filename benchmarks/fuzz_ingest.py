"""Damaged and forged files of every format that is read: does any of them stop, stall or swamp a site?

    python benchmarks/fuzz_ingest.py                              # 5,000 mutations, and every seed whole
    python benchmarks/fuzz_ingest.py --only 417                   # one of them again, with its traceback
    python benchmarks/fuzz_ingest.py --extra FOLDER --mutations 500   # of your own files too; nothing is written

Seeds are made here: DICOM in every compression, NIfTI, PNG, JPEG, TIFF, slides, texts and masks. Each mutation is
written to a folder and read as a site reads it: inventory, pixels or text, and the values that the model would get, in
a process of its own that the next one takes over. A failure is: any error but an `UnreadableFile` that names the file
in one line and says why, a file that is neither read nor quarantined, values that are not numbers in [0, 1], more than
10 s of processor time (40 s of the clock, after which the process is killed), more than 2 GB of memory in the whole
process, a process that dies, and a whole file that is refused, as it was made or with a comment changed. Seed and
number make the same mutation again, with the same versions of the software.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from tests.site_client.fuzzing.judge import LONGEST_S, MEMORY_MB, Verdict, judge  # noqa: E402
from tests.site_client.fuzzing.mutations import Fuzzer, extra_seeds  # noqa: E402

from measurement import MEASUREMENTS, write_measurement  # noqa: E402

WORKERS = 2
STUCK_S = 40.0  # of the clock, in which a file must be done with, however busy the machine is
MAKING_S = 60.0  # in which a worker begins, or makes a bomb
ADDRESSES_BYTES = 12 << 30  # a worker's address space: so that a failure doesn't take the machine with it


@dataclass
class Tally:
    """What came of one format."""

    mutations: int = 0
    read: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest_s: float = 0.0
    longest_wait_s: float = 0.0
    peak_mb: float = 0.0
    failures: list[dict[str, str | int]] = field(default_factory=list)


Heard = tuple[int, str, str, bool, str, Verdict]  # number, format, edit, whether whole, sha256, what came of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=5600, help="numbers; those made twice count once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation, in this process; whole seeds have numbers below 0")
    parser.add_argument("--keep", type=Path, help="with --only: leave its files in this folder")
    parser.add_argument("--extra", type=Path, help="mutate the files of this folder instead; nothing is written")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    fuzzer = Fuzzer(asked.seed, extra_seeds(asked.extra) if asked.extra else ())
    if asked.only is not None:
        again(fuzzer, asked.only, asked.keep, console)
        return
    began = time.monotonic()
    tallies, repeated = run(fuzzer, asked.mutations, console)
    figures = figures_of(tallies, repeated, time.monotonic() - began)
    page = page_of(tallies, figures, asked.seed)
    console.print(page)
    if not asked.extra:
        config = {"numbers": asked.mutations, "seed": asked.seed, "longest_s": LONGEST_S, "memory_mb": MEMORY_MB}
        raw = {name: vars(tally) for name, tally in tallies.items()}
        console.print(f"{write_measurement('fuzz-ingest', figures, config, raw, page, asked.out)} and .md beside it")
    sys.exit(any(tally.failures for tally in tallies.values()))


def again(fuzzer: Fuzzer, number: int, keep: Path | None, console: Console) -> None:
    """Judge one mutation in this process, and show all there is to know."""
    made = fuzzer.mutation(number)
    console.print(f"{number}: {made.edit} of {made.seed.name}, {len(made.data)} bytes, {made.seed.modality}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
        verdict = judge(keep or Path(folder), made.seed, made.data)
    console.print(f"{verdict.trace}{verdict.outcome} {verdict.reason}")
    console.print(f"{verdict.seconds:.3f} s, {verdict.peak_mb:.0f} MB; {verdict.failure or 'as it should be'}")


class Worker:
    """A process that judges one number after another; by `until` it has to say something."""

    def __init__(self, fuzzer: Fuzzer) -> None:
        self.pipe, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=work, args=(theirs, fuzzer), daemon=True)
        self.process.start()
        theirs.close()
        self.number, self.until = 0, float("inf")

    def begin(self, number: int) -> None:
        self.number, self.until = number, time.monotonic() + MAKING_S
        self.pipe.send(number)

    def hear(self) -> Heard | None:
        """What came of its number; None while it is at it. A process that died or is stuck is a failure."""
        try:
            if self.pipe.poll():
                heard = self.pipe.recv()
                if heard is None:  # the mutation is made, and is read now
                    self.until = time.monotonic() + STUCK_S
                return heard
            if time.monotonic() < self.until:
                return None
            why = f"stuck for {STUCK_S:g} s"
        except EOFError:
            self.process.join(10)
            why = f"the process died ({self.process.exitcode})"
        self.end()
        return self.number, "", "", False, "", Verdict("failed", "", why, 0.0, STUCK_S, 0.0)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def work(pipe: Connection, fuzzer: Fuzzer) -> None:
    """Make and judge the mutations whose numbers come; says None when one is made, then what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES_BYTES, ADDRESSES_BYTES))
    fuzzer.mutation(-1 if not fuzzer.extra else 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        while True:
            number = pipe.recv()
            made = fuzzer.mutation(number)
            folder = Path(root) / str(number)
            folder.mkdir()
            pipe.send(None)
            verdict = judge(folder, made.seed, made.data)
            if made.whole and verdict.outcome == "quarantined":
                verdict = replace(verdict, outcome="failed", failure=f"a whole file was refused: {verdict.reason}")
            shutil.rmtree(folder)
            verdict = replace(verdict, failure=verdict.failure.replace(str(folder), "FOLDER"), reason="", trace="")
            pipe.send((number, made.seed.format, made.edit, made.whole, sha256(made.data).hexdigest(), verdict))


def run(fuzzer: Fuzzer, count: int, console: Console) -> tuple[dict[str, Tally], int]:
    """Judge everything in WORKERS processes, with a new one for each that dies or is stuck; how many were repeated."""
    tallies: dict[str, Tally] = {name: Tally() for name in fuzzer.formats}
    todo, seen, repeated = iter(fuzzer.numbers(count)), set[str](), 0
    busy: list[Worker] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(fuzzer.numbers(count)))
        idle = [Worker(fuzzer) for _ in range(WORKERS)]
        while True:
            for number in islice(todo, len(idle)):
                worker = idle.pop()
                worker.begin(number)
                busy.append(worker)
            if not busy:
                break
            wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in list(busy):
                heard = worker.hear()
                if heard is None:
                    continue
                busy.remove(worker)
                idle.append(Worker(fuzzer) if worker.pipe.closed else worker)
                repeated += not note(tallies, fuzzer, heard, seen)
                progress.update(bar, advance=1)
        for worker in idle:
            worker.end()
    return tallies, repeated


def note(tallies: dict[str, Tally], fuzzer: Fuzzer, heard: Heard, seen: set[str]) -> bool:
    """Enter what came of a number; False if the same file was there before. Whole seeds count only if they fail."""
    number, _, edit, _, digest, verdict = heard
    if not digest:  # the process could not say what it was
        made = fuzzer.mutation(number)
        edit, digest = made.edit, sha256(made.data).hexdigest()
        tally = tallies[made.seed.format]
    else:
        tally = tallies[heard[1]]
    new = digest not in seen
    seen.add(digest)
    if verdict.failure:
        tally.failures.append({"number": number, "edit": edit, "failure": verdict.failure})
    if number >= 0 and new:
        tally.mutations += 1
        tally.edits[edit] += 1
        tally.read += verdict.outcome == "read"
        if verdict.outcome == "quarantined":
            tally.quarantined[verdict.kind] += 1
    tally.seconds += verdict.seconds
    tally.slowest_s = max(tally.slowest_s, verdict.seconds)
    tally.longest_wait_s = max(tally.longest_wait_s, verdict.waited_s)
    tally.peak_mb = max(tally.peak_mb, verdict.peak_mb)
    return new


def figures_of(tallies: dict[str, Tally], repeated: int, seconds: float) -> dict[str, float]:
    """`mutations` are distinct altered files; `slowest_s` is of the processor, `longest_wait_s` of the clock."""
    every = tallies.values()
    figures = {
        "mutations": sum(tally.mutations for tally in every),
        "failures": sum(len(tally.failures) for tally in every),
        "read": sum(tally.read for tally in every),
        "quarantined": sum(tally.quarantined.total() for tally in every),
        "bombs": sum(tally.edits["bomb"] for tally in every),
        "repeated": repeated,
        "slowest_s": max(tally.slowest_s for tally in every),
        "longest_wait_s": max(tally.longest_wait_s for tally in every),
        "peak_mb": max(tally.peak_mb for tally in every),
        "seconds": seconds,
    }
    return {name: float(value) for name, value in figures.items()}


def page_of(tallies: dict[str, Tally], figures: dict[str, float], seed: int) -> str:
    rows = []
    for name, tally in tallies.items():
        why = ", ".join(f"{count} {kind}" for kind, count in tally.quarantined.most_common())
        rows.append(
            f"| {name} | {tally.mutations} | {tally.read} | {tally.quarantined.total()} | {why} | "
            f"{tally.slowest_s:.1f} | {tally.longest_wait_s:.1f} | {tally.peak_mb:.0f} | {len(tally.failures)} |"
        )
    edits: Counter[str] = sum((tally.edits for tally in tallies.values()), Counter())
    failures = [
        f"- {one['number']} ({one['edit']} of {name}): {one['failure']}"
        for name, tally in tallies.items()
        for one in tally.failures[:9]
    ]
    return "\n".join(
        [
            "# Damaged and forged files: does any of them stop, stall or swamp a site?",
            "",
            f"**{figures['mutations']:,.0f} mutations, {figures['failures']:.0f} failures.** Each file is read as a "
            "site reads it, from the inventory to the values that the model gets. It must be read, or be quarantined "
            f"with a reason that names it in one line, within {LONGEST_S:g} s of processor time and {MEMORY_MB:.0f} MB "
            "of the whole process, Python and PyTorch included. Whole files, and files with another comment, must be "
            f"read. Seed {seed}. By the clock, which also counts what else the machine does, the longest took "
            f"{figures['longest_wait_s']:.1f} s.",
            "",
            "Of what is read after an edit, nobody says that it is what it was: a pixel that changed is a pixel. "
            f"Edits: {', '.join(f'{count} {name}' for name, count in edits.most_common())}. `header`: a field of the "
            "format, with its lengths and checksums right again where it has them. `bomb`: a small file that claims or "
            "holds up to 4 GB.",
            "",
            "| format | mutations | read | quarantined | why | slowest, s | of the clock | memory, MB | failures |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            *(["", "Failures (at most 9 of each format):", "", *failures] if failures else []),
            "",
            f"`python benchmarks/fuzz_ingest.py --seed {seed} --only N` makes one of them again; in all "
            f"{figures['seconds']:.0f} s in {WORKERS} processes.",
        ]
    )


if __name__ == "__main__":
    main()
