"""Hand-off of the `base` model and of a 1 GB pool through a real deployment: seconds, bytes on the wire, memory.

    python benchmarks/handoff.py --accuracy      # half an hour on two cores; 10 GB of disk, 8 GB of memory

A coordinator and two sites run relays of two stages over TLS with node authentication, by their own commands. Training
and inversion are one step, so that little but the hand-off takes long. The pool of the first stage would be small:
while it is made the relay is paused, a pool of the size asked for is recorded as that stage's, and the relay goes on
and delivers it as any other. Such a pool is not one to audit, so the plan is without (`relay.audit = false`), and what
an audit adds is not measured: the pool once more, to the site before. Every variant has a deployment of its own:

    plain       float32; parts of 64 MiB
    small       bfloat16 and compression; parts of 64 MiB
    part-128    float32, first stage only; parts of 128 MiB

Bytes on the wire are counted where a firewall would see them, by a forwarder between the sites and the gate, so TLS,
HTTP and all of Flower's own messages are in them. Memory is each process's largest resident set. With `--accuracy`,
small relays in this process tell what bfloat16 on the wire does to the held-out losses.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from tests.federation.deployment import Deployment, plan_toml  # noqa: E402
from tests.federation.loopback import LoopbackCourier  # noqa: E402
from tests.federation.plans import tiny_plan  # noqa: E402

from invcoss_common.artefacts import ArtefactStore  # noqa: E402
from invcoss_common.canonical import write_atomic  # noqa: E402
from invcoss_common.config import Plan  # noqa: E402
from invcoss_common.phantoms import write_phantoms  # noqa: E402
from invcoss_common.pools import write_pool  # noqa: E402
from invcoss_common.records import Artefact  # noqa: E402
from invcoss_server.events import Tail  # noqa: E402
from invcoss_server.relay import relay  # noqa: E402
from invcoss_server.runs import EVENTS  # noqa: E402
from invcoss_server.state import Hop, RunState  # noqa: E402
from invcoss_server.synthesis import synthesise_here  # noqa: E402
from invcoss_site.policy import POLICY  # noqa: E402
from invcoss_site.simulated import SMALL, simulated_home  # noqa: E402
from invcoss_site.visit import visit  # noqa: E402
from measurement import mean, spread, write_measurement  # noqa: E402

LOOK_S = 0.2
LONGEST_S = 1200.0
NOISE_SD = 4.0  # grey levels of 255: as hard to deflate as inverted pools of real images, or harder (0.46 to 0.93)
GATE = "127.0.0.2"  # where the gate listens; the forwarder stands at 127.0.0.1

# Part of a command line -> who that is; the first that fits.
ROLES = {
    "invcoss_server.launch": "relay (ServerApp)",
    "invcoss_server.synthesis": "inversion",
    "flower-superlink": "SuperLink",
    "invcoss_server.gate": "gate",
    "flower-supernode": "SuperNode",
    "invcoss_site.launch": "clientapp",
    "invcoss_site.agent": "agent",
    "invcoss_site.work": "worker",
    "flower-superexec": "SuperExec",
    "invcoss-server start": "service, coordinator",
    "invcoss-site start": "service, site",
}
RELAY = "relay (ServerApp)"
BOTH = "model + pool"


@dataclass(frozen=True)
class Variant:
    """One way to hand off; `stages` of 1 is without a pool."""

    name: str
    relay: dict[str, object] = field(default_factory=dict)
    stages: int = 2


VARIANTS = (
    Variant("plain"),
    Variant("small", {"wire_dtype": "bfloat16", "compress": True}),
    Variant("part-128", {"part_mib": 128}, 1),
)


@dataclass
class Crossing:
    """One direction of one hop. `plain_bytes` are its artefacts as files, `sent_bytes` their parts as the relay counts
    them, `wire_*` what crossed meanwhile. `cpu_s` is by process."""

    variant: str
    hop: str
    way: str
    what: str
    seconds: float
    parts: int
    plain_bytes: int
    sent_bytes: int
    wire_down_bytes: int
    wire_up_bytes: int
    cpu_s: dict[str, float]


@dataclass
class Measured:
    """One variant: its crossings, bytes of its models as float32 files, and peaks in MB and starts by process."""

    name: str
    seconds: float
    model_bytes: list[int]
    pool_bytes: int
    crossings: list[Crossing]
    peak_mb: dict[str, float]
    starts: dict[str, int]
    superlink_db_mb: float
    idle_share: float


class Forwarder:
    """Passes TCP connections on to `target` and counts their bytes: `down` to the sites, `up` from them."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        self.bytes = {"down": 0, "up": 0}
        self.target = target
        self.lock = threading.Lock()
        self.listener = socket.create_server(listen)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self.listener.accept()
                try:
                    gate = socket.create_connection(self.target)
                except OSError:  # the gate is not up yet; the site tries again
                    site.close()
                    continue
                for args in ((site, gate, "up"), (gate, site, "down")):
                    threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        buffer = memoryview(bytearray(1 << 18))
        with suppress(OSError):
            while count := source.recv_into(buffer):
                sink.sendall(buffer[:count])
                with self.lock:
                    self.bytes[way] += count
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Watch:
    """Samples all processes of a deployment: largest resident memory and CPU time by role, and the wire's bytes."""

    def __init__(self, root: Path, wire: Forwarder) -> None:
        self.mark = f"INVCOSS_TEST={root}".encode()
        self.wire = wire
        self.peak_mb: dict[str, float] = defaultdict(float)
        self.seen: dict[tuple[int, str], tuple[str, float]] = {}  # (pid, start) -> role, CPU seconds
        self.times: list[float] = []
        self.samples: list[tuple[dict[str, float], int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def starts(self) -> dict[str, int]:
        return dict(Counter(role for role, _ in self.seen.values()))

    def between(self, began: float, ended: float) -> tuple[dict[str, float], int, int]:
        """CPU seconds by role, and bytes down and up, from `began` to `ended` (seconds since 1970)."""
        cpu_0, down_0, up_0 = self._at(began)
        cpu_1, down_1, up_1 = self._at(ended)
        cpu = {role: value - cpu_0.get(role, 0.0) for role, value in cpu_1.items()}
        return {role: value for role, value in cpu.items() if value >= 0.1}, down_1 - down_0, up_1 - up_0

    def _at(self, moment: float) -> tuple[dict[str, float], int, int]:
        return self.samples[max(bisect_right(self.times, moment) - 1, 0)]

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, IndexError):
                    if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                        self._look(folder)
            cpu: dict[str, float] = defaultdict(float)
            for role, seconds in self.seen.values():
                cpu[role] += seconds
            self.times.append(time.time())
            self.samples.append((dict(cpu), self.wire.bytes["down"], self.wire.bytes["up"]))

    def _look(self, folder: Path) -> None:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        role = next((name for part, name in ROLES.items() if part in command), "commands and shells")
        lines = (folder / "status").read_text().splitlines()
        peak = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")]
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        self.seen[int(folder.name), stat[19]] = (role, seconds)
        self.peak_mb[role] = max(self.peak_mb[role], *peak)


def handoff_plan(variant: Variant) -> Plan:
    """The smallest plan of the base model: as little as can be besides the hand-off."""
    return tiny_plan(
        ("xray", "ct")[: variant.stages],
        name=variant.name,
        size="base",
        train={"steps": 1, "batch_size": 2},
        inversion={
            "pool_size": 2,
            "steps": 1,
            "batch_size": 2,
            "images_per_generator": 2,
            "width": 8,
            "latent_channels": 4,
        },
        evaluate={"max_images": 1, "mask_draws": 1, "batch_size": 1},
        relay={"poll_s": 0.5, "answer_s": 600.0, "stall_timeout_s": 1200.0, "audit": False, **variant.relay},
        simulation={},
    )


def measure(variant: Variant, pool: Path, folder: Path) -> Measured:
    """Run one variant in a deployment of its own."""
    plan = handoff_plan(variant)
    with Deployment(folder, plan, phantoms=5, listen=GATE) as deployment:
        deployment.enrol()
        for site in plan.sites:  # which by themselves work for no run without audits
            write_atomic(deployment.home_folder(site) / POLICY, SMALL)
        with watched(deployment) as watch:
            deployment.start_all()
            began, idle_0 = time.time(), idle_s()
            deployment.run(plan_toml(plan))
            if variant.stages > 1:
                put_pool(deployment, pool)
            deployment.wait_until(lambda: deployment.state().is_done(), LONGEST_S, f"the relay of '{variant.name}'")
            seconds = time.time() - began
            idle = (idle_s() - idle_0) / seconds / (os.cpu_count() or 1)
        run = deployment.state()
        models = [stage.model.size_bytes for n in range(variant.stages) if (stage := run.state.stage(n)).model]
        database = sum(file.stat().st_size for file in (deployment.consortium / "flower").glob("superlink.db*"))
        return Measured(
            variant.name,
            seconds,
            models,
            pool.stat().st_size if variant.stages > 1 else 0,
            list(crossings(deployment, watch, plan)),
            dict(watch.peak_mb),
            watch.starts(),
            database / 1e6,
            idle,
        )


@contextmanager
def watched(deployment: Deployment) -> Iterator[Watch]:
    from invcoss_server.provision import load_consortium

    port = load_consortium(deployment.consortium).port
    wire = Forwarder(("127.0.0.1", port), (GATE, port))
    watch = Watch(deployment.root, wire)
    try:
        yield watch
    finally:
        watch.stop()
        wire.close()


def put_pool(deployment: Deployment, pool: Path) -> None:
    """Pause the relay while it inverts the first stage, and record `pool` as that stage's."""
    name = deployment.plan.name
    deployment.wait_until(
        lambda: deployment.state().state.stage(0).state == "inverting", LONGEST_S, "the visit of stage 0"
    )
    deployment.server("pause", deployment.consortium, name)
    deployment.wait_until(
        lambda: deployment.state().outcome() is not None and not deployment.state().is_alive(), 120, "pausing"
    )
    run = deployment.state()
    assert (run.state.stage(0).state, run.state.stage(1).state) == ("inverting", "waiting"), "paused too late"
    copy = run.folder / "pool.draft"
    shutil.copyfile(pool, copy)
    artefact = ArtefactStore(run.folder / "artefacts").adopt(copy)
    run.state.move(0, "inverting", pool=artefact, inversion_s=0.0)
    deployment.server("resume", deployment.consortium, name)


def crossings(deployment: Deployment, watch: Watch, plan: Plan) -> Iterator[Crossing]:
    """Both directions of every hop that carried artefacts."""
    run = deployment.state()
    ends = {e["hop"]: e["time"] for e in Tail(run.folder / EVENTS, from_start=True).new() if e["event"] == "hop"}
    for hop in run.state.hops():
        handoff, end = run.state.hand_off(hop.hop), ends[hop.hop]
        assert handoff is not None
        down, up = handoff.artefacts, hop.report.artefacts
        begin = end - hop.deliver_s - hop.work_s - hop.fetch_s
        yield _crossing(watch, plan, hop, "down", down, hop.sent_bytes, (begin, begin + hop.deliver_s))
        if up:
            yield _crossing(watch, plan, hop, "up", up, hop.received_bytes, (end - hop.fetch_s, end))


def _crossing(
    watch: Watch, plan: Plan, hop: Hop, way: str, artefacts: tuple[Artefact, ...], sent: int, when: tuple[float, float]
) -> Crossing:
    cpu, wire_down, wire_up = watch.between(*when)
    part = plan.relay.part_mib << 20
    return Crossing(
        plan.name,
        hop.hop,
        way,
        (BOTH if len(artefacts) > 1 else "model") if way == "down" else "model + statistics",
        when[1] - when[0],
        sum(math.ceil(artefact.size_bytes / part) for artefact in artefacts),
        sum(artefact.size_bytes for artefact in artefacts),
        sent,
        wire_down,
        wire_up,
        cpu,
    )


def idle_s() -> float:
    """Seconds for which the machine's cores, all together, had nothing to do since it started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def make_pool(path: Path, megabytes: float, seed: int = 0) -> None:
    """Write a pool of 224 x 224 images: chest phantoms with noise of `NOISE_SD`."""
    side, rng = 224, np.random.default_rng(seed)
    count = math.ceil(megabytes * 1e6 / side**2)
    with tempfile.TemporaryDirectory() as scratch:
        write_phantoms(Path(scratch), "xray", 64, seed)
        drawn = [Image.open(file).convert("L").resize((side, side)) for file in sorted(Path(scratch).glob("*.png"))]
    films = np.stack([np.asarray(film, np.float32) for film in drawn])
    images = np.empty((count, 1, side, side), np.uint8)
    for first in range(0, count, len(films)):
        some = images[first : first + len(films), 0]
        noise = NOISE_SD * rng.standard_normal(some.shape, np.float32)
        some[:] = np.clip(films[: len(some)] + noise, 0, 255)
    write_pool(path, images)


# What bfloat16 on the wire costs


@dataclass
class Trained:
    """One small relay: its forgetting matrix, and the bytes of its trained models as they crossed."""

    seed: int
    wire_dtype: str
    losses: dict[str, float]
    model_bytes_received: int


def accuracy_plan(seed: int, wire: dict[str, object]) -> Plan:
    modalities = ("xray", "ct", "mri", "pathology")
    return tiny_plan(
        modalities,
        name="accuracy",
        seed=seed,
        train={"steps": 100, "batch_size": 16},
        inversion={"pool_size": 16, "steps": 20, "batch_size": 8, "width": 32, "images_per_generator": 16},
        relay={"poll_s": 0.02, "audit": False, **wire},
        simulation={f"{name}-site": {"phantoms": 40} for name in modalities},
    )


def train_small(seed: int, wire: dict[str, object], folder: Path) -> Trained:
    plan = accuracy_plan(seed, wire)
    homes = {site: simulated_home(plan, site, None, folder) for site in plan.sites}
    relay(plan, LoopbackCourier(homes, visit), folder, synthesise_here)
    state = RunState(folder / "state.db", plan)
    losses = {f"{after}-{of}": loss for (after, of), loss in state.losses().items()}
    received = sum(hop.received_bytes for hop in state.hops())
    return Trained(seed, plan.relay.wire_dtype, losses, received)


def measure_accuracy(seeds: range, scratch: Path, console: Console) -> list[Trained]:
    done = []
    for seed in seeds:
        for wire in ({}, {"wire_dtype": "bfloat16", "compress": True}):
            began = time.monotonic()
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                done.append(train_small(seed, wire, Path(folder)))
            console.print(f"seed {seed}, {done[-1].wire_dtype}: {time.monotonic() - began:.0f} s")
    return done


def changes(trained: list[Trained]) -> dict[str, list[float]]:
    """Held-out loss with bfloat16 minus that with float32: by cell (`after-of`, stages from 0), one a seed."""
    exact, lossy = ([one for one in trained if one.wire_dtype == dtype] for dtype in ("float32", "bfloat16"))
    return {
        cell: [b.losses[cell] - a.losses[cell] for a, b in zip(exact, lossy, strict=True)] for cell in exact[0].losses
    }


def spreads(trained: list[Trained]) -> dict[str, float]:
    """By cell: standard deviation between seeds, float32."""
    exact = [one for one in trained if one.wire_dtype == "float32"]
    return {cell: spread([one.losses[cell] for one in exact]) for cell in exact[0].losses}


def accuracy_figures(trained: list[Trained]) -> dict[str, float]:
    every = [change for row in changes(trained).values() for change in row]
    received = {
        dtype: sum(one.model_bytes_received for one in trained if one.wire_dtype == dtype)
        for dtype in ("float32", "bfloat16")
    }
    return {
        "bf16_loss_change_mean": mean(every),
        "bf16_loss_change_median_size": statistics.median(map(abs, every)),
        "bf16_loss_change_max": max(map(abs, every)),
        "float32_loss_spread_between_seeds": mean(list(spreads(trained).values())),
        "wire_bytes_over_fp32_bytes_trained_nano": received["bfloat16"] / received["float32"],
    }


# Figures and page


def moved(crossings: list[Crossing]) -> tuple[float, int, int, int]:
    """Seconds, parts, bytes as files and bytes on the wire of some crossings."""
    return (
        sum(one.seconds for one in crossings),
        sum(one.parts for one in crossings),
        sum(one.plain_bytes for one in crossings),
        sum(one.wire_down_bytes + one.wire_up_bytes for one in crossings),
    )


def figures_of(measured: list[Measured]) -> dict[str, float]:
    by_name = {one.name: one for one in measured}
    plain, figures = by_name["plain"], {}
    for one in measured:
        tag = one.name.replace("-", "_")
        seconds, parts, size, _ = moved(models_only(one))
        figures[f"seconds_model_down_{tag}"] = one.crossings[0].seconds
        figures[f"seconds_model_up_{tag}"] = one.crossings[1].seconds
        figures[f"seconds_per_part_{tag}"] = seconds / parts
        figures[f"cpu_s_per_mb_{tag}"] = sum(sum(c.cpu_s.values()) for c in models_only(one)) / (size / 1e6)
        figures[f"mb_per_s_{tag}"] = size / 1e6 / seconds
        figures[f"relay_peak_mb_{tag}"] = one.peak_mb[RELAY]
        figures[f"relay_peak_over_model_bytes_{tag}"] = one.peak_mb[RELAY] * 1e6 / one.model_bytes[0]
        if both := with_pool(one):
            figures[f"seconds_model_and_pool_{tag}"] = both.seconds
            figures[f"seconds_pool_1gb_{tag}"] = (both.seconds - one.crossings[0].seconds) * 1e9 / one.pool_bytes
    figures["seconds"] = figures["seconds_model_down_plain"] + figures["seconds_model_up_plain"]
    figures["seconds_pool_1gb"] = figures["seconds_pool_1gb_plain"]
    figures["model_fp32_mb"] = plain.model_bytes[0] / 1e6
    figures["pool_mb"] = plain.pool_bytes / 1e6
    figures["coordinator_peak_over_model_bytes"] = max(
        value for name, value in figures.items() if name.startswith("relay_peak_over_model_bytes_")
    )
    for role, peak in plain.peak_mb.items():
        figures[f"peak_mb_{re.sub(r'[^a-z]+', '_', role.lower()).strip('_')}"] = peak
    figures["wire_bytes_over_file_bytes_plain"] = moved(plain.crossings)[3] / moved(plain.crossings)[2]
    if (small := by_name.get("small")) and (both := with_pool(small)):
        figures["wire_bytes_over_fp32_bytes"] = moved(models_only(small))[3] / moved(models_only(plain))[2]
        pool_wire = moved([both])[3] - moved(small.crossings[:1])[3]
        figures["wire_bytes_over_pool_bytes"] = pool_wire / small.pool_bytes
    return figures


def models_only(one: Measured) -> list[Crossing]:
    return [crossing for crossing in one.crossings if crossing.what != BOTH]


def with_pool(one: Measured) -> Crossing | None:
    return next((crossing for crossing in one.crossings if crossing.what == BOTH), None)


def page(measured: list[Measured], figures: dict[str, float], beside: str) -> str:
    """The page beside the figures."""
    plain = measured[0]

    def peak(variant: str, role: str) -> str:
        return f"{next(one.peak_mb[role] for one in measured if one.name == variant):.0f}"

    peaks = ", ".join(f"{one.name} {one.peak_mb[RELAY] * 1e6 / one.model_bytes[0]:.2f}" for one in measured)
    lines = [
        "# Hand-off of the base model and of a 1 GB pool",
        "",
        f"Model: {figures['model_fp32_mb']:.0f} MB as float32 (`base`, ViT-B/16 with its decoder; "
        f"{plain.model_bytes[-1] / 1e6:.0f} MB once it has 3-D too). Pool: {figures['pool_mb']:.0f} MB of uint8 "
        f"images, 224 x 224, phantoms with noise of {NOISE_SD:g} grey levels. Coordinator and two sites on one "
        "machine: SuperLink, gate and SuperNodes over TLS with node authentication, started by their own commands. One "
        "training step, so the weights are close to their initial values; one inversion step."
        + (
            f" **Not alone on the machine** ({beside}): seconds are upper bounds, bytes and memory hold." * bool(beside)
        ),
        "",
        f"- The base model takes **{figures['seconds_model_down_plain']:.0f} s down and "
        f"{figures['seconds_model_up_plain']:.0f} s up**; 1 GB of pool takes {figures['seconds_pool_1gb']:.0f} s more.",
        f"- The coordinator's relay process peaks at **{figures['coordinator_peak_over_model_bytes']:.2f} times the "
        f"model's float32 bytes** (limit 3) in the worst variant: {peaks}.",
    ]
    if "wire_bytes_over_fp32_bytes" in figures:
        lines.append(
            f"- bfloat16 with compression brings **{figures['wire_bytes_over_fp32_bytes']:.2f} of the float32 bytes** "
            f"of a model onto the wire, and {figures['wire_bytes_over_pool_bytes']:.2f} of this pool's. The model then "
            f"takes {figures['seconds_model_down_small']:.0f} s down and {figures['seconds_model_up_small']:.0f} s up, "
            f"1 GB of pool {figures['seconds_pool_1gb_small']:.0f} s. Plain, "
            f"{figures['wire_bytes_over_file_bytes_plain']:.3f} of the files' bytes cross."
        )
    cpu: Counter[str] = Counter()
    for crossing in plain.crossings:
        cpu.update(crossing.cpu_s)
    busiest = ", ".join(f"{role} {value / cpu.total():.0%}" for role, value in cpu.most_common(3))
    lines += [
        f"- A part of 64 MiB takes {figures['seconds_per_part_plain']:.1f} s; all processes together spend "
        f"{figures['cpu_s_per_mb_plain']:.3f} s of CPU time on a MB: {busiest}. Flower starts a clientapp for every "
        f"message ({plain.starts.get('clientapp', 0)} in `plain`).",
        "- The relay holds one model at most, while it writes it, and never a pool. A worker holds student, frozen "
        "teacher, gradients and both Adam moments, five models in all; it maps the pool and reads what it draws.",
    ]
    if "cpu_s_per_mb_part_128" in figures:
        lines.append(
            "- In parts of 128 MiB a MB takes "
            f"{figures['cpu_s_per_mb_part_128'] / figures['cpu_s_per_mb_plain']:.2f} of the CPU time of parts of 64 "
            f"MiB; relay and clientapp pay for it with {peak('part-128', RELAY)} and {peak('part-128', 'clientapp')} "
            f"MB instead of {peak('plain', RELAY)} and {peak('plain', 'clientapp')}."
        )
    lines += [
        "",
        "## Every crossing",
        "",
        "Seconds are from the relay's first question to its last answer, for `up` with the check of every tensor; the "
        "seconds of a pool are those of model + pool less those of the first model. "
        "`wire` is all that crossed between sites and gate meanwhile, both ways. CPU seconds show where time goes; "
        "processes of less than a second are left out.",
        "",
        "| variant | hop | what | s | parts | s/part | files MB | wire MB | CPU s by process |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for crossing in (crossing for one in measured for crossing in one.crossings):
        seconds, parts, size, wire = moved([crossing])
        busy = sorted(crossing.cpu_s.items(), key=lambda item: -item[1])
        lines.append(
            f"| {crossing.variant} | {crossing.hop} | {crossing.what} {crossing.way} | {seconds:.1f} | {parts} | "
            f"{seconds / parts:.2f} | {size / 1e6:.0f} | {wire / 1e6:.0f} | "
            f"{', '.join(f'{role} {value:.0f}' for role, value in busy if value >= 1)} |"
        )
    names = [one.name for one in measured]
    roles = sorted({role for one in measured for role in one.peak_mb}, key=lambda role: -plain.peak_mb.get(role, 0))
    lines += [
        "",
        "## Peak resident memory of each process, MB",
        "",
        "The largest of all processes of a kind (`VmHWM`, sampled five times a second, so one that lives for a moment "
        "only is missed). It counts pages of mapped files, which the system takes back when it needs them: the "
        "worker maps the pool. Processes started in `plain` in brackets.",
        "",
        f"| process | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for role in roles:
        cells = [f"{one.peak_mb[role]:.0f}" if role in one.peak_mb else "" for one in measured]
        lines.append(f"| {role} ({plain.starts.get(role, 0)}) | {' | '.join(cells)} |")
    lines += [
        f"| SuperLink's database, on disk | {' | '.join(f'{one.superlink_db_mb:.0f}' for one in measured)} |",
        f"| share of the cores idle | {' | '.join(f'{one.idle_share:.0%}' for one in measured)} |",
        "",
    ]
    return "\n".join(lines)


def accuracy_page(figures: dict[str, float], trained: list[Trained]) -> str:
    rows, between = changes(trained), spreads(trained)
    worst = max(rows, key=lambda cell: max(map(abs, rows[cell])))
    others = max(abs(change) for cell, row in rows.items() if cell != worst for change in row)
    stages = [stage.modality for stage in accuracy_plan(0, {}).stages]
    lines = [
        "## What bfloat16 on the wire costs",
        "",
        f"Relays of four stages of the `nano` model on phantoms, in one process, {len(rows[worst])} seeds, each once "
        "with float32 and once with bfloat16 and compression. Held-out loss with bfloat16 minus that with float32:",
        "",
        f"- mean **{figures['bf16_loss_change_mean']:+.4f}**, median size "
        f"{figures['bf16_loss_change_median_size']:.4f}, largest size **{figures['bf16_loss_change_max']:.4f}**; "
        f"between seeds a cell varies by {figures['float32_loss_spread_between_seeds']:.4f} on average.",
        f"- The largest is in one cell, {named(worst, stages)}, which varies by {between[worst]:.4f} between seeds "
        f"with float32, too; everywhere else it is {others:.4f} at most.",
        f"- The trained weights need {figures['wire_bytes_over_fp32_bytes_trained_nano']:.2f} of their float32 bytes.",
        "",
        "| cell | change by seed | between seeds (SD, float32) |",
        "| --- | --- | --- |",
    ]
    for cell, row in rows.items():
        shown = " / ".join(f"{change:+.4f}" for change in row)
        lines.append(f"| {named(cell, stages)} | {shown} | {between[cell]:.4f} |")
    return "\n".join([*lines, ""])


def named(cell: str, stages: list[str]) -> str:
    after, of = (stages[int(number)] for number in cell.split("-"))
    return f"{of} after {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(one.name for one in VARIANTS), help="must begin with plain")
    parser.add_argument("--pool-mb", type=float, default=1000.0, help="10^6 bytes of pool")
    parser.add_argument("--accuracy", action="store_true", help="measure what bfloat16 costs, too")
    parser.add_argument("--seeds", type=int, default=3, help="of --accuracy")
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the page")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    asked = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="handoff-") as folder:
        scratch = Path(folder)
        make_pool(scratch / "pool", asked.pool_mb)
        measured = []
        for variant in (one for one in VARIANTS if one.name in asked.variants.split(",")):
            measured.append(measure(variant, scratch / "pool", scratch / variant.name))
            shutil.rmtree(scratch / variant.name)
            console.print(f"{variant.name}: {measured[-1].seconds:.0f} s, relay {measured[-1].peak_mb[RELAY]:.0f} MB")
        trained = measure_accuracy(range(asked.seeds), scratch, console) if asked.accuracy else []
    written = write(measured, trained, asked)
    console.print(f"{written.with_suffix('.md').read_text(encoding='utf-8')}\n{written} and .md beside it")


def write(measured: list[Measured], trained: list[Trained], asked: argparse.Namespace) -> Path:
    figures = figures_of(measured)
    text = page(measured, figures, asked.beside)
    if trained:
        figures |= accuracy_figures(trained)
        text += "\n" + accuracy_page(figures, trained)
    raw = {"variants": [asdict(one) for one in measured], "accuracy": [asdict(one) for one in trained]}
    config = {
        **{name: value for name, value in vars(asked).items() if name != "out"},
        "plans": {variant.name: handoff_plan(variant).model_dump(mode="json") for variant in VARIANTS},
        "accuracy_plan": accuracy_plan(0, {}).model_dump(mode="json"),
    }
    return write_measurement("handoff", figures, config, raw, text, asked.out)


if __name__ == "__main__":
    main()
