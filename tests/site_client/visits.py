"""What an honest visit brings back, made up: hand-offs of every kind, and reports with files that a site may send."""

from __future__ import annotations

import torch
from tests.federation.test_desk import hand_off

from invcoss_common import __version__
from invcoss_common.metrics import METRICS, REPORTED
from invcoss_common.modality import MODALITIES, SIZES, geometry_for
from invcoss_common.model import build_model
from invcoss_common.records import Artefact, AuditFigures, DpSpent, Interval, Pool, Release, Report, Status
from invcoss_common.statistics import statistics_schema
from invcoss_common.weights import DTYPES, tensors_to_bytes

SHAPE, GEOMETRY = SIZES["nano"].model, geometry_for(MODALITIES["xray"], "nano")
WEIGHTS = build_model(SHAPE, (GEOMETRY,), seed=0).state_dict()
TRAIN_IMAGES = 1_234_567  # more digits than a measured number may have
NUMBERS = {name: 12.0 if name.endswith(("images", "cases")) else 0.25 for name in METRICS}
NUMBERS |= {"train_images": float(TRAIN_IMAGES), "train_seconds": 98.7654321}
NUMBERS |= {"quarantined_files": 0.0, "skipped_steps": 3.0}
SHARE = Interval(value=1 / 3, low=0.1, high=0.9)
SPENT = DpSpent(
    epsilon=1.23456111,
    visit_epsilon=0.5,
    delta=1e-5,
    noise_multiplier=1.1,
    statistics_noise=2.0,
    sample_rate=0.1,
    steps=9,
)
HOPS = {"train": "s00-train", "evaluate": "s01-eval-00", "audit": "s00-audit"}


def asked(store, kind="train", **changes):
    """A hand-off of one kind; `changes` are of its fields."""
    task = hand_off(store).task.model_copy(update={"kind": kind})
    pool = Pool(stage=0, modality="xray", geometry=GEOMETRY, artefact=store.put(b"the images of a pool"))
    values = {"task": task, "hop": HOPS[kind], "pools": (pool,) if kind == "audit" else ()}
    return hand_off(store, **values | changes)


def model_of(dtype=torch.float32, **changes):
    return {name: tensor.to(dtype) for name, tensor in (WEIGHTS | changes).items()}


def statistics_of(**changes):
    values = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in statistics_schema(SHAPE).items()}
    return values | {"images": torch.tensor(TRAIN_IMAGES)} | changes


def release_of(handoff, **changes):
    pool = handoff.pools[0]
    figures = dict.fromkeys(AuditFigures.model_fields, 1) | {"pool_images": 8, "median_ratio": 2 / 3}
    values = {
        "stage": pool.stage,
        "pool": pool.artefact.sha256,
        "released": Artefact(sha256="b" * 64, size_bytes=pool.artefact.size_bytes - 10),
        "dropped": (0, 7),
        "figures": AuditFigures.model_validate(figures | {"beyond": SHARE, "closer": SHARE}),
        "membership": SHARE,
    }
    return Release.model_validate(values | changes)


def honest(handoff, home, on_status=lambda status: None, model=None, statistics=None):
    """A visit; `model` and `statistics` are the bytes of other files to report."""
    kind = handoff.task.kind
    on_status(Status(state="running", phase="training", step=1, steps=2, loss=0.123456789, images_per_s=1 / 3))
    report = Report(
        protocol=handoff.protocol,
        run=handoff.run,
        hop=handoff.hop,
        sender=home.name,
        plan_digest=handoff.plan_digest,
        code_version=__version__,
        metrics={name: NUMBERS[name] for name in REPORTED[kind]},
        release=release_of(handoff) if kind == "audit" else None,
    )
    if kind != "train":
        return report
    model = tensors_to_bytes(model_of(DTYPES[handoff.wire_dtype])) if model is None else model
    statistics = tensors_to_bytes(statistics_of()) if statistics is None else statistics
    return report.model_copy(
        update={
            "model": home.artefacts.put(model),
            "statistics": home.artefacts.put(statistics),
            "curve": (0.987654321, 0.5),
            "dp": SPENT if handoff.dp else None,
        }
    )
