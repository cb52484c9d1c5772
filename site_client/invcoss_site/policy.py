"""A site's own policy: what it does for a coordinator and what may leave it. It never travels, and always wins.

`policy.toml` in the site's folder; without one, the defaults hold. docs/policy.md explains it line by line.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from invcoss_common.config import Name
from invcoss_common.errors import DataError
from invcoss_common.records import Digest

POLICY = "policy.toml"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Hours = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trust(_Part):
    """Whom the site works for. The coordinator of the join file must sign everything, whatever stands here."""

    coordinators: tuple[str, ...] = Field(
        default=(), description="public keys of further coordinators' owners that may sign, as in a join file"
    )
    plans: tuple[Digest, ...] = Field(default=(), description="digests of the plans agreed to; empty: any plan")
    approval: bool = Field(default=False, description="a person must approve each hand-off (invcoss-site approve)")


class Work(_Part):
    """What the site does, and how much of it at most in one visit."""

    kinds: tuple[Literal["train", "evaluate", "audit"], ...] = ("train", "evaluate", "audit")
    modalities: tuple[Name, ...] = Field(default=(), description="empty: any")
    max_epochs: float | None = Field(default=None, gt=0, description="passes over the training images")
    max_steps: int | None = Field(default=None, ge=1)
    max_hours: float | None = Field(default=None, gt=0, description="of work on one hand-off, from its first start")
    max_disk_gb: float | None = Field(default=None, gt=0, description="10^9 bytes of model and pools of one hand-off")
    max_parameters: int | None = Field(default=None, ge=1, description="of the model")
    hours: Hours | None = Field(default=None, description='when work may begin, local time, such as "18:00-07:00"')


class Cases(_Part):
    """How many cases must stand behind whatever leaves."""

    min_train: int = Field(default=10, ge=1, description="training cases behind a model and its statistics")
    min_heldout: int = Field(default=5, ge=1, description="held-out cases behind an evaluation or an audit")


class Egress(_Part):
    """What may leave, besides the model and its statistics, and how much of it."""

    curve: bool = Field(default=True, description="the training loss over time, at most 200 points")
    digits: int = Field(default=6, ge=2, le=9, description="significant digits of every number in a report")
    max_upload_gb: float | None = Field(default=None, gt=0, description="10^9 bytes of artefacts in any 30 days")
    max_weight_norm: float = Field(default=1e6, gt=0, description="largest norm of one tensor of the model")
    log_level: Literal["none"] = Field(default="none", description="of log lines that may leave; there are none")


class Dp(_Part):
    """Differential privacy (docs/privacy.md)."""

    required: bool = False
    max_epsilon: float | None = Field(default=None, gt=0, description="budget over all visits; unset: only counted")
    max_delta: float = Field(default=1e-4, gt=0, lt=1)
    min_noise_multiplier: float = Field(default=0.0, ge=0)


class AuditSettings(_Part):
    """The leak audit of pools made of this site's model: how images are compared, what is dropped or refused."""

    required: bool = Field(default=True, description="no work for runs that hand pools on without this audit")
    extent_2d: int = Field(default=32, ge=16, description="2-D images are compared at this many pixels an axis at most")
    extent_3d: int = Field(default=16, ge=8, description="the same of volumes")
    template: float = Field(default=0.8, gt=0.5, lt=1, description="central share of each axis that is looked for")
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field(
        default=(0.88, 0.92, 0.96, 1.0, 1.04, 1.09, 1.14), min_length=1, description="sizes that it is looked for in"
    )
    mirrored: bool = Field(default=True, description="also look for the mirror image, which training may have seen")
    candidates: int = Field(default=8, ge=1, description="nearest training images by pixels that SSIM is taken of")
    references: int = Field(default=32, ge=1, description="held-out images, evenly chosen, that typical SSIM is from")
    false_positive_rate: Fraction = Field(default=0.05, description="share of innocent images that may be dropped")
    refuse_share: Fraction = Field(default=0.1, description="a pool surely above this share of dropped is refused")
    copy_correlation: Fraction = Field(default=0.99, description="with `copy_ssim`: from here on an image is a copy")
    copy_ssim: Fraction = Field(default=0.95)
    confidence: Fraction = Field(default=0.95, description="of all intervals, two-sided")
    batch: int = Field(default=32, ge=1, description="images compared at a time; bounds the memory")


class SitePolicy(_Part):
    """The whole of `policy.toml`."""

    trust: Trust = Trust()
    work: Work = Work()
    cases: Cases = Cases()
    egress: Egress = Egress()
    dp: Dp = Dp()
    audit: AuditSettings = AuditSettings()


def load_policy(root: Path) -> SitePolicy:
    """The policy of the site in `root`; raises DataError that names the file and the field."""
    path = root / POLICY
    if not path.exists():
        return SitePolicy()
    try:
        return SitePolicy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: can't read the site's policy ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TOML file: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
