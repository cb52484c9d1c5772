"""What a run has shown so far, written for people (report.html, a terminal table) and for tools (metrics.jsonl, TensorBoard).

Stages count from 1 wherever people read them; `stage` and `of_stage` in records and in metrics.jsonl count from 0.
All losses are normalised squared errors: 1 is what predicting the mean of each patch scores, lower is better.
"""

from __future__ import annotations

import base64
import io
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import jinja2
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
from invcoss_server.pool import GAP, contact_sheet, pool_from_bytes, slices_sheet
from invcoss_server.state import Hop, RunState, Stage

HTML, METRICS_FILE, TENSORBOARD = "report.html", "metrics.jsonl", "tensorboard"

Losses = dict[tuple[int, int], float]  # held-out loss by (after stage, modality of stage)

CONTENT_PX = 1080  # width of the page's column
TILE_PX = 96  # small pictures are enlarged to about this width, by a whole factor
SHEET_IMAGES = 24
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0529a", "#3d9bd1", "#c98a00", "#6a3d9a", "#666666")  # of stages, in turn


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: a loss, or a difference of losses, and its change relative to the just-learned loss."""

    value: float
    change: float | None = None

    @property
    def background(self) -> str:
        """CSS colour: warm where the loss has grown, cool where it has shrunk, full strength at a doubling."""
        strength = 0.75 * min(abs(self.change or 0.0), 1.0) ** 0.5  # the root lets a few per cent show
        return f"rgba({'222, 92, 34' if (self.change or 0.0) > 0 else '42, 128, 185'}, {strength:.3f})"


@dataclass(frozen=True)
class Picture:
    """A PNG for the page, shown at `width` x `height` CSS pixels; `sharp` keeps the pixels of an enlarged one visible."""

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
    write_atomic(out / METRICS_FILE, _metric_lines(plan, hops))
    write_atomic(out / HTML, _page(plan, state, store, hops, losses).encode())
    return out / HTML


def forgetting_table(plan: Plan, state: RunState) -> Table:
    """The forgetting matrix for a terminal; the last column is the mean over the modalities learned earlier."""
    losses = state.losses()
    table = Table(title="Held-out loss (1 = predicting the mean, lower is better)", title_justify="left")
    table.add_column("after stage")
    for stage in _columns(losses):
        table.add_column(f"{label(plan, stage)}\n{plan.stages[stage].site}", justify="right")
    table.add_column("mean of\nearlier", justify="right")
    for after in sorted({after for after, _ in losses}):
        cells = [_loss(losses.get((after, stage))) for stage in _columns(losses)]
        table.add_row(label(plan, after), *cells, _loss(_mean_of_earlier(losses, after)))
    if lost := forgetting(losses):
        table.add_section()
        cells = [_signed(lost.get(stage)) for stage in _columns(losses)]
        table.add_row("forgetting\n= last - just learned", *cells, _signed(fmean(lost.values())))
    return table


def forgetting(losses: Losses) -> dict[int, float]:
    """By stage: its held-out loss when last evaluated minus that when just learned.

    Stages that no later stage has evaluated yet are left out, so that they do not dilute a mean.
    """
    last = {of_stage: after for after, of_stage in sorted(losses)}
    return {
        stage: losses[last[stage], stage] - losses[stage, stage] for stage in _columns(losses) if last[stage] > stage
    }


def label(plan: Plan, stage: int) -> str:
    """Number (from 1) and modality of a stage (from 0): what a reader knows it by."""
    return f"{stage + 1} {plan.stages[stage].modality}"


def _columns(losses: Losses) -> list[int]:
    """The stages that have been learned, and so have a column in the matrix."""
    return sorted(after for after, of_stage in losses if after == of_stage)


def _mean_of_earlier(losses: Losses, after: int) -> float | None:
    earlier = [loss for (row, of_stage), loss in losses.items() if row == after and of_stage < after]
    return fmean(earlier) if earlier else None


def _page(plan: Plan, state: RunState, store: ArtefactStore, hops: Sequence[Hop], losses: Losses) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("invcoss_server", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"loss": _loss, "signed": _signed, "share": _share, "change": _change, "count": _count}
    environment.filters |= {"bytes": _bytes, "seconds": _seconds}
    stages = [state.stage(number) for number in range(len(plan.stages))]
    lost, curves = forgetting(losses), _curves(plan, hops, losses)
    return environment.get_template(f"{HTML}.j2").render(
        plan=plan,
        version=__version__,
        stages=stages,
        trained={hop.stage: hop for hop in hops if hop.stage == hop.of_stage},
        lengths=[_length(plan, stage.number) for stage in stages],
        columns=_columns(losses),
        rows={after: _row(losses, after) for after in sorted({after for after, _ in losses})},
        means={after: _mean_of_earlier(losses, after) for after, _ in losses},
        lost={stage: Cell(value, _relative(value, losses[stage, stage])) for stage, value in lost.items()},
        mean_lost=fmean(lost.values()) if lost else None,
        legend=[Cell(0.0, change) for change in (-0.2, 0.0, 0.05, 0.2, 0.5, 1.0)],
        curves=_uri("image/svg+xml", curves) if curves else "",
        pictures=[_pictures(stage, store) for stage in stages],
        hops=hops,
        label=lambda stage: label(plan, stage),
    )


def _row(losses: Losses, after: int) -> dict[int, Cell]:
    """The cells after one stage, by modality of stage; on the diagonal there is no change."""
    return {
        stage: Cell(loss, _relative(loss - losses[stage, stage], losses[stage, stage]) if stage < after else None)
        for stage in _columns(losses)
        if (loss := losses.get((after, stage))) is not None
    }


def _relative(difference: float, own: float) -> float:
    return difference / own if own > 0 else 0.0


def _pictures(stage: Stage, store: ArtefactStore) -> list[Picture]:
    """The stage's pool to look at; nothing if it has none yet, or one of sequences."""
    if stage.pool is None:
        return []
    images = pool_from_bytes(store.path(stage.pool).read_bytes())
    if images.ndim < 4:
        return []
    scale = max(1, round(TILE_PX / images.shape[-1]))
    shown = min(SHEET_IMAGES, len(images))
    volumes = images.ndim == 5
    caption = f"{shown} of {len(images)} synthetic {'volumes, the middle slice of each' if volumes else 'images'}"
    columns = _fitting((12, 8, 6), images.shape[-1], scale)
    pictures = [_picture(caption, contact_sheet(images, SHEET_IMAGES, columns), scale)]
    if volumes:
        caption = f"all {images.shape[2]} slices of the first volume"
        columns = _fitting((16, 8, 4), images.shape[-1], scale)
        pictures.append(_picture(caption, slices_sheet(images[0], columns), scale))
    return pictures


