"""A site and a coordinator that trust each other, with fixed keys and times, and whole objects for them to receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, derive_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.security.fuzzing import mutations

from invcoss_common.canonical import sha256_hex
from invcoss_common.config import DpConfig, EvaluateConfig, ReplayConfig, TrainConfig
from invcoss_common.enrolment import sign_join_file, sign_request, write_enrolment_file
from invcoss_common.errors import InvcossError
from invcoss_common.keys import public_text, save_key
from invcoss_common.metrics import COUNTS, REPORTED
from invcoss_common.modality import MODALITIES, Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import Artefact, AuditFigures, DpSpent, HandOff, Interval, Pool, Release, Report, Task
from invcoss_common.statistics import NormStatistics, statistics_to_bytes
from invcoss_common.weights import model_to_bytes
from invcoss_site.home import SiteHome, load_home, write_home

SHAPE = ModelShape(width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2)
GEOMETRY = Geometry(channels=1, size=(8, 8), patch=(4, 4))


def signing_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())


COORDINATOR, NORTH, STRANGER = (signing_key(name) for name in ("coordinator", "north", "stranger"))
NODE = public_text(derive_private_key(int.from_bytes(sha256(b"node").digest()), SECP384R1()).public_key())
REQUEST = sign_request("north", NODE, NORTH)
JOIN = sign_join_file(REQUEST, "chest", "relay.example.org:443", "-----BEGIN CERTIFICATE-----\n", COORDINATOR)


def artefact_of(data: bytes) -> Artefact:
    return Artefact(sha256=sha256_hex(data), size_bytes=len(data))


NORMS = (2 * SHAPE.depth + 1, SHAPE.width)
MODEL = model_to_bytes(build_model(SHAPE, [GEOMETRY], seed=1))
STATISTICS = statistics_to_bytes(
    NormStatistics(torch.zeros(NORMS), torch.ones(NORMS), torch.tensor(0.5), torch.tensor(12))
)
IMAGES = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)
POOL, RELEASED = pool_to_bytes(IMAGES), pool_to_bytes(IMAGES[[1, 3]])


class NeverArrives(InvcossError):
    """Flower can't read the message, so that none of our code ever sees it."""


class Undeclared(Exception):
    """The class of an error that is not one of ours was about to leave a site."""


@dataclass(frozen=True)
class Kind:
    """One kind of object: whole ones, what receives it, and the strategy that alters it.

    `receive` takes the object, raises one of `refusals`, or raises AssertionError where it took something that it would
    not have written itself. Of a `sealed` kind (signed, chained, or known by its digest) nothing but `originals` may be
    taken.
    """

    originals: tuple[bytes, ...]
    receive: Callable[[bytes], None]
    altered: mutations.Strategy
    refusals: tuple[type[InvcossError], ...]
    sealed: bool = False


def joined_site(root: Path) -> SiteHome:
    write_home(root, "north", root / "images")
    (root / "keys").mkdir()
    save_key(NORTH, root / "keys" / "signing.pem")
    write_enrolment_file(JOIN, root / "join.json")
    return load_home(root)


def handoffs() -> tuple[HandOff, ...]:
    """One to train, one to evaluate, one to audit."""
    task = Task(
        kind="train",
        stage=1,
        modality_name="xray",
        modality=MODALITIES["xray"],
        geometry=GEOMETRY,
        spacing_mm=None,
        model=SHAPE,
        families=(GEOMETRY,),
        train=TrainConfig(steps=2),
        replay=ReplayConfig(),
        evaluate=EvaluateConfig(),
        seed=3,
        threads=1,
    )
    train = HandOff(
        run="demo",
        hop="s01-train",
        receiver="north",
        plan_digest="0" * 64,
        code_version="0.1.0",
        task=task,
        model=artefact_of(MODEL),
        pools=(Pool(stage=1, modality="xray", geometry=GEOMETRY, artefact=artefact_of(POOL)),),
        sequence=1,
        audited=True,
        dp=DpConfig(),
    )
    evaluate = {"hop": "s01-eval-00", "task": task.model_copy(update={"kind": "evaluate"}), "pools": (), "dp": None}
    audit = {"hop": "s01-audit", "task": task.model_copy(update={"kind": "audit", "spacing_mm": (1.0, 1.0, 1.0)})}
    return train, train.model_copy(update=evaluate), train.model_copy(update={**audit, "dp": None})


def reports() -> tuple[Report, ...]:
    """The answers to `handoffs`."""
    share = Interval(value=0.5, low=0.25, high=0.75)
    figures = AuditFigures(
        pool_images=4,
        train_images=12,
        heldout_images=3,
        copies=1,
        beyond=share,
        refuse_share=0.9,
        closer=share,
        closer_by_chance=0.8,
        median_ratio=1.1,
        null_median_ratio=1.0,
        features_beyond=0.0,
        threshold=0.7,
        false_positive_rate=0.05,
    )
    dp = DpSpent(
        epsilon=2.5,
        visit_epsilon=1.5,
        delta=1e-5,
        noise_multiplier=1.0,
        statistics_noise=10.0,
        sample_rate=0.5,
        steps=2,
    )
    release = Release(
        stage=1,
        pool=sha256_hex(POOL),
        released=artefact_of(RELEASED),
        dropped=(0, 2),
        figures=figures,
        membership=share,
    )
    artefacts = {"model": artefact_of(MODEL), "statistics": artefact_of(STATISTICS)}
    answers = ({**artefacts, "curve": (1.0, 0.5), "dp": dp}, {}, {"release": release})
    return tuple(
        Report(
            run=handoff.run,
            hop=handoff.hop,
            sender=handoff.receiver,
            plan_digest=handoff.plan_digest,
            code_version=handoff.code_version,
            metrics={name: 12.0 if name in COUNTS else 0.5 for name in REPORTED[handoff.task.kind]},
            **values,
        )
        for handoff, values in zip(handoffs(), answers, strict=True)
    )
