"""Altered objects of every kind, each given to the very function that receives it: is anything wrong ever taken?

    python benchmarks/fuzz_trust.py                                       # all kinds, 1,500 mutations each
    python benchmarks/fuzz_trust.py --only "hand-off" --number 417        # one mutation again, with its traceback

Half of the mutations are bytes at random, half come from strategies that know the form of the object (hypothesis). The
two chains are also altered in every way at every line. A failure is: any error but the declared ones, a refusal that is
not one line, more than 5 s or 64 MiB, a process that dies, an altered sealed object that is taken (signed, chained, or
known by its digest), another object that is taken without being what its own side would write, and a whole object that
is refused. Kind, seed and number make the same mutation again, with the same versions of the software.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from tests.security.fuzzing.files import chain_kind  # noqa: E402
from tests.security.fuzzing.forgeries import chain_changes  # noqa: E402
from tests.security.fuzzing.judge import LONGEST_S, MEMORY_BYTES, Verdict, judge  # noqa: E402
from tests.security.fuzzing.kinds import kinds  # noqa: E402
from tests.security.fuzzing.mutations import altered_bytes, examples  # noqa: E402
from tests.security.fuzzing.sides import NORTH, STRANGER, NeverArrives  # noqa: E402

from measurement import MEASUREMENTS, write_measurement  # noqa: E402

BATCH = 100  # examples of a strategy that are made at a time
READY = "ready"
STUCK_S = 60.0  # a process that says nothing so long is stuck where not even an alarm gets through
LINES = "chain, every line"


@dataclass
class Tally:
    """What came of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    altered: int = 0  # that reached our code, each counted once
    repeated: int = 0
    whole: int = 0
    never_arrived: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    failures: list[dict[str, str | int]] = field(default_factory=list)
    digest: str = ""  # of all objects in turn: the same with the same seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1500, help="of each kind")
    parser.add_argument("--lines", type=int, default=60, help="records of the chain that is altered at every line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="this kind; nothing is written")
    parser.add_argument("--number", type=int, help="with --only: this mutation, in this process")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    if asked.number is not None and asked.only is None:
        parser.error("--number is of a kind: give --only")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), asked.seed, asked.lines)
        if asked.only not in (None, *fuzzer.kinds):
            sys.exit(f"--only: kinds are {', '.join(fuzzer.kinds)}")
        if asked.number is not None:
            again(fuzzer, asked.only, asked.number, console)
            return
        names = [asked.only] if asked.only else list(fuzzer.kinds)
        todo = [pair for name in names for pair in fuzzer.numbers(name, asked.mutations)]
    began = time.monotonic()
    tallies = run(todo, asked.seed, asked.lines, console)
    seconds = time.monotonic() - began
    figures = figures_of(tallies, seconds)
    page = page_of(tallies, figures, asked)
    console.print(page)
    if asked.only is None:
        config = {"mutations_per_kind": asked.mutations, "lines": asked.lines, "seed": asked.seed}
        config |= {"longest_s": LONGEST_S, "memory_bytes": MEMORY_BYTES}
        raw = {name: vars(tally) for name, tally in tallies.items()}
        console.print(f"{write_measurement('fuzz-trust', figures, config, raw, page, asked.out)} and .md beside it")
    sys.exit(any(tally.failures for tally in tallies.values()))


class Fuzzer:
    """The kinds of objects, and their mutations by number: whole ones have numbers below zero."""

    def __init__(self, root: Path, seed: int, lines: int) -> None:
        self.root, self.seed = root, seed
        self.kinds = kinds(root)
        self.kinds[LINES], written = chain_kind(root / "lines.jsonl", NORTH, lines)
        self.changes = list(chain_changes(written, STRANGER))
        self.batch, self.made = ("", 0), [b""]  # the examples that were made last, and which they are

    def numbers(self, name: str, count: int) -> Iterator[tuple[str, int]]:
        """All that is to be judged of a kind: whole ones, then `count` mutations, or every change to every line."""
        last = len(self.changes) if name == LINES else count
        return ((name, number) for number in range(-len(self.kinds[name].originals), last))

    def mutation(self, name: str, number: int) -> bytes:
        kind = self.kinds[name]
        if number < 0:
            return kind.originals[number]
        if name == LINES:
            return b"".join(self.changes[number][1])
        half, structured = divmod(number, 2)
        if not structured:
            return altered_bytes(kind.originals, Random(f"{self.seed} {name} {number}"))
        batch, at = divmod(half, BATCH)
        if self.batch != (name, batch):
            seed = int.from_bytes(sha256(f"{self.seed} {name} {batch}".encode()).digest()[:8])
            self.batch, self.made = (name, batch), examples(kind.altered, seed, BATCH)
        return self.made[at % len(self.made)]


def again(fuzzer: Fuzzer, name: str, number: int, console: Console) -> None:
    """Judge one mutation in this process, and show all there is to know."""
    data = fuzzer.mutation(name, number)
    console.print(f"{name} {number}: {len(data)} bytes, sha256 {sha256(data).hexdigest()}\n{data[:4000]!r}")
    verdict = judge(fuzzer.kinds[name], data)
    console.print(
        f"{verdict.trace}{verdict.outcome} after {verdict.seconds:.3f} s; {verdict.failure or 'as it should be'}"
    )


