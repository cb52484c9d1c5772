"""The hospital's command `invcoss-site`: its sub-commands, and errors as one line with an exit code of their own."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from invcoss_common.errors import InvcossError
from invcoss_common.modality import MODALITIES, SizeName, geometry_for, lookup

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ModalityName = Annotated[str, typer.Option("--modality", help=f"one of {', '.join(sorted(MODALITIES))}")]


@app.command()
def check_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder with the site's images")],
    modality: ModalityName,
    index: Annotated[
        list[str] | None, typer.Option(help="CSV file in FOLDER that lists files, cases and splits")
    ] = None,
    size: Annotated[SizeName, typer.Option(help="size of model that the images are prepared for")] = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Read every image as a visit would, and say what will be used and what will not, and why."""
    from invcoss_site.inventory import take_inventory  # here, because they need seconds to import
    from invcoss_site.prepare import prepare

    row = lookup(modality, MODALITIES)
    inventory = take_inventory(folder, row, tuple(index or ()))
    with tempfile.TemporaryDirectory() as cache, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=len(inventory.items))
        images = prepare(
            inventory,
            row,
            geometry_for(row, size),
            None,
            Path(cache),
            lambda done, of: progress.update(bar, completed=done, total=of),
        )
        train, held_out = len(images.train), len(images.heldout)
    cases = {True: set[str](), False: set[str]()}
    for item in inventory.items:
        cases[item.held_out].add(item.case)
    reasons = [rejected.reason for rejected in images.quarantined]
    if as_json:
        counts = {
            "train": train,
            "heldout": held_out,
            "train_cases": len(cases[False]),
            "heldout_cases": len(cases[True]),
        }
        print(json.dumps({"modality": modality, "images": counts, "quarantined": reasons}))
        return
    table = Table("", "images", "cases")
    table.add_row("training", str(train), str(len(cases[False])))
    table.add_row("held out", str(held_out), str(len(cases[True])))
    console = Console()
    console.print(table)
    console.print(f"not used: {len(reasons)}")
    for reason in reasons:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to make")],
    modality: ModalityName,
    cases: Annotated[int, typer.Option(min=1, help="number of cases")] = 20,
    seed: Annotated[int, typer.Option(help="the same seed makes the same images")] = 0,
) -> None:
    """Make a folder of made-up images in the modality's own format, for trying things out."""
    from invcoss_common.phantoms import write_phantoms

    write_phantoms(folder, modality, cases, seed)
    Console().print(f"{cases} cases and labels.csv in {folder}", highlight=False)


def main() -> None:
    """Run the command line; an InvcossError ends it with one line on stderr and the error's exit code."""
    try:
        app()
    except InvcossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
