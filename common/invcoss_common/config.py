"""The plan: everything the coordinator decides about a run, checked before anything starts.

A plan travels to the sites (it is public to them); a site's own policy never travels and always wins.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invcoss_common.canonical import canonical_json, one_line, sha256_hex
from invcoss_common.errors import InvcossError, PlanError
from invcoss_common.modality import MODALITIES, SIZES, Geometry, Modality, ModelShape, SizeName, geometry_for, lookup

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e4)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
WireDtype = Literal["float32", "bfloat16"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainConfig(_Part):
    """Masked image modelling at a site (MAE). Exactly one of `steps` and `epochs` is set."""

    steps: int | None = Field(default=None, ge=1, le=10_000_000, description="optimiser steps per stage")
    epochs: int | None = Field(default=None, ge=1, le=10_000, description="passes over the site's training cases")
    batch_size: int = Field(default=32, ge=1, le=4096, description="images per forward pass, over all GPUs of a site")
    accumulate: int = Field(default=1, ge=1, le=1024, description="forward passes per optimiser step")
    lr: float = Field(default=1.5e-3, gt=0, le=1, description="peak learning rate of AdamW")
    warmup: Share = Field(default=0.1, description="share of the steps spent warming up; then cosine to 0")
    weight_decay: float = Field(default=0.05, ge=0, le=1)
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    clip_norm: float = Field(default=1.0, gt=0, description="gradient norm above which gradients are scaled down")
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches removed")
    crop_scale: Share = Field(default=0.2, description="smallest area share of a random resized crop (2-D)")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_bad_steps: int = Field(default=3, ge=0, description="non-finite steps in a row that are skipped before failing")
    checkpoint_every_s: float = Field(default=60.0, gt=0, description="seconds between checkpoints of a visit")
    workers: int = Field(default=0, ge=0, le=64, description="processes that prepare batches, for each GPU")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self


class ReplayConfig(_Part):
    """How earlier modalities are rehearsed on synthetic pools while a new one is learned.

    `distil`: latent tokens and decoder predictions of the frozen previous model on the same mixed image and mask
    (docs/adr/0003). `published`: masked modelling on the synthetic image plus latent distillation, as
    MedCoSS and InvCoSS do.
    """

    loss: Literal["distil", "published"] = "distil"
    weight: Weight = 1.0
    batch_share: float = Field(default=0.5, gt=0, le=4, description="replay batch size over training batch size")
    noise: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="distil only: largest SD of Gaussian noise on a replayed image, whose values lie in [0, 1]; the SD "
        "is drawn uniformly per image. Synthetic images lack fine texture; noise stands in for it",
    )
    mixup: bool = Field(default=True, description="mix pairs of one modality, x' = a x_i + (1 - a) x_j")


class InversionConfig(_Part):
    """Model inversion on the coordinator (InvCoSS; docs/method.md)."""

    pool_size: int = Field(default=64, ge=2, le=1_000_000, description="synthetic images per stage")
    steps: int = Field(default=200, ge=1, le=1_000_000, description="Adam steps per generator")
    batch_size: int = Field(default=16, ge=2, le=4096, description="latents drawn per step")
    images_per_generator: int = Field(default=64, ge=2, description="a fresh generator is started every so many images")
    generator: Literal["invunet", "dcgan", "pixels"] = "invunet"
    lr_generator: float = Field(default=2e-3, gt=0, le=1)
    lr_latent: float = Field(default=0.05, gt=0, le=1)
    task_weight: Weight = 1.0
    norm_weight: Weight = Field(default=3.0, description="alpha_norm: fidelity (1) against diversity (5)")
    image_weight: Weight = Field(default=0.1, description="alpha_img: total variation")
    repulsive_weight: Weight = Field(default=0.1, description="alpha_rep")
    latent_channels: int = Field(default=32, ge=1, le=1024)
    width: int = Field(default=64, ge=8, le=1024, description="channels at the generator's bottleneck")
    checkpoint_every_s: float = Field(default=60.0, gt=0)


class EvaluateConfig(_Part):
    """Evaluation of a model on a site's held-out cases."""

    mask_draws: int = Field(default=4, ge=1, le=64, description="random masks per image, fixed by the plan's seed")
    batch_size: int = Field(default=64, ge=1, le=4096)
    max_images: int = Field(default=2000, ge=1)


class DpConfig(_Part):
    """Differential privacy of a site's training cases: DP-SGD, and Gaussian noise on the shipped statistics.

    The budget (epsilon) is each site's own policy; here is what the training does.
    """

    noise_multiplier: float = Field(default=1.0, gt=0, le=1e3, description="SD of the noise over clip_norm")
    clip_norm: float = Field(default=1.0, gt=0, le=1e3, description="largest gradient norm of one image")
    statistics_noise: float = Field(default=10.0, gt=0, le=1e3, description="noise multiplier of the statistics")
    delta: float = Field(default=1e-5, gt=0, lt=0.1)


