"""The guard at the worker: which reports and files of tensors are let out, and how little it takes to be refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.federation.loopback import LoopbackCourier
from tests.federation.test_desk import CONFIG
from tests.site_client.visits import (
    SHAPE,
    SPENT,
    TRAIN_IMAGES,
    WEIGHTS,
    asked,
    honest,
    model_of,
    release_of,
    statistics_of,
)

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import write_atomic
from invcoss_common.chain import records
from invcoss_common.config import DpConfig
from invcoss_common.errors import EgressRefused, SiteError, UploadSpent
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.records import Artefact, Request, Status
from invcoss_common.statistics import statistics_schema
from invcoss_common.weights import model_schema, tensors_to_bytes
from invcoss_server.courier import deliver, wait
from invcoss_site.guard_report import check_report, header_of, released
from invcoss_site.home import write_home
from invcoss_site.policy import Egress, SitePolicy
from invcoss_site.rounding import rounded_report, rounded_status

FIRST, LAST = min(WEIGHTS), max(WEIGHTS)
LAYERS = 2 * SHAPE.depth + 1
SECRET = "MEIER-ANNA-1931"


@pytest.fixture
def home(tmp_path):
    return write_home(tmp_path / "north", "north", tmp_path / "images")


@pytest.fixture
def store(tmp_path):
    return ArtefactStore(tmp_path / "coordinator")


@pytest.mark.parametrize("changes", [{}, {"wire_dtype": "bfloat16"}, {"protocol": 1}, {"dp": DpConfig()}])
def test_an_honest_model_passes_and_its_numbers_are_rounded(home, store, changes):
    handoff = asked(store, **changes)
    report = released(honest(handoff, home), handoff, home, SitePolicy())
    assert all(home.artefacts.has(artefact) for artefact in report.artefacts)
    assert report.metrics["train_images"] == TRAIN_IMAGES and report.metrics["train_seconds"] == 98.7654
    assert report.curve == (0.987654, 0.5)
    assert report.dp is None or report.dp.epsilon == 1.23457, "upwards"


@pytest.mark.parametrize("kind", ["evaluate", "audit"])
def test_an_honest_report_without_artefacts_passes(home, store, kind):
    handoff = asked(store, kind)
    report = released(honest(handoff, home), handoff, home, SitePolicy())
    assert report.artefacts == ()
    assert report.release is None or report.release.figures.median_ratio == 0.666667


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_the_header_is_the_one_that_safetensors_writes(size):
    shape = SIZES[size].model
    families = tuple(geometry_for(MODALITIES[name], size) for name in ("xray", "ct", "pathology"))
    for schema in (
        model_schema(shape, families[:1]),
        model_schema(shape, families),
        model_schema(shape, families, "bfloat16"),
        statistics_schema(shape),
    ):
        data = tensors_to_bytes({name: torch.zeros(extent, dtype=dtype) for name, (extent, dtype) in schema.items()})
        header = header_of(schema)
        assert data[: len(header)] == header and not any(data[len(header) :])


# Files


def in_header(edit):
    """The honest file with another header: `edit` turns its JSON text into another."""

    def make():
        data = save(model_of())
        size = int.from_bytes(data[:8], "little")
        text = edit(data[8 : 8 + size].decode()).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return make


def in_entries(edit):
    return in_header(lambda text: json.dumps(edit(json.loads(text)), separators=(",", ":")))


def moved(entries, name, by):
    return entries | {name: entries[name] | {"data_offsets": [at + by for at in entries[name]["data_offsets"]]}}


def all_moved(entries):
    for name in entries:
        entries = moved(entries, name, 8)
    return entries


def spoilt(value):
    tensor = WEIGHTS[LAST].clone()
    tensor.view(-1)[-1] = value
    return lambda: save(model_of(**{LAST: tensor}))


MODELS = {
    "an extra tensor": lambda: save(model_of(extra=torch.zeros(3))),
    "a missing tensor": lambda: save({name: tensor for name, tensor in WEIGHTS.items() if name != FIRST}),
    "another name": lambda: save({f"{name}{SECRET * (name == FIRST)}": tensor for name, tensor in WEIGHTS.items()}),
    "another type": lambda: save(WEIGHTS | {FIRST: WEIGHTS[FIRST].double()}),
    "another type throughout": lambda: save(model_of(torch.bfloat16)),
    "another shape": lambda: save(WEIGHTS | {FIRST: WEIGHTS[FIRST].unsqueeze(0)}),
    "metadata": lambda: save(WEIGHTS, metadata={"patient": SECRET}),
    "empty metadata": in_header(lambda text: '{"__metadata__":{},' + text[1:]),
    "bytes behind the tensors": lambda: save(WEIGHTS) + SECRET.encode(),
    "bytes missing": lambda: save(WEIGHTS)[:-4],
    "tensors that overlap": in_entries(lambda entries: moved(entries, LAST, -4)),
    "a gap before the tensors": in_entries(all_moved),
    "more white space behind the header": in_header(lambda text: text + " " * 8),
    "white space in the header": in_header(lambda text: text.replace('"dtype":', '"dtype": ')),
    "a name twice": in_header(lambda text: '{"' + SECRET + '":0,' + text[1:]),
    "entries in another order": in_entries(lambda entries: dict(reversed(entries.items()))),
    "fields in another order": in_entries(lambda entries: entries | {LAST: dict(reversed(entries[LAST].items()))}),
    "not a number": spoilt(float("nan")),
    "infinity": spoilt(float("inf")),
    "minus infinity": spoilt(float("-inf")),
    "a norm beyond that of trained weights": spoilt(1e7),
    "a norm beyond float32": spoilt(3e38),
    "hardly anything": lambda: b"x",
    "a pickle": lambda: pickle.dumps({"weights": [1.0]}),
    "the site's images": lambda: np.zeros(4_000_000, np.uint8).tobytes(),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_file_that_is_more_or_less_than_the_model_is_refused(home, store, case):
    handoff = asked(store)
    data = MODELS[case]()
    assert data != save(WEIGHTS)
    with pytest.raises(EgressRefused):
        released(honest(handoff, home, model=data), handoff, home, SitePolicy())
    assert list(home.artefacts.folder.iterdir()) == [], "nothing of it is offered"


def test_a_file_that_changed_since_its_digest_was_taken_is_refused(home, store):
    handoff = asked(store)
    report = honest(handoff, home)
    home.artefacts.path(report.model).write_bytes(save(model_of(**{FIRST: WEIGHTS[FIRST] + 1})))
    with pytest.raises(EgressRefused, match="not the file that the report names"):
        released(report, handoff, home, SitePolicy())


def test_a_refusal_does_not_take_away_what_the_site_was_handed(home, store):
    handoff = asked(store)
    report = honest(handoff, home)
    handoff = asked(store, model=report.model, plan_digest="f" * 64)
    with pytest.raises(EgressRefused):
        released(report, handoff, home, SitePolicy())
    assert [path.name for path in home.artefacts.folder.iterdir()] == [handoff.model.sha256]


STATISTICS = {
    "not a number": {"mean": torch.full((LAYERS, SHAPE.width), float("nan"))},
    "a negative variance": {"variance": -torch.ones(LAYERS, SHAPE.width)},
    "an infinite variance": {"variance": torch.full((LAYERS, SHAPE.width), float("inf"))},
    "a negative loss": {"task_loss": torch.tensor(-1.0)},
    "a loss that is no number": {"task_loss": torch.tensor(float("nan"))},
    "over other images than reported": {"images": torch.tensor(11)},
    "features of one image beside": {"features": torch.zeros(3)},
    "for each image": {"mean": torch.zeros(12, LAYERS, SHAPE.width)},
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_are_not_of_all_training_images_are_refused(home, store, case):
    handoff = asked(store)
    with pytest.raises(EgressRefused):
        released(honest(handoff, home, statistics=save(statistics_of(**STATISTICS[case]))), handoff, home, SitePolicy())
    assert list(home.artefacts.folder.iterdir()) == []


# Reports


def metric(**changes):
    return "train", lambda report, handoff: {"metrics": report.metrics | changes}


def field(kind="train", **changes):
    return kind, lambda report, handoff: changes


def audited(**changes):
    return "audit", lambda report, handoff: {"release": report.release.model_copy(update=changes)}


REPORTS = {
    "a metric that is not declared": metric(patients=3.0),
    "a metric too few": ("train", lambda report, handoff: {"metrics": {"train_images": float(TRAIN_IMAGES)}}),
    "a metric that an evaluation has not": (
        "evaluate",
        lambda report, handoff: {"metrics": report.metrics | {"train_seconds": 1.0}},
    ),
    "a metric that is no number": metric(heldout_mim_loss=float("nan")),
    "a metric out of its bounds": metric(data_wait_share=1.5),
    "a count that is not whole": metric(train_cases=12.0625),
    "another site": field(sender="south"),
    "another run": field(run=SECRET.lower()),
    "another hop": field(hop="s01-train"),
    "another plan": field(plan_digest="f" * 64),
    "another protocol": field(protocol=1),
    "a text in place of the version": field(code_version=SECRET),
    "a curve that is no number": field(curve=(float("nan"),)),
    "a curve of too many points": field(curve=(0.5,) * 201),
    "a curve of an evaluation": field("evaluate", curve=(0.5,)),
    "no model": field(model=None),
    "no statistics": field(statistics=None),
    "a privacy ledger that nobody asked for": field(dp=SPENT),
    "a file with an evaluation": field("evaluate", model=Artefact(sha256="a" * 64, size_bytes=9)),
    "a file with an audit": field("audit", statistics=Artefact(sha256="a" * 64, size_bytes=9)),
    "no release": field("audit", release=None),
    "a release of another stage": audited(stage=1),
    "a release of another pool": audited(pool="f" * 64),
    "a release of a larger file": audited(released=Artefact(sha256="a" * 64, size_bytes=1 << 20)),
    "images dropped that are not there": audited(dropped=(8,)),
    "images dropped in an order of their own": audited(dropped=(7, 0)),
    "an image dropped twice": audited(dropped=(3, 3)),
    "a share above one": audited(membership=SPENT),
    "too few cases": metric(train_cases=9.0),
    "too few held-out images": metric(heldout_images=4.0),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_that_is_not_the_answer_is_refused(home, store, case):
    kind, change = REPORTS[case]
    handoff = asked(store, kind)
    report = honest(handoff, home)
    report = report.model_copy(update=change(report, handoff))
    with pytest.raises(EgressRefused):
        released(report, handoff, home, SitePolicy())
    assert not any(map(home.artefacts.has, report.artefacts))


def test_a_release_that_nobody_asked_for_is_refused(home, store):
    handoff = asked(store)
    report = honest(handoff, home).model_copy(update={"release": release_of(asked(store, "audit"))})
    with pytest.raises(EgressRefused, match="of kind 'train'"):
        released(report, handoff, home, SitePolicy())


def test_digits_and_a_curve_beyond_the_policy_are_refused(home, store):
    handoff, policy = asked(store), SitePolicy(egress=Egress(curve=False, digits=3))
    final = released(honest(handoff, home), handoff, home, policy)
    assert final.curve == () and final.metrics["train_seconds"] == 98.8
    for changes in (
        {"curve": (0.5,)},
        {"metrics": final.metrics | {"train_seconds": 98.76}},
        {"metrics": final.metrics | {"train_mim_loss": 0.1234}},
    ):
        with pytest.raises(EgressRefused, match="more digits, or a curve"):
            check_report(final.model_copy(update=changes), handoff, home, policy)


# Rounding


@pytest.mark.parametrize("digits", [2, 6, 9])
def test_rounding_twice_is_rounding_once_and_counts_stay(home, store, digits):
    egress = Egress(digits=digits)
    for handoff in (asked(store, dp=DpConfig()), asked(store, "audit")):
        report = honest(handoff, home)
        once = rounded_report(report, egress)
        assert once == rounded_report(once, egress)
        assert once.metrics["train_images"] == report.metrics["train_images"]
        for name, value in report.metrics.items():
            assert abs(once.metrics[name] - value) <= 0.5 * 10.0 ** (1 - digits) * value
        if report.dp is not None:
            assert report.dp.epsilon <= once.dp.epsilon < report.dp.epsilon * (1 + 10.0 ** (1 - digits))


def test_many_statuses_make_no_curve_where_the_policy_wants_none():
    status = Status(state="running", loss=0.123456789, images_per_s=1 / 3)
    assert rounded_status(status, Egress(digits=3)) == status.model_copy(update={"loss": 0.123, "images_per_s": 0.333})
    assert rounded_status(status, Egress(curve=False)).loss == 0


# The whole way


def test_a_refused_report_fails_the_hop_and_nothing_of_it_can_be_fetched(home, store):
    made = []

    def hostile(handoff, home, on_status):
        made.append(honest(handoff, home, on_status, model=save(WEIGHTS, metadata={"patient": SECRET})))
        return made[0]

    courier, handoff = LoopbackCourier({"north": home}, hostile), asked(store)
    deliver(courier, "north", handoff, store, CONFIG)
    with pytest.raises(SiteError, match="EgressRefused") as caught:
        wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert SECRET not in str(caught.value)
    for artefact in made[0].artefacts:
        assert not home.artefacts.has(artefact)
        fields = {"sha256": artefact.sha256, "size": artefact.size_bytes, "offset": 0, "length": 9, "encoding": ""}
        with pytest.raises(SiteError, match="ProtocolError"):
            courier.call("north", Request("get", fields))
    assert not (home.hop_folder(handoff.hop) / "report.json").exists()
    failed = [record for record in records(home.root / "journal.jsonl") if record["kind"] == "failed"]
    assert [record["error"] for record in failed] == ["EgressRefused"]
    assert SECRET not in (home.root / "journal.jsonl").read_text()


def test_a_model_larger_than_the_upload_budget_is_not_offered(home, store):
    handoff = asked(store)
    with pytest.raises(UploadSpent, match="max_upload_gb"):
        released(honest(handoff, home), handoff, home, SitePolicy(egress=Egress(max_upload_gb=0.003)))
    assert list(home.artefacts.folder.iterdir()) == []


def test_a_training_that_could_not_be_sent_does_not_begin(home, store):
    write_atomic(home.root / "policy.toml", b"[egress]\nmax_upload_gb = 0.001\n")
    begun = []
    courier, handoff = LoopbackCourier({"north": home}, lambda *visit: begun.append(visit)), asked(store)
    deliver(courier, "north", handoff, store, CONFIG)
    with pytest.raises(SiteError, match="UploadSpent"):
        wait(courier, "north", handoff, CONFIG, lambda status: None)
    assert begun == []
