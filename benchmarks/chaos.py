"""Kill -9 of every kind of process of a real deployment, at random, while relays run: does every relay end well?

    python benchmarks/chaos.py --kills 40

A coordinator and two sites over TLS run relays of two stages on made-up images, one after the other. Killed are, each
as often as the others and at random moments: the ServerApp (the relay itself), the SuperLink, a SuperNode, a site agent
and a trainer; now and then everything at once, as in a power cut, after which only the services are started again. A
relay ends well when every stage and every evaluation is in its state and its ledger exactly once, the ledger verifies,
and its model is, bit for bit, that of a relay left in peace.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from tests.federation.deployment import KINDS, Deployment, plan_toml  # noqa: E402
from tests.federation.plans import tiny_plan  # noqa: E402

from invcoss_common.chain import records, verify  # noqa: E402
from invcoss_common.config import Plan  # noqa: E402
from invcoss_common.errors import ChainError  # noqa: E402
from invcoss_server.ledger import LEDGER, coordinator_key  # noqa: E402
from invcoss_server.runs import Run  # noqa: E402
from measurement import write_measurement  # noqa: E402

POWER_CUT = "power cut"
LONGEST_S = 900.0  # without a kill, a relay that takes longer has not completed
HOPS = ["s00-audit", "s00-train", "s01-audit", "s01-eval-00", "s01-train"]


@dataclass
class Kill:
    """One kill: seconds since the relay began, and what the relay was doing."""

    kind: str
    site: str
    at_s: float
    doing: str


@dataclass
class Relay:
    """One relay and what it went through."""

    name: str
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    completed: bool = False
    once: bool = False
    model: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="kills of single processes")
    parser.add_argument("--power-cuts", type=int, default=2, help="kills of everything, besides")
    parser.add_argument("--pause", type=float, default=12.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    asked = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        plan = chaos_plan("peace")
        with Deployment(Path(scratch), plan) as deployment:
            deployment.enrol()
            deployment.start_all()
            peace = [run_relay(deployment, f"peace-{number}", [], draw, asked.pause) for number in range(2)]
            for relay in peace:
                console.print(f"left in peace: {relay.seconds:.0f} s, model {relay.model[:12]}")
            bag = bag_of(asked.kills, asked.power_cuts, draw)
            relays: list[Relay] = []
            while bag:
                relays.append(run_relay(deployment, f"chaos-{len(relays)}", bag, draw, asked.pause))
                one = relays[-1]
                console.print(
                    f"{one.name}: {len(one.kills)} kills, {one.seconds:.0f} s, completed {one.completed}, "
                    f"once {one.once}, same model {one.model == peace[0].model}; {len(bag)} kills to go"
                )
    figures = figures_of(peace, relays)
    config = {**vars(asked), "out": None, "plan": plan.model_dump(mode="json")}
    raw = {"peace": [asdict(one) for one in peace], "relays": [asdict(one) for one in relays]}
    written = write_measurement("chaos", figures, config, raw, page(figures, peace, relays), asked.out)
    console.print(f"{figures}\n{written} and .md beside it")


def chaos_plan(name: str) -> Plan:
    relay = {"poll_s": 0.5, "answer_s": 20.0, "stall_timeout_s": 600.0}
    train = {"steps": 60, "batch_size": 8, "checkpoint_every_s": 0.5}
    return tiny_plan(name=name, relay=relay, train=train, simulation={})


def bag_of(kills: int, power_cuts: int, draw: random.Random) -> list[str]:
    """What to kill, in random order: each kind equally often."""
    bag = [KINDS[number % len(KINDS)] for number in range(kills)] + [POWER_CUT] * power_cuts
    draw.shuffle(bag)
    return bag


def run_relay(deployment: Deployment, name: str, bag: list[str], draw: random.Random, pause: float) -> Relay:
    """Run one relay to its end, killing what comes out of `bag` meanwhile."""
    deployment.plan = chaos_plan(name)
    deployment.run(plan_toml(deployment.plan))
    relay, began = Relay(name), time.monotonic()
    next_kill, last_kill = began + draw.expovariate(1 / pause), began
    while not deployment.state().is_done() and time.monotonic() - last_kill < LONGEST_S:
        if bag and time.monotonic() >= next_kill and (kill := try_to_kill(deployment, bag[-1], draw, began)):
            bag.pop()
            relay.kills.append(kill)
            last_kill = time.monotonic()
            next_kill = last_kill + draw.expovariate(1 / pause)
        time.sleep(0.05)
    run = deployment.state()
    model = run.state.stage(1).model
    relay.seconds = time.monotonic() - began
    relay.completed = run.is_done() and (run.folder / "model.safetensors").exists()
    states, hops = [run.state.stage(number).state for number in range(2)], [hop.hop for hop in run.state.hops()]
    relay.once = states == ["released", "released"] and sorted(hops) == HOPS and ledger_has_each_once(run)
    relay.model = model.sha256 if model else ""
    if not relay.completed:
        deployment.dump()
    return relay


def ledger_has_each_once(run: Run) -> bool:
    """Whether the ledger verifies, and every stage's release and every hop's hand-off and report is in it once."""
    key = coordinator_key(run.folder)
    assert key is not None
    try:
        verify(run.folder / LEDGER, [key.public_key()])
    except ChainError:
        return False
    found = list(records(run.folder / LEDGER))
    released = [record["stage"] for record in found if record.get("state") == "released"]
    hops = {kind: sorted(r["hop"] for r in found if r["kind"] == kind) for kind in ("hand-off", "accepted")}
    return sorted(released) == [0, 1] and hops == {"hand-off": HOPS, "accepted": HOPS}


def try_to_kill(deployment: Deployment, kind: str, draw: random.Random, began: float) -> Kill | None:
    """Kill a process of this kind, if there is one now."""
    doing = whereabouts(deployment)
    site = draw.choice(deployment.plan.sites) if kind in ("supernode", "agent", "trainer") else ""
    if kind == POWER_CUT:
        deployment.kill_everything()
        deployment.start_all()
    elif not deployment.kill(kind, site or None):
        return None
    return Kill(kind, site, time.monotonic() - began, doing)


def whereabouts(deployment: Deployment) -> str:
    state = deployment.state().state
    return " ".join(state.stage(number).state for number in range(2)) + f", {len(state.hops())} hops done"


def figures_of(peace: list[Relay], relays: list[Relay]) -> dict[str, float]:
    kills = Counter(kill.kind for relay in relays for kill in relay.kills)
    return {
        "kills": float(sum(kills.values()) - kills[POWER_CUT]),
        "power_cuts": float(kills[POWER_CUT]),
        "relays": float(len(relays)),
        "completed_share": statistics.mean(relay.completed for relay in relays),
        "once_share": statistics.mean(relay.once for relay in relays),
        "weights_equal_share": statistics.mean(relay.model == peace[0].model for relay in relays),
        "seconds_in_peace": statistics.mean(relay.seconds for relay in peace),
        "seconds_per_kill": (
            sum(relay.seconds for relay in relays) - len(relays) * statistics.mean(relay.seconds for relay in peace)
        )
        / max(sum(kills.values()), 1),
        **{f"kills_{kind.replace(' ', '_')}": float(kills[kind]) for kind in (*KINDS, POWER_CUT)},
    }


def page(figures: dict[str, float], peace: list[Relay], relays: list[Relay]) -> str:
    rows = [
        f"| {relay.name} | {', '.join(shown(kill) for kill in relay.kills) or 'none'} | {relay.seconds:.0f} | "
        f"{'yes' if relay.completed else 'NO'} | {'yes' if relay.once else 'NO'} | "
        f"{'yes' if relay.model == peace[0].model else 'NO'} |"
        for relay in relays
    ]
    return "\n".join(
        [
            "# Chaos: processes killed at random while relays run",
            "",
            f"{figures['kills']:.0f} times `kill -9` of one process and {figures['power_cuts']:.0f} times of all at "
            f"once, over {figures['relays']:.0f} relays of two stages through a real deployment (SuperLink, gate, two "
            "sites, TLS, node authentication) on one machine. Nothing was repaired by hand: services start again what "
            "ended, and after a power cut only the services were started.",
            "",
            f"- completed: **{figures['completed_share']:.0%}** of the relays; every stage and evaluation in "
            f"state and ledger exactly once: **{figures['once_share']:.0%}**",
            f"- final weights equal, bit for bit, to a relay left in peace: **{figures['weights_equal_share']:.0%}**",
            f"- a relay in peace took {figures['seconds_in_peace']:.0f} s; a kill cost "
            f"{figures['seconds_per_kill']:.0f} s on average",
            "",
            "| relay | killed (seconds since its begin) | seconds | completed | each once | same weights |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "'Each once' is read from the run's state and from its ledger, which must verify too. Regenerate with "
            "`python benchmarks/chaos.py --kills 40`.",
        ]
    )


def shown(kill: Kill) -> str:
    return f"{kill.kind}{f' of {kill.site}' if kill.site else ''} ({kill.at_s:.0f})"


if __name__ == "__main__":
    main()
