"""docs/egress.md names every field that may leave a site, and none that is not there."""

import re
from pathlib import Path

import pytest

from invcoss_common.errors import OTHER_CODES
from invcoss_common.metrics import METRICS, REPORTED
from invcoss_common.records import AuditFigures, DpSpent, Interval, Release, Report, Status
from invcoss_common.wire import ERROR, VERBS

TEXT = (Path(__file__).parents[2] / "docs" / "egress.md").read_text("utf-8")
SECTIONS = dict(section.split("\n", 1) for section in TEXT.split("\n## ")[1:])
RECORDS = {kind.__name__: kind for kind in (Status, Report, Release, AuditFigures, Interval, DpSpent)}


def rows(section):
    """The first cells of a section's table that name a field."""
    return re.findall(r"^\| `([a-z_]+)` \|", SECTIONS[section], re.MULTILINE)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_has_one_line(name):
    assert rows(name) == list(RECORDS[name].model_fields)


def test_every_field_of_an_answer_has_one_line_with_its_verbs():
    answers = {"error": {"any"}}
    for table in VERBS.values():
        for verb, form in table.items():
            for field in form.answers:
                answers.setdefault(field, set()).add(verb)
    assert set(ERROR) == {"error"}
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", SECTIONS["Answers"], re.MULTILINE))
    assert len(rows("Answers")) == len(listed)
    assert {field: set(re.findall(r"[a-z]+", verbs)) - {"alone"} for field, verbs in listed.items()} == answers


def test_every_metric_has_its_kinds_of_task_bounds_and_meaning():
    assert rows("Metrics") == list(METRICS)
    for name, metric in METRICS.items():
        kinds = [kind for kind, names in REPORTED.items() if name in names]
        of = "all" if len(kinds) == len(REPORTED) else ", ".join(kinds)
        bound = f"{metric.low:g} to {metric.high:g} {metric.unit}"
        assert f"| `{name}` | {of} | {bound} | {metric.meaning} |" in SECTIONS["Metrics"]


def test_every_class_of_error_that_is_not_ours_is_named():
    named = set(re.findall("`([A-Za-z]+)`", SECTIONS["Error classes"]))
    assert named == OTHER_CODES
