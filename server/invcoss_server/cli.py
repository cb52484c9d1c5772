"""The operator's command `invcoss-server`: its sub-commands, and errors as one line with an exit code of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import InvcossError, PlanError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="the plan, a TOML file such as plans/demo.toml")]


@app.command()
def simulate(
    plan: PlanFile,
    data: Annotated[Path | None, typer.Option(help="folder that the plan's site folders are in")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<name of the plan>")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print events and result as JSON lines")] = False,
) -> None:
    """Run coordinator and sites of a plan on this machine, as a real Flower run; started again, it goes on."""
    from invcoss_server.progress import ProgressView  # here and below, because they need seconds to import
    from invcoss_server.simulate import simulate as run_simulation

    loaded = load_plan(plan)
    folder = out or Path("runs") / loaded.name
    if as_json:
        run_simulation(plan, data, folder, lambda event: print(json.dumps(event), flush=True))
    else:
        with ProgressView(loaded) as view:
            run_simulation(plan, data, folder, view.show)
    _show_result(loaded, folder, as_json)


@app.command()
def report(plan: PlanFile, out: Annotated[Path | None, typer.Option(help="run folder")] = None) -> None:
    """Write the report of a run again and print its forgetting matrix; the run may be unfinished."""
    from invcoss_server.report import write_report
    from invcoss_server.state import RunState

    loaded = load_plan(plan)
    folder = out or Path("runs") / loaded.name
    if not (folder / "state.db").exists():
        raise PlanError(f"{folder}: no run here; name its folder with --out")
    write_report(loaded, RunState(folder / "state.db", loaded), ArtefactStore(folder / "artefacts"), folder)
    _show_result(loaded, folder, as_json=False)


@app.command()
def check_plan(plan: PlanFile) -> None:
    """Check a plan and print what it amounts to."""
    from rich.table import Table

    loaded = load_plan(plan)
    table = Table(
        "stage", "site", "modality", "input", "patch", "tokens", "length", title=f"{loaded.name} ({loaded.size})"
    )
    for number, stage in enumerate(loaded.stages):
        geometry, train = loaded.geometry(number), loaded.train_for(number)
        length = f"{train.steps} steps" if train.steps else f"{train.epochs} epochs"
        size, patch = ("x".join(map(str, sides)) for sides in (geometry.size, geometry.patch))
        table.add_row(str(number), stage.site, stage.modality, size, patch, str(geometry.tokens), length)
    Console().print(table)
    Console().print(f"plan digest {loaded.digest()}", highlight=False)


@app.command()
def check_model(
    plan: PlanFile, model: Annotated[Path, typer.Argument(metavar="MODEL", help="safetensors file")]
) -> None:
    """Check that a model file is one of this plan after its last stage: names, shapes, types, finite values."""
    from invcoss_common.weights import check_file, model_schema
    from invcoss_server.relay import families

    loaded = load_plan(plan)
    schema = model_schema(loaded.model_shape, families(loaded, len(loaded.stages) - 1))
    check_file(model, schema)
    print(f"{model}: {len(schema)} tensors, as the plan has them")


def _show_result(plan: Plan, folder: Path, as_json: bool) -> None:
    from invcoss_server.report import forgetting_table
    from invcoss_server.state import RunState

    state = RunState(folder / "state.db", plan)
    if as_json:
        losses: list[dict[str, Any]] = [
            {"after_stage": after, "of_stage": of, "heldout_mim_loss": loss}
            for (after, of), loss in state.losses().items()
        ]
        print(json.dumps({"event": "result", "losses": losses, "report": str(folder / "report.html")}))
        return
    console = Console()
    console.print(forgetting_table(plan, state))
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"model:  {folder / 'model.safetensors'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; an InvcossError ends it with one line on stderr and the error's exit code."""
    try:
        app()
    except InvcossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        sys.exit(130)
