"""The table of results as the paper has it: a row a task, averages of what should be high and of what should be low.

Of several seeds a row has the mean, with an interval by bootstrap over the test patients, the same for all seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from invcoss_common.canonical import write_atomic
from invcoss_site.downstream.finetune import Result
from invcoss_site.downstream.metrics import Array, Score, Scorer, with_interval
from invcoss_site.downstream.task import Task

COLUMNS = {  # head, and what a value is multiplied by
    "acc": ("ACC %", 100),
    "auc": ("AUC %", 100),
    "f1": ("F1 %", 100),
    "dice": ("DSC %", 100),
    "hd95_voxels": ("HD95 voxels", 1),
    "hd95_mm": ("HD95 mm", 1),
}
UP, DOWN = ("acc", "auc", "f1", "dice"), ("hd95_voxels",)
NO_DATA = "no data"

Row = dict[str, Score]
Rows = Mapping[str, Row | None]  # by task; None: there are no data


def mean_over_seeds(scorers: Sequence[Scorer]) -> Scorer:
    """The mean of the scores that several models have on the same cases."""

    def score(weights: Array) -> dict[str, float]:
        found = [scorer(weights) for scorer in scorers]
        return {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}

    return score


def row(results: Sequence[Result]) -> Row:
    """The scores of one task, from the results of its seeds."""
    return with_interval(mean_over_seeds([result.scorer for result in results]), results[0].patients)


def average(rows: Rows, columns: Sequence[str]) -> float | None:
    """The plain mean of all values of these columns, in the table's units, or None if there is none."""
    values = [
        found[name].value * COLUMNS[name][1] for found in rows.values() if found for name in columns if name in found
    ]
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else None


def written(score: Score | None, factor: int) -> str:
    """Such as `71.4 (65.0 to 77.3)`."""
    if score is None or not np.isfinite(score.value):
        return "–"
    return f"{score.value * factor:.1f} ({score.lo * factor:.1f} to {score.hi * factor:.1f})"


def cells(tasks: Sequence[Task], rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table; columns without any value are left out."""
    used = [name for name in COLUMNS if any(found and name in found for found in rows.values())]
    lines = []
    for task in tasks:
        found, title = rows.get(task.name), task.title or task.name
        if found is None:
            lines.append([title, NO_DATA, *[""] * (len(used) - 1)])
        else:
            lines.append([title, *(written(found.get(name), COLUMNS[name][1]) for name in used)])
    return ["Task", *(COLUMNS[name][0] for name in used)], lines


def averages_text(tasks: Sequence[Task], rows: Rows) -> list[str]:
    """AVG up and AVG down, and of how many tasks they are."""
    have = [task for task in tasks if rows.get(task.name)]
    of = f"of {len(have)} of {len(tasks)} tasks"
    more = "" if len(have) == len(tasks) else "; not to be compared with an average of all"
    words = []
    for name, unit, columns in (("AVG up", "%", UP), ("AVG down", "voxels", DOWN)):
        value = average(rows, columns)
        words.append(f"{name}: {'–' if value is None else f'{value:.2f} {unit}'} ({of}{more})")
    return words


def terminal_table(tasks: Sequence[Task], rows: Rows) -> Table:
    head, lines = cells(tasks, rows)
    table = Table(caption="\n".join(averages_text(tasks, rows)) if len(tasks) > 1 else None, caption_justify="left")
    for name in head:
        table.add_column(name, justify="left" if name == "Task" else "right", no_wrap=name == "Task")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(tasks: Sequence[Task], rows: Rows, note: str) -> str:
    """A page with the table, the averages and `note`, which says what was run."""
    head, lines = cells(tasks, rows)
    grid = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in grid)
    averages = "".join(f"\n{text}  " for text in averages_text(tasks, rows)) + "\n" if len(tasks) > 1 else ""
    return f"# Downstream tasks\n\n{note}\n\n{table}\n{averages}"


def as_values(tasks: Sequence[Task], rows: Rows, results: Mapping[str, Sequence[Result]]) -> dict[str, object]:
    """The table for programs, values as the metrics have them (shares, not %), with each seed's own."""
    return {
        "tasks": {
            task.name: {
                "scores": {name: [_plain(v) for v in (s.value, s.lo, s.hi)] for name, s in found.items()},
                "seeds": {str(one.seed): {k: v[0] for k, v in one.scores.items()} for one in results[task.name]},
            }
            if (found := rows.get(task.name))
            else None
            for task in tasks
        },
        "avg_up_percent": average(rows, UP),
        "avg_down_voxels": average(rows, DOWN),
        "tasks_with_data": sum(rows.get(task.name) is not None for task in tasks),
    }


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def write_table(folder: Path, values: Mapping[str, object], page: str) -> None:
    """`table.json` and `table.md`; they name no patient and no file."""
    write_atomic(folder / "table.json", (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "table.md", page.encode())