def run(todo: list[tuple[str, int]], seed: int, lines: int, console: Console) -> dict[str, Tally]:
    """Judge everything in `todo` in another process, and in the next one when that dies or is stuck."""
    tallies = {name: Tally() for name, _ in todo}
    seen: dict[str, set[str]] = {name: set() for name in tallies}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar, began, done = progress.add_task("", total=len(todo), rate=""), time.monotonic(), 0
        while done < len(todo):
            with judging(todo[done:], seed, lines) as results:
                for name, number in todo[done:]:
                    found = received(results)
                    note(tallies[name], number, found, seen[name])
                    done += 1
                    rate = f"{done / (time.monotonic() - began):.0f}/s"
                    progress.update(bar, completed=done, description=name, rate=rate)
                    if found is None:
                        break
    return tallies


Found = tuple[Verdict, bool, str]  # what came of an object, whether it is whole, its sha256


@contextmanager
def judging(todo: list[tuple[str, int]], seed: int, lines: int) -> Iterator[Connection]:
    """A process that judges `todo`, ended on leaving; raises EOFError when it can't begin."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        results, theirs = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=work, args=(theirs, Path(folder), todo, seed, lines))
        process.start()
        theirs.close()
        try:
            assert results.recv() == READY
            yield results
        finally:
            process.kill()
            process.join()


def received(results: Connection) -> Found | None:
    """The next result, None when the process died or is stuck."""
    try:
        return results.recv() if results.poll(STUCK_S) else None
    except EOFError:
        return None


def work(results: Connection, folder: Path, todo: list[tuple[str, int]], seed: int, lines: int) -> None:
    """Judge `todo` in order, one result each."""
    fuzzer = Fuzzer(folder, seed, lines)
    results.send(READY)
    for name, number in todo:
        data, kind = fuzzer.mutation(name, number), fuzzer.kinds[name]
        verdict = judge(kind, data)
        verdict = replace(verdict, failure=verdict.failure.replace(str(folder), "FOLDER"), trace="")
        results.send((verdict, data in kind.originals, sha256(data).hexdigest()))


def note(tally: Tally, number: int, found: Found | None, seen: set[str]) -> None:
    """Enter a result; `seen` are the digests of the kind's objects so far."""
    verdict, whole, digest = found or (
        Verdict("died", f"the process died, or was stuck for {STUCK_S:g} s", 0.0),
        False,
        "",
    )
    tally.seconds += verdict.seconds
    tally.slowest_s = max(tally.slowest_s, verdict.seconds)
    tally.digest = sha256((tally.digest + digest).encode()).hexdigest()
    if whole:
        tally.whole += 1
    elif digest and digest in seen:
        tally.repeated += 1
    elif verdict.outcome == NeverArrives.__name__:
        tally.never_arrived += 1
    else:
        tally.altered += 1
        tally.outcomes[verdict.outcome] += 1
    seen.add(digest)
    if verdict.failure:
        tally.failures.append({"number": number, "sha256": digest, "failure": verdict.failure})


def figures_of(tallies: dict[str, Tally], seconds: float) -> dict[str, float]:
    """`mutations` are altered objects that reached our code, each counted once; not what Flower can't read."""
    figures = {
        "mutations": sum(tally.altered for tally in tallies.values()),
        "failures": sum(len(tally.failures) for tally in tallies.values()),
        "never_arrived": sum(tally.never_arrived for tally in tallies.values()),
        "repeated": sum(tally.repeated for tally in tallies.values()),
        "slowest_s": max(tally.slowest_s for tally in tallies.values()),
        "seconds": seconds,
    }
    kinds = {f"mutations_{name.replace(', ', '_').replace(' ', '_')}": tally.altered for name, tally in tallies.items()}
    return {name: float(value) for name, value in {**figures, **kinds}.items()}


def page_of(tallies: dict[str, Tally], figures: dict[str, float], asked: argparse.Namespace) -> str:
    rows = []
    for name, tally in tallies.items():
        refused = ", ".join(f"{count} {kind}" for kind, count in tally.outcomes.most_common() if kind != "taken")
        rows.append(
            f"| {name} | {tally.altered} | {tally.outcomes['taken']} | {refused} | "
            f"{1000 * tally.slowest_s:.0f} | {len(tally.failures)} |"
        )
    failures = [
        f"- {name} {one['number']}: {one['failure']}" for name, tally in tallies.items() for one in tally.failures[:9]
    ]
    return "\n".join(
        [
            "# Altered objects: is anything wrong ever taken?",
            "",
            f"**{figures['mutations']:,.0f} mutations, {figures['failures']:.0f} failures.** Each object is given to "
            "the very function that receives it. It must be refused in one line by a declared class of error, within "
            f"{LONGEST_S:g} s and {MEMORY_BYTES >> 20} MiB, or, where nothing vouches for its bytes, be taken and be "
            "what its own side would write. Signed, chained or digested objects that were altered must never be taken. "
            f"Half are bytes at random, half know the form of the object; seed {asked.seed}.",
            "",
            f"`own`: altered, and then signed by the very side that altered it. `{LINES}`: every line of a chain of "
            f"{asked.lines} signed records deleted, cut off, torn, edited in each field, every two swapped, and five "
            "kinds of lines put in before each, against a head that is known. Not counted: "
            f"{figures['never_arrived']:.0f} messages that Flower can't read, so that they never reach our code, and "
            f"{figures['repeated']:.0f} mutations that were made twice.",
            "",
            "| object | mutations | of them taken | refused as | slowest, ms | failures |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            *(["", "Failures (at most 9 of each kind):", "", *failures] if failures else []),
            "",
            f"`python benchmarks/fuzz_trust.py --seed {asked.seed} --only KIND --number N` makes one of them again.",
        ]
    )


if __name__ == "__main__":
    main()
