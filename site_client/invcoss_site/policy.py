"""A site's own policy: what it does for a coordinator and what may leave it. It never travels, and always wins.

`policy.toml` in the site's folder; without one, the defaults hold. docs/policy.md says what each guards against. A
setting whose default is None has an example, for the file that `init` writes.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from invcoss_common.canonical import one_line, sha256_file, write_atomic
from invcoss_common.config import Name, read_toml
from invcoss_common.enrolment import SigningKey
from invcoss_common.errors import DataError
from invcoss_common.records import Digest
from invcoss_site.home import Hours

POLICY = "policy.toml"
APPROVALS = "approvals"  # folder beside it, of what people said to single hand-offs (approval.py)
HEAD = """\
# What this site does for a coordinator, and what may leave it. This file never travels, and always wins.
# Every setting is here with its default, switched off by the "#" before it: remove that, and change the value.
# What each guards against: docs/policy.md. What is in force: invcoss-site policy FOLDER
"""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Kind = Literal["train", "evaluate", "audit"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trust(_Part):
    """Whom the site works for, and who agrees to it."""

    coordinators: tuple[SigningKey, ...] = Field(
        default=(),
        description="further public keys, besides that of the join file, whose signature on a hand-off is taken; "
        "in the form of coordinator_key in a join file",
    )
    plans: tuple[Digest, ...] = Field(
        default=(), description="digests of the plans agreed to (invcoss-server check-plan shows them); empty: any plan"
    )
    approval: bool = Field(
        default=False, description="a person must approve each hand-off (invcoss-site pending, approve, refuse)"
    )
    approve_kinds: tuple[Kind, ...] = Field(default=("train",), description="kinds of hand-offs that `approval` is of")


class Work(_Part):
    """What the site does, and how much of it at most for one hand-off."""

    kinds: tuple[Kind, ...] = Field(default=("train", "evaluate", "audit"), description="kinds of work that are done")
    modalities: tuple[Name, ...] = Field(default=(), description="modalities that are worked on; empty: any")
    max_epochs: float | None = Field(
        default=None, gt=0, description="passes over the site's training images", examples=[50.0]
    )
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps", examples=[100000])
    max_hours: float | None = Field(
        default=None,
        gt=0,
        description="hours from the first start of the work to its end, interruptions included",
        examples=[72.0],
    )
    max_disk_gb: float | None = Field(
        default=None, gt=0, description="10^9 bytes of the model and the pools that are sent", examples=[20.0]
    )
    max_parameters: int | None = Field(
        default=None, ge=1, description="parameters of the model", examples=[400_000_000]
    )
    hours: Hours | None = Field(
        default=None,
        description="when work may begin, local time; what has begun goes on to its end",
        examples=["18:00-07:00"],
    )


class Cases(_Part):
    """How many cases must stand behind whatever leaves."""

    min_train: int = Field(default=10, ge=1, description="training cases behind a model and its statistics")
    min_heldout: int = Field(default=5, ge=1, description="held-out cases behind an evaluation or an audit")


class Egress(_Part):
    """What may leave, besides the model and its statistics, and how much of it."""

    curve: bool = Field(default=True, description="the training loss over time, at most 200 points")
    digits: int = Field(default=6, ge=2, le=9, description="significant digits of every number in a report")
    max_upload_gb: float | None = Field(
        default=None, gt=0, description="10^9 bytes of artefacts in any 30 days", examples=[50.0]
    )
    max_weight_norm: float = Field(default=1e6, gt=0, description="largest norm of one tensor of the model")
    log_level: Literal["none"] = Field(default="none", description="of log lines that may leave; there are none")


class Dp(_Part):
    """Differential privacy (docs/privacy.md)."""

    required: bool = Field(default=False, description="trains with differential privacy (DP-SGD) only")
    max_epsilon: float | None = Field(
        default=None, gt=0, description="budget over all visits; unset: only counted", examples=[8.0]
    )
    max_delta: float = Field(default=1e-4, gt=0, lt=1, description="largest delta of a training with DP-SGD")
    min_noise_multiplier: float = Field(default=0.0, ge=0, description="least noise of a training with DP-SGD")


class AuditSettings(_Part):
    """The leak audit of pools made of this site's model: how images are compared, what is dropped or refused."""

    required: bool = Field(default=True, description="no work for runs that hand pools on without this audit")
    max_audits: int = Field(default=3, ge=1, description="pools of one model of this site that are audited")
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
    copy_ssim: Fraction = Field(default=0.95, description="with `copy_correlation`, the same")
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


class Setting(NamedTuple):
    """One line of `policy.toml`."""

    table: str
    name: str
    value: Any
    is_default: bool
    description: str


def load_policy(root: Path) -> SitePolicy:
    """The policy of the site in `root`; raises DataError that names the file and the field."""
    path = root / POLICY
    if not path.exists():
        return SitePolicy()
    try:
        return SitePolicy.model_validate(read_toml(path, "the site's policy", DataError))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        unknown = first["type"] == "extra_forbidden"
        reason = "no such setting; check the spelling" if unknown else first["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, first["loc"]))
        raise DataError(one_line(f"{path}: {field[:100]}: {reason[:300]}", most=1000)) from None


def readable_policy(root: Path) -> SitePolicy | None:
    """The policy as `load_policy`, None where this process may not read it: then the agent alone decides."""
    path = root / POLICY
    return load_policy(root) if os.access(path, os.R_OK) or not path.exists() else None


def policy_digest(root: Path) -> str:
    """sha256 of the site's policy.toml, as `sha256sum` shows it; "" where there is none."""
    return sha256_file(root / POLICY) if (root / POLICY).exists() else ""


def settings(policy: SitePolicy) -> Iterator[Setting]:
    """Every setting of `policy` in order."""
    for table in SitePolicy.model_fields:
        part: _Part = getattr(policy, table)
        for name, field in type(part).model_fields.items():
            value = getattr(part, name)
            yield Setting(table, name, value, value == field.default, str(field.description))


def write_policy(root: Path) -> None:
    """Write `policy.toml` with every setting switched off, unless there is one, and make the folder of approvals."""
    (root / APPROVALS).mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (root / POLICY).exists():
        write_atomic(root / POLICY, policy_text().encode())


def policy_text() -> str:
    """The defaults as a `policy.toml`: without the "#" in front of a setting it says the same, or gives an example."""
    lines, table = [HEAD.rstrip()], ""
    for setting in settings(SitePolicy()):
        part = type(getattr(SitePolicy(), setting.table))
        if setting.table != table:
            table = setting.table
            lines += ["", f"[{table}]", *_comment(str(part.__doc__))]
        field, value = part.model_fields[setting.name], setting.value
        note = ""
        if value is None:
            value, note = (field.examples or [None])[0], " (not set; this is an example)"
        lines += ["", *_comment(setting.description + note), f"#{setting.name} = {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent="# ", subsequent_indent="# ")
