"""What a run has shown so far: report.html and a terminal table for people, metrics.jsonl and TensorBoard for tools.

Stages count from 1 wherever people read them, from 0 in the code and in metrics.jsonl. All losses are normalised
squared errors: 1 is what predicting the mean of each patch scores, lower is better.
"""

from __future__ import annotations

import base64
import io
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from invcoss_common import __version__
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import canonical_json, write_atomic
from invcoss_common.config import Plan
from invcoss_common.metrics import METRICS
from invcoss_common.pages import templates
from invcoss_common.pools import first_images
from invcoss_common.records import Artefact, Release
from invcoss_server.pool import contact_sheet, slices_sheet
from invcoss_server.state import Hop, RunState

HTML, METRIC_LINES, TENSORBOARD = "report.html", "metrics.jsonl", "tensorboard"

Losses = dict[tuple[int, int], float]  # held-out loss by (after stage, modality of stage)

SHEET_IMAGES, SHEET_COLUMNS = 24, 8
TILE_PX = 96  # small images are enlarged to about this width, by a whole factor
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0529a", "#3d9bd1", "#c98a00", "#6a3d9a", "#666666")  # of stages, in turn


class Picture(NamedTuple):
    """A PNG on the page, `width` x `height` in CSS pixels; `sharp` keeps the pixels of an enlarged one visible."""

    caption: str
    uri: str
    width: int
    height: int
    sharp: bool


def write_report(plan: Plan, state: RunState, store: ArtefactStore, out: Path) -> Path:
    """Write report.html, metrics.jsonl and tensorboard/ to `out`, in place of older ones; return the path of the page.

    To be called whenever something has changed: it shows what `state` holds by then, however little that is.
    """
    hops, losses = state.hops(), state.losses()
    out.mkdir(parents=True, exist_ok=True)
    _write_tensorboard(plan, hops, losses, out)
    write_atomic(out / METRIC_LINES, _metric_lines(plan, hops), mode=0o644)
    write_atomic(out / HTML, _page(plan, state, store, hops, losses).encode(), mode=0o644)
    return out / HTML


def forgetting_table(plan: Plan, state: RunState) -> Table:
    """The forgetting matrix for a terminal; the last column is the mean over the modalities learned earlier."""
    losses = state.losses()
    learned, means, lost = columns(losses), means_of_earlier(losses), forgetting(losses)
    table = Table(title="Held-out loss (1 = predicting the mean, lower is better)", title_justify="left")
    table.add_column("after stage")
    for stage in learned:
        table.add_column(f"{label(plan, stage)}\n{plan.stages[stage].site}", justify="right")
    table.add_column("mean of\nearlier", justify="right")
    for after in sorted({after for after, _ in losses}):
        cells = [losses.get((after, stage)) for stage in learned] + [means.get(after)]
        table.add_row(label(plan, after), *("" if cell is None else f"{cell:.3f}" for cell in cells))
    if lost:
        table.add_section()
        cells = [lost.get(stage) for stage in learned] + [fmean(lost.values())]
        table.add_row("forgetting\n= last - just learned", *("" if cell is None else f"{cell:+.3f}" for cell in cells))
    return table


