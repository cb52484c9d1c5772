"""The operator's command `invcoss-server`: its sub-commands, and errors as one line with an exit code of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.command import AsJson, run_command, tell
from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import CredentialError, PlanError
from invcoss_common.verifier import verify_chain
from invcoss_server.cli_export import commands as export_commands
from invcoss_server.cli_runs import commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(commands)
app.add_typer(export_commands)
app.command()(verify_chain)

ConsortiumFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="the consortium's folder")]
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
    show_result(loaded, folder, as_json)


@app.command()
def report(
    plan: PlanFile, out: Annotated[Path | None, typer.Option(help="run folder")] = None, as_json: AsJson = False
) -> None:
    """Write the report of a run again and print its forgetting matrix; the run may be unfinished."""
    from invcoss_server.report import write_report
    from invcoss_server.state import RunState

    loaded = load_plan(plan)
    folder = out or Path("runs") / loaded.name
    if not (folder / "state.db").exists():
        raise PlanError(f"{folder}: no run here; name its folder with --out")
    write_report(loaded, RunState(folder / "state.db", loaded), ArtefactStore(folder / "artefacts"), folder)
    show_result(loaded, folder, as_json)


@app.command()
def check_plan(plan: PlanFile, as_json: AsJson = False) -> None:
    """Check a plan and print what it amounts to."""
    from rich.table import Table

    loaded = load_plan(plan)
    if as_json:
        print(json.dumps({"digest": loaded.digest(), "plan": loaded.model_dump(mode="json")}))
        return
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
    plan: PlanFile,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="safetensors file")],
    as_json: AsJson = False,
) -> None:
    """Check that a model file is one of this plan after its last stage: names, shapes, types, finite values."""
    from invcoss_common.weights import check_file, model_schema
    from invcoss_server.hops import families

    loaded = load_plan(plan)
    schema = model_schema(loaded.model_shape, families(loaded, range(len(loaded.stages))))
    check_file(model, schema)
    values: dict[str, object] = {"model": str(model), "tensors": len(schema)}
    tell(as_json, values, f"{model}: {len(schema)} tensors, as the plan has them")


@app.command()
def init(
    folder: ConsortiumFolder,
    name: Annotated[str, typer.Option(help="name of the consortium: lower-case letters, digits, hyphens")],
    host: Annotated[
        list[str], typer.Option(help="DNS name or IP address of the coordinator; sites use the first; may be repeated")
    ],
    port: Annotated[int, typer.Option(help="TCP port that sites connect to")] = 443,
    as_json: AsJson = False,
) -> None:
    """Make a consortium: certificate authority, server certificate, coordinator's key, empty register of sites."""
    from invcoss_common.keys import fingerprint
    from invcoss_server.provision import coordinator_digest, init_consortium

    made = init_consortium(folder, name, tuple(host), port)
    digest = coordinator_digest(folder)
    tell(
        as_json,
        {"consortium": made.name, "address": made.address, "coordinator_key_sha256": digest},
        f"consortium {made.name} in {folder}; sites will connect to {made.address}",
        f"back up {folder}; its keys are in {folder / 'pki'} and leave this machine for nothing else",
        f"compare by phone, coordinator's key: {fingerprint(digest)}",
    )


@app.command()
def renew_certificate(folder: ConsortiumFolder, as_json: AsJson = False) -> None:
    """Renew the server certificate, for 13 months; sites notice nothing."""
    from invcoss_server.provision import renew_server_certificate

    end = renew_server_certificate(folder)
    file = folder / "pki" / "server.crt"
    values: dict[str, object] = {"certificate": str(file), "valid_until": f"{end:%Y-%m-%d}"}
    tell(as_json, values, f"{file} is valid until {end:%Y-%m-%d}; start the service again to show it")


@app.command()
def enrol_site(
    folder: ConsortiumFolder,
    requests: Annotated[list[Path], typer.Argument(metavar="REQUEST", help="a site's enrolment-request.json")],
    out: Annotated[
        Path | None, typer.Option(help="join file to write, for one request; default join-<site>.json")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="the site has new keys; revoke its old ones")] = False,
    fingerprint: Annotated[
        str | None, typer.Option(help="of the site's signing key, as the site read it out; refused if it differs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Enrol sites by their requests and write a join file for each; no other site is touched."""
    from invcoss_common.enrolment import read_enrolment_file, write_enrolment_file
    from invcoss_common.keys import fingerprint as grouped
    from invcoss_server.provision import enrol_site

    if len(requests) > 1 and (out or fingerprint):
        raise CredentialError("--out and --fingerprint are for one request; enrol the sites one by one")
    for request in requests:
        joined = enrol_site(folder, read_enrolment_file(request), replace, fingerprint)
        path = out or Path(f"join-{joined.site}.json")
        write_enrolment_file(joined, path)
        tell(
            as_json,
            {"site": joined.site, "join_file": str(path), "signing_key_sha256": joined.signing_key_sha256},
            f"site {joined.site} is enrolled; send it {path}",
            "compare these by phone; if one differs, revoke the site at once:",
            f"  site's signing key: {grouped(joined.signing_key_sha256)}",
            f"  site's node key:    {grouped(joined.node_key_sha256)}",
            f"  coordinator's key:  {grouped(joined.coordinator_key_sha256)}",
        )


@app.command()
def revoke_site(
    folder: ConsortiumFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the site")],
    as_json: AsJson = False,
) -> None:
    """Revoke a site's keys, for ever; no other site is touched."""
    from invcoss_server.provision import revoke_site

    revoke_site(folder, name)
    tell(as_json, {"site": name, "revoked": True}, f"site {name} is revoked")


@app.command()
def sites(
    folder: ConsortiumFolder,
    as_json: AsJson = False,
) -> None:
    """List the sites and every key they have or had."""
    from dataclasses import asdict

    from rich.table import Table

    from invcoss_common.keys import fingerprint
    from invcoss_server.provision import sites

    found = sites(folder)
    if as_json:
        print(json.dumps([asdict(site) for site in found]))
        return
    table = Table("site", "enrolled", "revoked", "signing key")
    for site in found:
        revoked = site.revoked[:10] if site.revoked else "no"
        table.add_row(site.name, site.enrolled[:10], revoked, fingerprint(site.signing_key_sha256))
    Console().print(table)


def show_result(plan: Plan, folder: Path, as_json: bool) -> None:
    """Print the forgetting matrix of a run, what the audits of its pools found, and where its report and model are."""
    from invcoss_server.report import audit_table, forgetting_table, releases
    from invcoss_server.state import RunState

    state = RunState(folder / "state.db", plan)
    if as_json:
        losses: list[dict[str, Any]] = [
            {"after_stage": after, "of_stage": of, "heldout_mim_loss": loss}
            for (after, of), loss in state.losses().items()
        ]
        audits = [release.model_dump(mode="json") for release in releases(plan, state).values()]
        values = {"event": "result", "losses": losses, "audits": audits, "report": str(folder / "report.html")}
        print(json.dumps(values))
        return
    console = Console()
    console.print(forgetting_table(plan, state))
    console.print(audit_table(plan, state) if plan.relay.audit else "the pools were not audited (relay.audit = false)")
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"model:  {folder / 'model.safetensors'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    run_command(app)