class RelayConfig(_Part):
    """How the coordinator talks to sites. Time-outs are on lack of progress only, never on total time."""

    poll_s: float = Field(default=0.5, gt=0, le=600, description="pause between two status questions")
    stall_timeout_s: float = Field(default=600.0, gt=0, description="give up on a visit that shows no progress so long")
    answer_s: float = Field(default=120.0, gt=0, le=86400, description="ask again when no answer came so long")
    skip_absent_s: float | None = Field(
        default=None, gt=0, description="leave out a stage whose site has been away so long; unset: wait for it"
    )
    audit: bool = Field(
        default=True, description="a pool goes to the site it was learned from first, and nowhere without its release"
    )
    attempts: int = Field(default=3, ge=1, le=100, description="tries of one message before the stage fails")
    part_mib: int = Field(default=64, ge=1, le=128, description="largest part of an artefact in one message")
    wire_dtype: WireDtype = Field(default="float32", description="models travel as; bfloat16 halves them and rounds")
    compress: bool = Field(default=False, description="deflate parts of artefacts on the wire; no bit is lost")


class StageConfig(_Part):
    """One visit: a modality learned at a site. Unset training lengths are those of `[train]`."""

    site: Name
    modality: str
    steps: int | None = Field(default=None, ge=1, le=10_000_000)
    epochs: int | None = Field(default=None, ge=1, le=10_000)
    spacing_mm: tuple[float, float, float] | None = Field(
        default=None, description="3-D only: voxel size (D, H, W) to resample to; unset fits each volume into the input"
    )

    @model_validator(mode="after")
    def _spacing_is_possible(self) -> StageConfig:
        if self.spacing_mm and not all(0.05 <= s <= 100 for s in self.spacing_mm):
            raise ValueError(f"spacing_mm {self.spacing_mm} must lie between 0.05 and 100 mm")
        if self.steps and self.epochs:
            raise ValueError("set steps or epochs, not both")
        return self


class SimulatedSite(_Part):
    """Where `simulate` finds a site's images: a folder under --data, or the built-in phantoms."""

    phantoms: int | None = Field(default=None, ge=4, le=100_000, description="number of phantom cases to make")
    folder: str | None = Field(default=None, description="folder under --data")
    index: tuple[str, ...] = Field(default=(), description="CSV files in the folder that list files, cases and splits")

    @model_validator(mode="after")
    def _one_source(self) -> SimulatedSite:
        if (self.phantoms is None) == (self.folder is None):
            raise ValueError("set exactly one of phantoms and folder")
        for path in (self.folder or "", *self.index):
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"'{path}' must stay inside the data folder")
        return self


class Plan(_Part):
    """A whole run, as an operator writes it in TOML."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    size: SizeName
    threads: int | None = Field(default=None, ge=1, le=256, description="CPU threads per process; unset: all")
    train: TrainConfig
    replay: ReplayConfig = ReplayConfig()
    inversion: InversionConfig = InversionConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    dp: DpConfig | None = Field(default=None, description="train with differential privacy")
    relay: RelayConfig = RelayConfig()
    modalities: dict[Name, Modality] = {}
    stages: tuple[StageConfig, ...] = Field(min_length=1, max_length=64)
    simulation: dict[Name, SimulatedSite] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        for number, stage in enumerate(self.stages, start=1):
            try:
                modality = lookup(stage.modality, self.modality_table)
            except PlanError as error:
                raise ValueError(f"stage {number}: {error}") from None
            if stage.spacing_mm and modality.ndim != 3:
                raise ValueError(
                    f"stage {number}: spacing_mm is for 3-D modalities, {stage.modality} has {modality.ndim}"
                )
        unknown = set(self.simulation) - set(self.sites)
        if unknown:
            raise ValueError(f"simulation names sites that no stage visits: {', '.join(sorted(unknown))}")
        return self

    @property
    def modality_table(self) -> dict[str, Modality]:
        return MODALITIES | self.modalities

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site once, in the order of its first visit."""
        return tuple(dict.fromkeys(stage.site for stage in self.stages))

    @property
    def model_shape(self) -> ModelShape:
        return SIZES[self.size].model

    def modality(self, stage: int) -> Modality:
        return self.modality_table[self.stages[stage].modality]

    def geometry(self, stage: int) -> Geometry:
        """Input geometry of one stage (0-based)."""
        return geometry_for(self.modality(stage), self.size)

    def train_for(self, stage: int) -> TrainConfig:
        """`[train]` with the stage's own length, if it has one."""
        own = self.stages[stage]
        if own.steps is None and own.epochs is None:
            return self.train
        return self.train.model_copy(update={"steps": own.steps, "epochs": own.epochs})

    def digest(self) -> str:
        """sha256 of the plan's canonical JSON; what a site agrees to."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))


def parse_plan(data: dict[str, object], origin: str) -> Plan:
    """Validate a plan given as nested dicts; raises PlanError that names `origin`, the field and the reason."""
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "plan"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "no such field; check the spelling"
        elif "input" in first and not isinstance(first["input"], dict | list):
            reason += f" (found {first['input']!r})"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise PlanError(one_line(f"{origin}: {field[:100]}: {reason[:300]}{more}", most=1000)) from None


def load_plan(path: Path) -> Plan:
    """Read and validate a plan file; raises PlanError with one line that names the file and the field."""
    return parse_plan(read_toml(path, "the plan", PlanError), str(path))


def read_toml(path: Path, what: str, refusal: type[InvcossError]) -> dict[str, object]:
    """The tables of `what`, a TOML file; raises `refusal` with one line that names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal(f"{path}: can't read {what} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and lists in lists in lists, too
        raise refusal(one_line(f"{path}: not a TOML file: {error}", most=1000)) from None