def audit_table(plan: Plan, state: RunState) -> Table:
    """What the leak audits of the pools found, for a terminal."""
    table = Table(title="Leak audit of the pools, at the sites they were learned from", title_justify="left")
    for name in ("stage", "pool images", "dropped", "too near", "membership AUC"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, release in releases(plan, state).items():
        figures, near, auc = release.figures, release.figures.beyond, release.membership
        table.add_row(
            label(plan, stage),
            str(figures.pool_images),
            str(len(release.dropped)) if release.released else "refused",
            f"{near.value:.1%} [{near.low:.1%}, {near.high:.1%}]",
            f"{auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}]",
        )
    return table


def releases(plan: Plan, state: RunState) -> dict[int, Release]:
    """By stage: what its site said of the pool that the stage has now; none where it was not asked, or not yet."""
    audits = {number: state.audited(state.stage(number)) for number in range(len(plan.stages))}
    found = {number: audited.report.release for number, audited in audits.items() if audited}
    return {number: release for number, release in found.items() if release}


def forgetting(losses: Losses) -> dict[int, float]:
    """By stage: its held-out loss when last evaluated minus that when just learned.

    Stages that no later stage has evaluated yet are left out, so that they do not dilute a mean.
    """
    last = {of_stage: after for after, of_stage in sorted(losses)}
    return {s: losses[last[s], s] - losses[s, s] for s in columns(losses) if last[s] > s}


def columns(losses: Losses) -> list[int]:
    """The stages that have been learned, in order: the columns of the forgetting matrix."""
    return sorted(after for after, of_stage in losses if after == of_stage)


def means_of_earlier(losses: Losses) -> dict[int, float]:
    """By stage: the mean held-out loss, after it, over the modalities learned before it; none for the first stage."""
    rows: dict[int, list[float]] = {}
    for (after, of_stage), loss in losses.items():
        if of_stage < after:
            rows.setdefault(after, []).append(loss)
    return {after: fmean(row) for after, row in rows.items()}


def label(plan: Plan, stage: int) -> str:
    """Number (from 1) and modality of a stage (from 0): what a reader knows it by."""
    return f"{stage + 1} {plan.stages[stage].modality}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 0.42 s, 17 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"
    for name, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if (whole := round(seconds)) >= size:
            return f"{whole // size} {name} {whole % size // part_size} {part}"
    return f"{seconds:.0f} s"


def _page(plan: Plan, state: RunState, store: ArtefactStore, hops: Sequence[Hop], losses: Losses) -> str:
    stages, audits = [state.stage(number) for number in range(len(plan.stages))], releases(plan, state)
    pools = {number: release.released for number, release in audits.items()}
    if not plan.relay.audit:
        pools = {stage.number: stage.pool for stage in stages}
    environment = templates("invcoss_server")
    environment.filters["duration"] = duration
    return environment.get_template(f"{HTML}.j2").render(
        plan=plan,
        version=__version__,
        label=[label(plan, stage.number) for stage in stages],
        stages=stages,
        audits=audits,
        refused=[state.refused_pools(stage.number) for stage in stages],
        trained={hop.stage: hop.report.metrics for hop in hops if _kind(hop) == "train"},
        spent={hop.stage: hop.report.dp for hop in hops if hop.report.dp},
        kinds=[_kind(hop) for hop in hops],
        hops=hops,
        losses=losses,
        columns=columns(losses),
        means=means_of_earlier(losses),
        lost=forgetting(losses),
        curves=_uri("image/svg+xml", _curves(plan, hops, losses)) if losses else "",
        pictures=[_pictures(pools.get(stage.number), store) for stage in stages],
    )


def _kind(hop: Hop) -> str:
    if hop.stage != hop.of_stage:
        return "evaluate"
    return "audit" if hop.report.release else "train"


def _pictures(pool: Artefact | None, store: ArtefactStore) -> list[Picture]:
    """The pool of a stage, as it may travel, to look at; nothing if there is none yet, or one of sequences."""
    if pool is None:
        return []
    images, count = first_images(store.path(pool), SHEET_IMAGES)
    if images.ndim < 4:
        return []
    volumes, scale = images.ndim == 5, max(1, round(TILE_PX / images.shape[-1]))

    def picture(caption: str, png: bytes) -> Picture:
        width, height = struct.unpack(">II", png[16:24])  # where a PNG header has them
        return Picture(caption, _uri("image/png", png), width * scale, height * scale, scale > 1)

    kind = "volumes, the middle slice of each" if volumes else "images"
    sheet = contact_sheet(images, SHEET_IMAGES, SHEET_COLUMNS)
    pictures = [picture(f"{len(images)} of {count} synthetic {kind}", sheet)]
    if volumes:
        sheet = slices_sheet(images[0], SHEET_COLUMNS)
        pictures.append(picture(f"all {images.shape[2]} slices of the first synthetic volume", sheet))
    return pictures


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _curves(plan: Plan, hops: Sequence[Hop], losses: Losses) -> bytes:
    """The run from left to right as SVG: one unit a stage, with its training curve; discs are held-out losses."""
    count, picture = len(plan.stages), io.BytesIO()
    with rc_context({"svg.hashsalt": "invcoss", "font.size": 9, "axes.edgecolor": "#999999"}):
        figure = Figure(figsize=(10.8, 3.9), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1.0, color="#999999", linewidth=0.9, linestyle="--")
        for hop in hops:
            curve = np.asarray(hop.report.curve)
            axes.plot(hop.stage + (np.arange(len(curve)) + 0.5) / len(curve), curve, color=_colour(hop.stage), lw=1.3)
        for stage in columns(losses):
            rows = [after for after, of_stage in sorted(losses) if of_stage == stage]
            axes.plot([row + 1 for row in rows], [losses[row, stage] for row in rows], ":", color=_colour(stage))
            for row in rows:
                at = row + 1, losses[row, stage]
                axes.plot(*at, "o", color=_colour(stage), markersize=11, markeredgecolor="white")
                axes.text(*at, str(stage + 1), color="white", size=7, weight="bold", ha="center", va="center_baseline")
        points = [point for hop in hops for point in hop.report.curve] or [1.0]
        high = max(1.0, *losses.values(), float(np.percentile(points, 99)))  # a rare spike may leave the picture
        low = min(1.0, *losses.values(), *points)
        axes.set_ylim(max(0.0, low - 0.1 * (high - low)), high + 0.1 * (high - low))
        axes.set_ylabel("loss")
        axes.vlines(range(1, count + 1), 0, 1, transform=axes.get_xaxis_transform(), color="#dddddd", lw=0.8, zorder=0)
        axes.set_xlim(0, count + 0.12)
        axes.set_xticks([stage + 0.5 for stage in range(count)])
        names = [label(plan, stage)[:14] if count <= 8 else str(stage + 1) for stage in range(count)]
        axes.set_xticklabels(names, weight="bold")
        for stage, text in enumerate(axes.get_xticklabels()):
            text.set_color(_colour(stage))
        axes.tick_params(length=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _colour(stage: int) -> str:
    return COLOURS[stage % len(COLOURS)]


def _metric_lines(plan: Plan, hops: Sequence[Hop]) -> bytes:
    """One JSON object a line for every metric and every point of a loss curve of every hop, and what audits found."""
    lines = []
    for hop in hops:
        modality = plan.stages[hop.of_stage].modality
        where = {"hop": hop.hop, "stage": hop.stage, "site": hop.site, "modality": modality, "of_stage": hop.of_stage}
        for name, value in hop.report.metrics.items():
            unit = {"unit": METRICS[name].unit, "better": METRICS[name].better}
            lines.append({**where, "metric": name, "value": value, **unit})
        if release := hop.report.release:
            found = {
                "pool_images": ("images", "neither", release.figures.pool_images),
                "dropped_images": ("images", "lower", len(release.dropped)),
                "membership_auc": ("probability", "lower", release.membership.value),
            }
            lines += [
                {**where, "metric": name, "value": value, "unit": unit, "better": better}
                for name, (unit, better, value) in found.items()
            ]
        loss = {"metric": "curve", "unit": METRICS["train_mim_loss"].unit, "better": METRICS["train_mim_loss"].better}
        lines += [{**where, **loss, "point": point, "value": value} for point, value in enumerate(hop.report.curve)]
    return b"".join(canonical_json(line) + b"\n" for line in lines)


def _write_tensorboard(plan: Plan, hops: Sequence[Hop], losses: Losses, out: Path) -> None:
    """Scalars by point of the curve (train_loss) and by stage from 1 (heldout_mim_loss), in place of older ones."""
    fresh, old, folder = out / f".{TENSORBOARD}.new", out / f".{TENSORBOARD}.old", out / TENSORBOARD
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with SummaryWriter(str(fresh)) as writer:
        for hop in hops:
            for point, value in enumerate(hop.report.curve):
                writer.add_scalar(f"train_loss/{hop.stage + 1}-{plan.stages[hop.stage].modality}", value, point)
        for (after, stage), value in sorted(losses.items()):
            writer.add_scalar(f"heldout_mim_loss/{stage + 1}-{plan.stages[stage].modality}", value, after + 1)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
