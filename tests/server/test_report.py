"""The report of a made-up run: self-contained, right in its numbers, and there when a run is only part-way."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.server.releases import DATA, audited_of, release_of

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan
from invcoss_common.metrics import METRICS
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import Release, Report
from invcoss_server.report import audit_table, duration, forgetting, forgetting_table, write_report
from invcoss_server.state import Hop, RunState

PLAN = Plan.model_validate(
    {
        "name": "made-up",
        "seed": 11,
        "size": "nano",
        "train": {"steps": 1200},
        "modalities": {"ecg": {"ndim": 1, "normalisation": "range"}},
        "stages": [
            {"site": "north", "modality": "xray"},
            {"site": "south", "modality": "ct", "epochs": 3},
            {"site": "north", "modality": "xray"},
            {"site": "west", "modality": "ecg"},
        ],
    }
)
# Rows: after stage; columns: modality of stage. Binary fractions, so that differences are exact.
MATRIX = [[0.25], [0.375, 0.5], [0.3125, 0.75, 0.125], [0.5, 0.625, 0.25, 0.4375]]
SHAPES = [(30, 1, 16, 16), (4, 1, 8, 12, 12), (3, 3, 16, 16), (5, 1, 64)]
CURVE = (1.0, 0.75, 0.625, 0.5625)
DROPPED = [(), (2,), (0, 1), ()]  # rows, by stage


def hop(stage: int, of_stage: int, loss: float) -> Hop:
    training = stage == of_stage
    site = PLAN.stages[of_stage].site
    metrics = {"heldout_mim_loss": loss, **DATA}
    if training:
        metrics |= {"train_mim_loss": loss, "train_seconds": 61.5, "images_per_s": 345.6, "data_wait_share": 0.25}
        metrics["skipped_steps"] = 0.0
    name = f"s{stage:02d}-train" if training else f"s{stage:02d}-eval-{of_stage}-{site}"
    report = Report(
        run=PLAN.name,
        hop=name,
        sender=site,
        plan_digest=PLAN.digest(),
        code_version="0.1.0",
        metrics=metrics,
        curve=CURVE if training else (),
    )
    return Hop(name, stage, of_stage, site, report, 5 << 20, 3 << 20, deliver_s=0.42, work_s=200.0, fetch_s=1.5)


def audit(state: RunState, stage: int, release: Release) -> None:
    """Note the audit of the pool of a stage as the relay does."""
    kept = audited_of(PLAN, release)
    report = kept.report
    state.record(Hop(report.hop, stage, stage, report.sender, report, 4 << 20, 0, 0.25, work_s=20.0, fetch_s=0.0))
    state.keep_audit(stage, kept)


def smooth_pool(shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(shape[-1]).normal(size=shape)
    for axis in range(2, len(shape)):
        noise = sum(np.roll(noise, shift, axis) for shift in range(5))
    return (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def run_until(stages: int, folder) -> tuple[RunState, ArtefactStore]:
    """A run of which the first `stages` stages are released."""
    state, store = RunState(folder / "state.sqlite", PLAN), ArtefactStore(folder / "artefacts")
    for stage in range(stages):
        for of_stage, loss in enumerate(MATRIX[stage]):
            state.record(hop(stage, of_stage, loss))
        images = smooth_pool(SHAPES[stage])
        pool = store.put(pool_to_bytes(images))
        store.put(pool_to_bytes(np.delete(images, DROPPED[stage], axis=0)))
        state.move(stage, "released", pool=pool, inversion_s=75.0)
        audit(state, stage, release_of(store, pool, DROPPED[stage], stage=stage))
    return state, store


def printed(table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def whole(tmp_path):
    """The state and the output folder of a complete run, its report written."""
    state, store = run_until(len(PLAN.stages), tmp_path)
    write_report(PLAN, state, store, tmp_path / "out")
    return state, tmp_path / "out"


def matrix_of(html: str) -> list[list[str]]:
    """The text of every cell of the forgetting matrix, row by row."""
    table = re.search(r'<table class="matrix">(.*?)</table>', html, re.S).group(1)
    rows = re.findall(r"<tr.*?</tr>", table, re.S)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows
    ]


def test_page_shows_plan_states_and_matrix(whole):
    _, out = whole
    html = (out / "report.html").read_text(encoding="utf-8")
    for text in ("made-up", PLAN.digest(), "nano", "4 of 4", "1,200 steps", "3 epochs", "1,234", "346", "25 %"):
        assert text in html
    for text in ("5.0 MiB", "66.0 MiB", "0.42 s", "3 min 20 s", "1 min 15 s", "released"):
        assert text in html
    assert "Every picture in this report is synthetic" in html
    assert "No real image is in it" in html

    rows = matrix_of(html)
    assert [" ".join(cell.split()) for cell in rows[0][1:5]] == [
        "1 xray north",
        "2 ct south",
        "3 xray north",
        "4 ecg west",
    ]
    for after, losses in enumerate(MATRIX):
        shown = [cell.split()[0] if cell else "" for cell in rows[after + 1][1:5]]
        assert shown == [f"{loss:.3f}" for loss in losses] + [""] * (len(MATRIX) - 1 - after)
    assert rows[2][1].split() == ["0.375", "+50", "%"]
    assert [row[5] for row in rows[1:5]] == ["", "0.375", "0.531", "0.458"]


def test_forgetting_row_is_last_minus_just_learned(whole):
    state, out = whole
    assert forgetting(state.losses()) == {0: 0.25, 1: 0.125, 2: 0.125}
    last_row = matrix_of((out / "report.html").read_text(encoding="utf-8"))[-1]
    assert [cell.split()[0] if cell else "" for cell in last_row[1:]] == ["+0.250", "+0.125", "+0.125", "", "+0.167"]

    text = printed(forgetting_table(PLAN, state))
    assert re.search(r"4 ecg .*0\.500.*0\.625.*0\.250.*0\.438.*0\.458", text)
    assert re.search(r"forgetting.*\+0\.250.*\+0\.125.*\+0\.125.*\+0\.167", text)


def test_page_refers_to_nothing_outside_itself(whole):
    _, out = whole
    html = (out / "report.html").read_text(encoding="utf-8")
    assert all(uri.startswith("data:image/") for uri in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html))
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)


def test_pools_are_embedded(whole):
    _, out = whole
    html = (out / "report.html").read_text(encoding="utf-8")
    # two of images, two of volumes (middle slices, all slices of the first), none of sequences
    assert html.count("data:image/png;base64,") == 2 + 2
    assert "24 of 30 synthetic images" in html
    assert "1 of 1 synthetic images" in html and "3 of 3 synthetic volumes" in html  # without the dropped ones
    assert "all 8 slices of the first synthetic volume" in html
    assert 'class="sharp"' in html


def test_page_and_table_show_what_the_audits_found(whole):
    state, out = whole
    html = (out / "report.html").read_text(encoding="utf-8")
    rows = re.search(r"<h2>Leak audit</h2>.*?<tbody>(.*?)</tbody>", html, re.S).group(1)
    text = " ".join(re.sub(r"<[^>]+>", " ", rows).split())
    assert "3 xray north 3 2 66.7 % [33.3, 66.7] 2 up to 5.0 % 0.53 [0.42, 0.65] 0" in text
    assert html.count("<td>audit ") == 4 and html.count("<td>train ") == 4
    assert re.search(
        r"3 xray +│ +3 │ +2 │ +66.7% \[33.3%, 66.7%\] │ 0.53 \[0.42, 0.65\]", printed(audit_table(PLAN, state))
    )


def test_a_refused_pool_and_one_without_a_release_are_not_shown(tmp_path):
    state, store = run_until(1, tmp_path)
    pool = store.put(pool_to_bytes(smooth_pool(SHAPES[1])))
    state.move(1, "auditing", pool=pool)
    html = write_report(PLAN, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 1 and '<span class="state auditing">' in html
    audit(state, 1, release_of(store, pool, refused=True, stage=1))
    html = write_report(PLAN, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 1 and "the whole pool" in html
    assert re.search(r"2 ct .* refused ", printed(audit_table(PLAN, state)))


def test_a_run_without_audits_says_so_and_shows_the_pools_as_made(tmp_path):
    plan = PLAN.model_copy(update={"relay": PLAN.relay.model_copy(update={"audit": False})})
    state, store = RunState(tmp_path / "state.sqlite", plan), ArtefactStore(tmp_path / "artefacts")
    state.move(0, "released", pool=store.put(pool_to_bytes(smooth_pool(SHAPES[0]))))
    html = write_report(plan, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert "<strong>Not audited.</strong>" in html and "24 of 30 synthetic images" in html
    assert "sites have released" not in html


def test_metric_lines_have_units_and_curves(whole):
    _, out = whole
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 * (10 + len(CURVE)) + 6 * 5 + 4 * (4 + 3)
    audited = {"pool_images": "images", "dropped_images": "images", "membership_auc": "probability"}
    found = [
        (line["stage"], line["metric"], line["value"], line["unit"]) for line in lines if line["metric"] in audited
    ]
    assert found[3:6] == [
        (1, "pool_images", 4, "images"),
        (1, "dropped_images", 1, "images"),
        (1, "membership_auc", 0.53, "probability"),
    ]
    for line in (line for line in lines if line["metric"] not in audited):
        like = METRICS["train_mim_loss" if line["metric"] == "curve" else line["metric"]]
        assert (line["unit"], line["better"]) == (like.unit, like.better)
    evaluation = next(line for line in lines if line["hop"] == "s03-eval-1-south")
    assert (evaluation["stage"], evaluation["of_stage"], evaluation["modality"]) == (3, 1, "ct")
    curve = [line for line in lines if line["metric"] == "curve" and line["hop"] == "s01-train"]
    assert [line["point"] for line in curve] == [0, 1, 2, 3]
    assert tuple(line["value"] for line in curve) == CURVE


def test_tensorboard_reads_the_scalars(whole):
    _, out = whole
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = ("1-xray", "2-ct", "3-xray", "4-ecg")
    tags = {f"{kind}/{name}" for kind in ("train_loss", "heldout_mim_loss") for name in names}
    assert set(events.Tags()["scalars"]) == tags
    assert [(e.step, e.value) for e in events.Scalars("heldout_mim_loss/2-ct")] == [(2, 0.5), (3, 0.75), (4, 0.625)]
    assert tuple(event.value for event in events.Scalars("train_loss/3-xray")) == CURVE


def test_writing_again_changes_nothing_and_leaves_nothing(whole, tmp_path):
    state, out = whole
    before = {name: (out / name).read_bytes() for name in ("report.html", "metrics.jsonl")}
    (out / ".tensorboard.old").mkdir()  # as a kill would leave it
    write_report(PLAN, state, ArtefactStore(tmp_path / "artefacts"), out)
    assert before == {name: (out / name).read_bytes() for name in before}
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "report.html", "tensorboard"]
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_run_without_any_result(tmp_path):
    state, store = run_until(0, tmp_path)
    html = write_report(PLAN, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert "0 of 4" in html
    assert html.count("yet.") == 5
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == b""
    assert "after stage" in printed(forgetting_table(PLAN, state))


def test_run_part_way(tmp_path):
    state, store = run_until(1, tmp_path)
    state.record(hop(1, 1, 0.5))  # learned, but not yet evaluated by the earlier site
    state.move(1, "failed", error="site 'south' <did> not answer")
    html = write_report(PLAN, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert "1 of 4" in html
    assert "site &#39;south&#39; &lt;did&gt; not answer" in html
    assert [cell.split()[0] if cell else "" for cell in matrix_of(html)[2][1:]] == ["", "0.500", ""]
    assert "= last" not in html
    assert "forgetting" not in printed(forgetting_table(PLAN, state))

    state.record(hop(1, 0, 0.375))
    html = write_report(PLAN, state, store, tmp_path / "out").read_text(encoding="utf-8")
    assert [cell.split()[0] if cell else "" for cell in matrix_of(html)[-1][1:]] == ["+0.125", "", "+0.125"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.42, "0.42 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
