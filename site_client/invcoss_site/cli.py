"""The hospital's command `invcoss-site`: its sub-commands, and errors as one line with an exit code of their own."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from invcoss_common.chain import parse_head
from invcoss_common.command import AsJson, run_command, service_says, tell
from invcoss_common.errors import ChainError, DataError
from invcoss_common.modality import MODALITIES
from invcoss_common.verifier import Keys, KnownHead, Last, read_keys, show, tell_verified, verify_chain
from invcoss_site.cli_data import commands as data_commands
from invcoss_site.cli_downstream import commands as downstream_commands
from invcoss_site.cli_policy import commands as policy_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Part = Literal["all", "agent", "network"]
SiteFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="the site's own folder")]
app.command()(verify_chain)
app.add_typer(data_commands)
app.add_typer(downstream_commands)
app.add_typer(policy_commands)
ModalityName = Annotated[str, typer.Option("--modality", help=f"one of {', '.join(sorted(MODALITIES))}")]


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to make")],
    modality: ModalityName,
    cases: Annotated[int, typer.Option(min=1, help="number of cases")] = 20,
    seed: Annotated[int, typer.Option(help="the same seed makes the same images")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a folder of made-up images in the modality's own format, for trying things out."""
    from invcoss_common.phantoms import write_phantoms

    write_phantoms(folder, modality, cases, seed)
    tell(as_json, {"folder": str(folder), "cases": cases}, f"{cases} cases and labels.csv in {folder}")


@app.command()
def init(
    folder: SiteFolder,
    name: Annotated[str, typer.Option(help="name of the site: lower-case letters, digits, hyphens")],
    data: Annotated[Path | None, typer.Option(help="folder with the site's images")] = None,
    phantoms: Annotated[
        str | None, typer.Option(metavar="MODALITY", help="instead of --data: make 60 made-up images, for a trial")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the site's folder, its keys and the enrolment request for the operator."""
    from invcoss_common.keys import fingerprint
    from invcoss_site.enrol import init_site, make_trial_images

    if (data is None) == (phantoms is None):
        raise DataError("give exactly one of --data and --phantoms")
    if data is None:
        data = make_trial_images(folder, str(phantoms), name)
    request = init_site(folder, name, data)
    file = folder / "enrolment-request.json"
    tell(
        as_json,
        {"site": name, "request": str(file), "signing_key_sha256": request.signing_key_sha256},
        f"site {name} in {folder}; the private keys in {folder / 'keys'} never leave this machine",
        f"read and set what the site allows: {folder / 'policy.toml'}",
        f"send the operator {file}; it holds public keys only",
        "compare these by phone:",
        f"  site's signing key: {fingerprint(request.signing_key_sha256)}",
        f"  site's node key:    {fingerprint(request.node_key_sha256)}",
    )


@app.command()
def join(
    folder: SiteFolder,
    join_file: Annotated[Path, typer.Argument(metavar="JOINFILE", help="the file that the operator sent")],
    fingerprint: Annotated[
        str | None, typer.Option(help="of the coordinator's key, as the operator read it out; refused if it differs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the operator's join file against this site's keys and keep it."""
    from invcoss_common.enrolment import read_enrolment_file
    from invcoss_common.keys import fingerprint as grouped
    from invcoss_site.enrol import join

    joined = join(folder, read_enrolment_file(join_file), fingerprint)
    tell(
        as_json,
        {
            "site": joined.site,
            "consortium": joined.consortium,
            "address": joined.address,
            "coordinator_key_sha256": joined.coordinator_key_sha256,
        },
        f"site {joined.site} joined consortium {joined.consortium}; its coordinator is at {joined.address}",
        "compare by phone; if it differs, do not connect:",
        f"  coordinator's key:  {grouped(joined.coordinator_key_sha256)}",
    )


@app.command()
def start(
    folder: SiteFolder,
    join_file: Annotated[
        Path | None, typer.Argument(metavar="[JOINFILE]", help="the file that the operator sent, if not joined yet")
    ] = None,
    part: Annotated[Part, typer.Option(help="agent: only what reads the images; network: only what dials out")] = "all",
    as_json: AsJson = False,
) -> None:
    """Serve the consortium until interrupted; only dials out, and starts again whatever ends."""
    from invcoss_site.service import serve  # here, because it needs seconds to import

    if join_file is not None:
        join(folder, join_file, None, as_json)
    serve(folder, part, service_says(as_json))


@app.command()
def doctor(
    folder: SiteFolder,
    as_json: AsJson = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="longest wait for each answer, in seconds")] = 10.0,
) -> None:
    """Check, step by step, all that a visit needs, from the settings to the coordinator's letting this site in."""
    from invcoss_common.checkup import report  # here, because they need seconds to import
    from invcoss_common.supervise import direct_loopback
    from invcoss_site.doctor import examine

    os.environ.update(direct_loopback())  # as for the programs that `start` starts
    raise typer.Exit(report(partial(examine, folder, timeout), as_json))


@app.command()
def journal(folder: SiteFolder, last: Last = None, as_json: AsJson = False) -> None:
    """Show what left this site, and what it decided; nothing is verified."""
    from invcoss_site.journal import JOURNAL

    show(folder / JOURNAL, last, as_json)


@app.command()
def verify(folder: SiteFolder, key: Keys = None, head: KnownHead = None, as_json: AsJson = False) -> None:
    """Verify this site's journal; --key names the site's earlier keys, if it had others."""
    from invcoss_site.home import load_home
    from invcoss_site.journal import JOURNAL, journal_key

    own = journal_key(load_home(folder))
    tell_verified(folder / JOURNAL, [*([own.public_key()] if own else []), *read_keys(key)], head, as_json)


@app.command()
def evidence(
    folder: SiteFolder,
    stage: Annotated[str, typer.Argument(help="name of the stage, as hops begin: s00 is that of s00-train")],
    run: Annotated[str | None, typer.Option("--run", metavar="NAME", help="if there were several")] = None,
    key: Keys = None,
    head: KnownHead = None,
    as_json: AsJson = False,
) -> None:
    """Write down, verified and for the data protection officer, all that left this site for one of its stages."""
    from invcoss_site.evidence import gather, write  # here, because they need seconds to import
    from invcoss_site.home import load_home

    if not re.fullmatch(r"s\d\d", stage):
        raise DataError(f"STAGE '{stage}': stages are called as hops begin; give s00 for that of s00-train")
    home = load_home(folder)
    found = gather(home, int(stage[1:]), run, read_keys(key), parse_head(head) if head else None)
    page = write(home, found)
    tell(
        as_json,
        {"page": str(page), "json": str(page.with_suffix(".json")), "failed": [check.what for check in found.failed]},
        f"{page}",
        f"{page.with_suffix('.json')}: the same for programs",
    )
    if found.failed:
        raise ChainError(f"NOT VERIFIED: {found.failed[0].what}: {found.failed[0].text}; do not rely on the page")


def main() -> None:
    """Run the command line."""
    run_command(app)