def _fitting(choices: Sequence[int], tile_px: int, scale: int) -> int:
    """The first number of tiles a row that fits the page, or else the last."""
    return next((columns for columns in choices if columns * (tile_px + GAP) * scale <= CONTENT_PX), choices[-1])


def _picture(caption: str, png: bytes, scale: int) -> Picture:
    width, height = struct.unpack(">II", png[16:24])  # where the PNG header has them
    return Picture(caption, _uri("image/png", png), width * scale, height * scale, scale > 1)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _curves(plan: Plan, hops: Sequence[Hop], losses: Losses) -> bytes | None:
    """The run from left to right as SVG: a stage is one unit wide, with its training curve; discs are held-out losses."""
    if not losses:
        return None
    style = {"svg.hashsalt": "invcoss", "font.size": 9, "axes.edgecolor": "#999999", "axes.linewidth": 0.8}
    with rc_context(style):
        figure = Figure(figsize=(10.8, 3.9), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1.0, color="#999999", linewidth=0.9, linestyle=(0, (5, 3)))
        for hop in hops:
            points = len(hop.report.curve)
            axes.plot(
                hop.stage + (np.arange(points) + 0.5) / max(points, 1), hop.report.curve, color=_colour(hop.stage)
            )
        for stage in _columns(losses):
            after = [row for row, of_stage in sorted(losses) if of_stage == stage]
            x, y = [row + 1 for row in after], [losses[row, stage] for row in after]
            axes.plot(x, y, ":", marker="o", markersize=10, markeredgecolor="white", color=_colour(stage), zorder=3)
            for disc in zip(x, y, strict=True):
                axes.text(
                    *disc, str(stage + 1), color="white", size=7, weight="bold", ha="center", va="center_baseline"
                )
        curves = [value for hop in hops for value in hop.report.curve]
        high = max(1.0, *losses.values(), *np.percentile(curves or [1.0], [99]))  # a rare spike may leave the picture
        low = min([1.0, *losses.values(), *curves])
        axes.set_ylim(max(0.0, low - 0.1 * (high - low)), high + 0.08 * (high - low))
        axes.set_xlim(0, len(plan.stages) + 0.15)
        axes.set_ylabel("masked-reconstruction loss")
        for boundary in range(1, len(plan.stages) + 1):
            axes.axvline(boundary, color="#dddddd", linewidth=0.8, zorder=0)
        names = [
            label(plan, stage)[:14] if len(plan.stages) <= 8 else str(stage + 1) for stage in range(len(plan.stages))
        ]
        axes.set_xticks(np.arange(len(names)) + 0.5, names)
        for stage, text in enumerate(axes.get_xticklabels()):
            text.set(color=_colour(stage), weight="bold")
        axes.tick_params(length=0)
        axes.spines[["top", "right"]].set_visible(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _colour(stage: int) -> str:
    return COLOURS[stage % len(COLOURS)]


def _metric_lines(plan: Plan, hops: Sequence[Hop]) -> bytes:
    """One JSON object a line for every metric and every point of a loss curve of every hop."""
    lines = []
    for hop in hops:
        modality = plan.stages[hop.of_stage].modality
        where = {"hop": hop.hop, "stage": hop.stage, "site": hop.site, "modality": modality, "of_stage": hop.of_stage}
        for name, value in hop.report.metrics.items():
            metric = METRICS[name]
            lines.append({**where, "metric": name, "value": value, "unit": metric.unit, "better": metric.better})
        loss = METRICS["train_mim_loss"]
        for point, value in enumerate(hop.report.curve):
            curve = {"metric": "curve", "point": point, "value": value, "unit": loss.unit, "better": loss.better}
            lines.append({**where, **curve})
    return b"".join(canonical_json(line) + b"\n" for line in lines)


def _write_tensorboard(plan: Plan, hops: Sequence[Hop], losses: Losses, out: Path) -> None:
    """Scalars by point of the curve (train_loss) and by stage from 1 (heldout_mim_loss), in a fresh folder each time."""
    fresh, old, folder = out / f".{TENSORBOARD}.new", out / f".{TENSORBOARD}.old", out / TENSORBOARD
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with SummaryWriter(str(fresh)) as writer:
        for hop in hops:
            for point, value in enumerate(hop.report.curve):
                writer.add_scalar(f"train_loss/{label(plan, hop.stage).replace(' ', '-')}", value, point)
        for (after, stage), value in sorted(losses.items()):
            writer.add_scalar(f"heldout_mim_loss/{label(plan, stage).replace(' ', '-')}", value, after + 1)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _length(plan: Plan, stage: int) -> str:
    train = plan.train_for(stage)
    return f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _change(value: float) -> str:
    return f"{value:+.0%}" if abs(value) < 100 else f"×{value + 1:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def _seconds(value: float) -> str:
    if value < 9.95:
        return f"{value:.1f} s" if value >= 0.95 else f"{value:.2f} s"
    for large, small, factor in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if round(value) >= factor:
            whole = round(value) // factor
            rest = round(value) % factor * 60 // factor if factor < 86400 else round(value) % factor // 3600
            return f"{whole} {large} {rest} {small}"
    return f"{round(value)} s"
