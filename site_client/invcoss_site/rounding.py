"""Numbers as they may leave: to the significant digits of the site's policy, and no loss curve where it wants none.

Measured numbers have more digits than they have meaning; what is beyond it could tell of single images.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context
from pathlib import Path

from invcoss_common.metrics import COUNTS
from invcoss_common.records import Report, Status
from invcoss_site.policy import Egress, readable_policy

STRICTEST = Egress(curve=False, digits=2)
UPWARDS = frozenset({"epsilon", "visit_epsilon"})  # never told smaller than it is
ASKED = frozenset({"delta", "noise_multiplier", "statistics_noise"})  # the coordinator's own numbers


def egress_policy(root: Path) -> Egress:
    """What may leave, for the network-facing side; the strictest where it may not read the site's policy."""
    policy = readable_policy(root)
    return policy.egress if policy else STRICTEST


def rounded_report(report: Report, egress: Egress) -> Report:
    """`report` as it may leave; counts stay as they are. Raises ValueError when a value is out of its bounds."""
    shown = report if egress.curve else report.model_copy(update={"curve": ()})
    return Report.model_validate(_rounded(shown.model_dump(), egress.digits))


def rounded_status(status: Status, egress: Egress) -> Status:
    """`status` as it may leave; many of them would make a loss curve. Raises ValueError as above."""
    shown = status if egress.curve else status.model_copy(update={"loss": 0.0})
    return Status.model_validate(_rounded(shown.model_dump(), egress.digits))


def _rounded(value: object, digits: int, name: str = "") -> object:
    if isinstance(value, dict):
        return {key: _rounded(inner, digits, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner, digits) for inner in value]
    if not isinstance(value, float) or name in COUNTS | ASKED:
        return value
    # By the shortest text of the number, so that rounding twice is rounding once.
    context = Context(prec=digits, rounding=ROUND_CEILING if name in UPWARDS else ROUND_HALF_EVEN)
    return float(context.create_decimal(repr(float(value))))
