"""The wire protocol's records: what a coordinator hands to a site and what a site answers. Nothing else crosses.

A *hop* is one piece of work at one site (train a stage, or evaluate a model); its id names everything about it, so a
message that arrives twice does no harm. Large artefacts (tensors) are named by sha256 and travel in parts.

Two versions of the protocol are spoken, this one and the one before, so that no two sides need be upgraded at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from invcoss_common.canonical import canonical_json, one_line
from invcoss_common.config import DpConfig, EvaluateConfig, Name, ReplayConfig, Share, TrainConfig, WireDtype
from invcoss_common.errors import ProtocolError
from invcoss_common.metrics import CURVE_POINTS, check_metrics
from invcoss_common.modality import Geometry, Modality, ModelShape

PROTOCOL_VERSION = 2
SPOKEN = (PROTOCOL_VERSION - 1, PROTOCOL_VERSION)
HANDOFF, REPORT = "hand-off", "report"  # kinds of signed documents
MAX_RECORD_BYTES = 1 << 20  # a hand-off or report is JSON of a few kB; more is refused unread

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HopId = Annotated[str, Field(pattern=r"^s[0-9]{2}-(train|audit|eval-[a-z0-9-]{1,48})$")]
CurvePoint = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Ratio = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
HopState = Literal["unknown", "queued", "running", "done", "failed"]
Phase = Literal["approval", "hours", "reading", "training", "statistics", "evaluating", "auditing"]
Verb = Literal["hello", "have", "put", "start", "status", "get", "purge", "abort"]


def negotiate(theirs: int, site: str) -> int:
    """The version that the coordinator and `site`, whose newest is `theirs`, speak with each other: the lower one.

    Raises ProtocolError naming both when they are more than one apart.
    """
    if abs(theirs - PROTOCOL_VERSION) > 1:
        older = "the site's" if theirs < PROTOCOL_VERSION else "the coordinator's"
        raise ProtocolError(
            f"site '{site}' speaks protocol {theirs}, the coordinator {PROTOCOL_VERSION}; upgrade {older} software"
        )
    return min(theirs, PROTOCOL_VERSION)


def spoken(version: int) -> int:
    """`version`, if this side speaks it; else raises ProtocolError naming both sides' versions."""
    if version not in SPOKEN:
        raise ProtocolError(f"protocol {version} is not spoken here; this side speaks {SPOKEN[0]} and {SPOKEN[1]}")
    return version


def _spoken(version: int) -> int:
    try:
        return spoken(version)
    except ProtocolError as error:
        raise ValueError(str(error)) from None


Version = Annotated[int, AfterValidator(_spoken)]


class _Record(BaseModel):
    """`added` names the fields that are younger than protocol 1, with the version that brought them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    added: ClassVar[dict[str, int]] = {}


class Artefact(_Record):
    """A file of tensors, known by its digest."""

    sha256: Digest
    size_bytes: int = Field(ge=1, le=1 << 40)


class Pool(_Record):
    """The synthetic images of an earlier stage: uint8 `images` (N, C, *size) in a safetensors file."""

    stage: int = Field(ge=0, lt=64)
    modality: str
    geometry: Geometry
    artefact: Artefact


class Task(_Record):
    """What a site is asked to do, complete: modality, input geometry, training, replay and evaluation.

    `audit`: compare the one pool of the hand-off, made of this site's model of `stage`, with the site's own images.
    """

    kind: Literal["train", "evaluate", "audit"]
    stage: int = Field(ge=0, lt=64)
    modality_name: str
    modality: Modality
    geometry: Geometry
    spacing_mm: tuple[float, float, float] | None
    model: ModelShape
    families: tuple[Geometry, ...]
    train: TrainConfig
    replay: ReplayConfig
    evaluate: EvaluateConfig
    seed: int
    threads: int | None


class HandOff(_Record):
    """Coordinator to site: the task, the model to start from, the pools to rehearse; `wire_dtype` is of models."""

    added: ClassVar[dict[str, int]] = {"wire_dtype": 2, "sequence": 2, "audited": 2, "dp": 2}

    protocol: Version = PROTOCOL_VERSION
    run: Name
    hop: HopId
    receiver: Name
    plan_digest: Digest
    code_version: str
    task: Task
    model: Artefact
    pools: tuple[Pool, ...] = ()
    wire_dtype: WireDtype = "float32"
    sequence: int = Field(default=0, ge=0, lt=2**31, description="counts the hand-offs of a run; 0 where not counted")
    audited: bool = Field(default=False, description="pools of this run go nowhere without their origin site's release")
    dp: DpConfig | None = Field(default=None, description="train with differential privacy (DP-SGD)")

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        """Everything the site must hold before it can start."""
        return (self.model, *(pool.artefact for pool in self.pools))


class Interval(_Record):
    """A measured share or probability with its confidence interval."""

    value: Share
    low: Share
    high: Share


class AuditFigures(_Record):
    """What a leak audit found of a pool as a whole; nothing in it is about a single image."""

    pool_images: Count
    train_images: Count
    heldout_images: Count
    copies: Count = Field(description="exact or near copies of a training image")
    beyond: Interval = Field(description="share of the pool nearer to training than the threshold allows")
    refuse_share: Share = Field(description="refused when `beyond` is surely above this")
    closer: Interval = Field(description="share of the pool whose nearest image of all is a training image")
    closer_by_chance: Share = Field(description="that share if training and held-out images were alike to the model")
    median_ratio: Ratio = Field(description="distance to the nearest training over that to the nearest held-out image")
    null_median_ratio: Ratio = Field(description="the same of the held-out images")
    features_beyond: Share = Field(description="share of the pool that features alone would drop")
    threshold: Ratio = Field(description="score below which an image is dropped")
    false_positive_rate: Share = Field(description="largest expected share of innocent images below the threshold")


class Release(_Record):
    """The origin site's word, part of its signed report, on what of a pool may travel; it holds no image."""

    stage: int = Field(ge=0, lt=64)
    pool: Digest = Field(description="of the pool as it came to the audit")
    released: Artefact | None = Field(description="the pool file without the dropped images; None: nothing may travel")
    dropped: tuple[Annotated[int, Field(ge=0, lt=1_000_000)], ...] = Field(
        max_length=100_000, description="rows of the pool that may not travel, ascending"
    )
    figures: AuditFigures
    membership: Interval = Field(description="AUC of membership inference on the model by its loss; 0.5 tells nothing")


