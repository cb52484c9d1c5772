"""The model card: what a run's state and ledger say of its model, in Markdown.

It shows what sites have reported for all to see (counts, losses, audits, privacy spent), and nothing of a case.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import jinja2

from invcoss_common import __version__
from invcoss_common.chain import Verified, records, verify
from invcoss_common.config import Plan
from invcoss_common.errors import ChainError
from invcoss_server.export.source import Source
from invcoss_server.ledger import LEDGER, coordinator_key
from invcoss_server.report import columns, forgetting, label, releases
from invcoss_server.state import RunState


def write_card(source: Source, path: Path, formats: Sequence[str], site_names: bool, alone: bool = False) -> None:
    """Write the card to `path`, with how to load `formats`; `alone` in a folder of its one format.

    Without `site_names` sites are numbered. Raises ChainError when the run's ledger does not hold, or not name the
    model.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("invcoss_server", "export"),
        autoescape=False,  # noqa: S701 - Markdown; names are of letters, digits and hyphens
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    plan, stages = source.plan, source.stages
    numbered = {site: f"site {number}" for number, site in enumerate(plan.sites, start=1)}
    encoder = files("invcoss_server.export").joinpath("encoder.py").read_text(encoding="utf-8")
    text = environment.get_template("card.md.j2").render(
        source=source,
        plan=plan,
        stages=stages,
        formats=formats,
        alone=alone,
        encoder=encoder[encoder.index("import ") :].strip(),
        label={number: label(plan, number) for number in range(len(plan.stages))},
        site={number: stage.site if site_names else numbered[stage.site] for number, stage in enumerate(plan.stages)},
        length={number: _length(plan, number) for number in range(len(plan.stages))},
        parameters=_encoder_parameters(source),
        version=__version__,
        record=_record(source, source.state) if source.state else None,
    )
    path.write_text(text, encoding="utf-8")


def _record(source: Source, state: RunState) -> dict[str, object]:
    """What is on record of the run, up to the stage that the model is of."""
    last = source.stages[-1]
    hops = [hop for hop in state.hops() if hop.stage <= last]
    losses = {where: loss for where, loss in state.losses().items() if where[0] <= last}
    lost = forgetting(losses)
    trained = {hop.stage: hop.report for hop in hops if hop.stage == hop.of_stage and not hop.report.release}
    return {
        "ledger": _verified_ledger(source),
        "trained": trained,
        "skipped": [number for number in range(last + 1) if number not in source.stages],
        "losses": losses,
        "columns": columns(losses),
        "lost": lost,
        "mean_lost": fmean(lost.values()) if lost else None,
        "audits": {stage: release for stage, release in releases(source.plan, state).items() if stage <= last},
        "dp": {stage: report.dp for stage, report in trained.items() if report.dp},
    }


def _verified_ledger(source: Source) -> Verified:
    assert source.folder
    path, key = source.folder / LEDGER, coordinator_key(source.folder)
    try:
        verified = verify(path, [key.public_key()] if key else [])
        if not any(source.sha256 == record.get("model") for record in records(path)):
            raise ChainError(f"does not name the model {source.sha256}, which the run's state does")
    except ChainError as error:
        raise ChainError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return verified


def _encoder_parameters(source: Source) -> int:
    """Values that were learned: trunk, class token and the tokenisers that are exported."""
    families = source.families
    return sum(
        tensor.numel()
        for name, tensor in source.model.state_dict().items()
        if name.startswith(("cls_token", "blocks.", "norm."))
        or (name.startswith("tokenisers.") and name.split(".")[1] in families)
    )


def _length(plan: Plan, stage: int) -> str:
    """Training length of a stage in words."""
    train = plan.train_for(stage)
    return f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"
