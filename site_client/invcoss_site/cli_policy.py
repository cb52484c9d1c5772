"""The hospital's commands for its own policy: what is in force, what waits for a person, and that person's word."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from invcoss_common.command import AsJson, tell

commands = typer.Typer()

SiteFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="the site's own folder")]
HopName = Annotated[str, typer.Argument(metavar="HOP", help="name of the hand-off, such as s00-train")]
Seen = Annotated[
    str | None,
    typer.Option("--handoff", help="how its sha256 begins, as `pending` shows it; refused if it is another by now"),
]


@commands.command()
def policy(folder: SiteFolder, as_json: AsJson = False) -> None:
    """Show the site's policy that is in force, setting by setting."""
    from invcoss_site.policy import POLICY, load_policy, settings

    found = load_policy(folder)
    if as_json:
        print(json.dumps(found.model_dump(mode="json")))
        return
    table = Table("setting", "value", "default", "what it is")
    for setting in settings(found):
        value = "not set" if setting.value is None else json.dumps(setting.value)
        name = f"{setting.table}.{setting.name}"
        table.add_row(name, value, "yes" if setting.is_default else "no", setting.description)
    Console(markup=False).print(table)
    there = (folder / POLICY).exists()
    print(f"from {folder / POLICY}" if there else f"{folder / POLICY} is not there: the defaults hold")


@commands.command()
def pending(folder: SiteFolder, as_json: AsJson = False) -> None:
    """List the hand-offs that wait for a person's approval."""
    from invcoss_site.approval import DIGITS
    from invcoss_site.approval import pending as waiting
    from invcoss_site.home import load_home

    rows: list[dict[str, str | int]] = []
    for one in waiting(load_home(folder)):
        task, train, dp = one.handoff.task, one.handoff.task.train, one.handoff.dp
        rows.append(
            {
                "hop": one.handoff.hop,
                "handoff": one.digest,
                "run": one.handoff.run,
                "plan": one.handoff.plan_digest,
                "kind": task.kind,
                "modality": task.modality_name,
                "length": f"{train.steps} steps" if train.steps else f"{train.epochs} epochs",
                "parameters": task.model.parameters(task.families),
                "model_bytes": one.handoff.model.size_bytes,
                "pools": len(one.handoff.pools),
                "privacy": f"noise {dp.noise_multiplier:g}, delta {dp.delta:g}" if dp else "none",
                "audited": "yes" if one.handoff.audited else "no",
                "since": time.strftime("%Y-%m-%d %H:%M", time.localtime(one.since)),
                "policy": one.verdict,
            }
        )
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("nothing waits for approval")
        return
    for row in rows:
        table = Table(show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # digests are there to be compared, to the last digit
        for name, value in row.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
        Console(markup=False).print(table)
        print(f"invcoss-site approve {folder} {row['hop']} --handoff {str(row['handoff'])[:DIGITS]}   (or refuse)")


@commands.command()
def approve(folder: SiteFolder, hop: HopName, handoff: Seen = None, as_json: AsJson = False) -> None:
    """Let the work on a hand-off begin, as far as the policy allows it."""
    _decide(folder, hop, "approved", handoff, as_json, "its work begins within the policy's hours")


@commands.command()
def refuse(folder: SiteFolder, hop: HopName, handoff: Seen = None, as_json: AsJson = False) -> None:
    """Have a hand-off fail; the coordinator learns that a person said no, and nothing else."""
    _decide(folder, hop, "denied", handoff, as_json, "it fails (NotApproved)")


@commands.command()
def privacy(folder: SiteFolder, as_json: AsJson = False) -> None:
    """Show what trainings with differential privacy have spent, visit by visit, and what is left of the budget."""
    from invcoss_site.policy import load_policy
    from invcoss_site.privacy import charged, epsilon  # here, because it needs seconds to import

    charges, dp = charged(folder), load_policy(folder).dp
    rows = [{**charge.model_dump(), "epsilon": epsilon([charge], dp.max_delta)} for charge in charges]
    total = epsilon(charges, dp.max_delta) if charges else 0.0
    left = None if dp.max_epsilon is None else max(0.0, dp.max_epsilon - total)
    if as_json:
        values = {"delta": dp.max_delta, "epsilon": total, "max_epsilon": dp.max_epsilon, "left": left}
        print(json.dumps({"visits": rows, **values, "required": dp.required}))
        return
    table = Table(title=f"Privacy spent, at delta {dp.max_delta:g} ([dp] max_delta)", title_justify="left")
    for name in ("since", "run", "hop"):
        table.add_column(name, no_wrap=True)
    for name in ("noise", "rate", "steps", "statistics", "epsilon"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, charge in zip(rows, charges, strict=True):
        numbers = (charge.noise_multiplier, charge.sample_rate, charge.steps, charge.statistics_noise, row["epsilon"])
        table.add_row(charge.time[:10], charge.run, charge.hop, *(f"{number:.4g}" for number in numbers))
    table.add_section()
    table.add_row("together", *[""] * 6, f"{total:.4g}")
    Console(markup=False).print(table)
    print("no budget is set ([dp] max_epsilon)" if left is None else f"left of {dp.max_epsilon:g}: {left:.4g}")
    if not dp.required:
        print("trainings without differential privacy are allowed too ([dp] required), and are not counted here")


def _decide(
    folder: Path, hop: str, word: Literal["approved", "denied"], seen: str | None, as_json: bool, then: str
) -> None:
    from invcoss_site.approval import decide, digest_of
    from invcoss_site.home import load_home

    handoff = decide(load_home(folder), hop, word, seen)
    values: dict[str, object] = {"hop": hop, "run": handoff.run, "handoff": digest_of(handoff), "word": word}
    tell(as_json, values, f"{hop} of run {handoff.run} is {word}: {then}")