class DpSpent(_Record):
    """Privacy spent on a site's training cases by DP-SGD and the noise on its statistics."""

    epsilon: float = Field(ge=0, le=1e6, allow_inf_nan=False, description="over all visits to this site so far")
    visit_epsilon: float = Field(ge=0, le=1e6, allow_inf_nan=False, description="of this visit alone")
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0, le=1e3)
    statistics_noise: float = Field(gt=0, le=1e3, description="noise multiplier of the shipped statistics")
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)


class Report(_Record):
    """Site to coordinator: the trained model and its normalisation statistics (training only) and declared numbers.

    `release` is what an audit answers, `dp` what training with differential privacy has spent.
    """

    added: ClassVar[dict[str, int]] = {"release": 2, "dp": 2}

    protocol: Version = PROTOCOL_VERSION
    run: Name
    hop: HopId
    sender: Name
    plan_digest: Digest
    code_version: str
    model: Artefact | None = None
    statistics: Artefact | None = None
    metrics: dict[str, float]
    curve: tuple[CurvePoint, ...] = Field(default=(), max_length=CURVE_POINTS)
    release: Release | None = None
    dp: DpSpent | None = None

    @field_validator("metrics")
    @classmethod
    def _declared(cls, metrics: dict[str, float]) -> dict[str, float]:
        try:
            return check_metrics(metrics)
        except ProtocolError as error:
            raise ValueError(str(error)) from None

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        return tuple(artefact for artefact in (self.model, self.statistics) if artefact)


class Status(_Record):
    """Site to coordinator, while a hop is worked on: where in which phase it stands."""

    state: HopState
    phase: Phase = "reading"
    step: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=0)
    images_per_s: float = Field(default=0.0, ge=0, le=1e9)
    data_wait_share: float = Field(default=0.0, ge=0, le=1)
    loss: float = Field(default=0.0, ge=0, le=1e4)
    error: str = Field(default="", pattern=r"^[A-Za-z]{0,48}$", description="class of the error, if failed")

    @property
    def waits(self) -> bool:
        """Whether the hop waits for a person at the site, or the site's hours: however long, nothing is wrong."""
        return self.state == "queued" and self.phase in ("approval", "hours")


@dataclass(frozen=True)
class Request:
    """One verb with small fields and at most one part of an artefact, in the words of one protocol version."""

    verb: Verb
    fields: dict[str, str | int] = field(default_factory=dict)
    blob: bytes = b""
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class Response:
    """The answer to a Request: small fields and at most one part of an artefact."""

    fields: dict[str, str | int] = field(default_factory=dict)
    blob: bytes = b""


def to_bytes(record: HandOff | Report | Status) -> bytes:
    """Canonical JSON of a record, without the fields that its protocol version does not know."""
    unknown = _unknown(record)
    assert all(getattr(record, name) == type(record).model_fields[name].default for name in unknown)
    return canonical_json(record.model_dump(mode="json", exclude=unknown))


R = TypeVar("R", HandOff, Report, Status)


def from_bytes(kind: type[R], data: bytes) -> R:
    """Parse a record of the given kind; raises ProtocolError naming the field, never echoing content.

    Only the form that `to_bytes` writes is read, so that a record and its digest are one to one.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ProtocolError(f"{kind.__name__} of {len(data)} bytes is larger than the protocol allows")
    try:
        record = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        reason = first["msg"].removeprefix("Value error, ")
        raise ProtocolError(one_line(f"{kind.__name__}.{where[:100]}: {reason}")) from None
    if young := sorted(_unknown(record) & record.model_fields_set):
        raise ProtocolError(f"{kind.__name__}.{young[0]}: not a field of the protocol version that the record names")
    if to_bytes(record) != data:
        raise ProtocolError(f"{kind.__name__} that is not in the form it was written in")
    return record


def _unknown(record: HandOff | Report | Status) -> set[str]:
    """The fields of a record that are younger than the protocol version it names."""
    version = getattr(record, "protocol", PROTOCOL_VERSION)
    return {name for name, since in record.added.items() if since > version}
