"""A site's privacy account, ROOT/privacy.json: what its visits have spent, against the budget of its policy.

A visit is charged as a whole before its first step. The same visit, gone on with after a kill, is charged once; any
other, were it of the same hand-off, is another release and is charged again. All visits are composed as if each were
about the same cases. Opacus does the sum, by Renyi differential privacy: its other accountant, PRV, gives epsilons that
are somewhat lower, but takes minutes, or finds none, where there is little noise (docs/privacy.md).
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from invcoss_common.canonical import canonical_json, write_atomic
from invcoss_common.chain import now
from invcoss_common.errors import BudgetSpent, DataError
from invcoss_common.records import Digest, DpSpent
from invcoss_site import journal
from invcoss_site.home import SiteHome
from invcoss_site.policy import POLICY, Dp

ACCOUNT = "privacy.json"
NO_PRIVACY = 1e6  # epsilon that the protocol has no number for; it protects nothing


class Charge(BaseModel):
    """What one visit spends: `steps` of DP-SGD, and one release of statistics over all cases."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    visit: Digest = Field(description="name of the visit, which is that of its random numbers")
    run: str
    hop: str
    noise_multiplier: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    statistics_noise: float = Field(gt=0)
    time: str = Field(default_factory=now)

    def same(self, other: Charge) -> bool:
        """Whether both are the same visit, which spends the same."""
        return self.model_copy(update={"time": other.time}) == other


_CHARGES = TypeAdapter(tuple[Charge, ...])


def epsilon(charges: Sequence[Charge], delta: float) -> float:
    """The epsilon of all `charges` together at `delta`; raises DataError where Opacus is not installed."""
    try:
        from opacus.accountants import RDPAccountant  # here, because only sites that train like this need it
    except ImportError:
        raise DataError(
            'differential privacy needs Opacus, which is not installed; pip install "invcoss[dp]"'
        ) from None
    accountant = RDPAccountant()
    for charge in charges:
        accountant.history += [
            (charge.noise_multiplier, charge.sample_rate, charge.steps),
            (charge.statistics_noise, 1.0, 1),
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other orders may give a lower epsilon; this one holds too
        return float(accountant.get_epsilon(delta))


def charged(root: Path) -> tuple[Charge, ...]:
    """All charges of the site in `root`, oldest first; raises DataError when the account can't be read."""
    path = root / ACCOUNT
    if not path.exists():
        return ()
    try:
        return _CHARGES.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise DataError(
            f"{path}: not a privacy account; put back a copy of it, for without it nobody knows what was spent"
        ) from None


def charge(home: SiteHome, policy: Dp, asked: Charge, delta: float) -> DpSpent:
    """Charge a visit to the account of the site, unless it was before, and say what is spent at `delta`.

    To be called before the visit looks at an image for anything but counting. Raises BudgetSpent, and charges nothing,
    when the site's budget, `max_epsilon` at `max_delta`, would be exceeded.
    """
    with _locked(home.root):
        before = charged(home.root)
        known = any(asked.same(earlier) for earlier in before)
        after = before if known else (*before, asked)
        if not known:
            _check_budget(policy, before, after)
        visit, total = epsilon([asked], delta), epsilon(after, delta)
        if not total <= NO_PRIVACY:
            raise BudgetSpent("epsilon would be above a million, which protects nobody; the plan needs more dp noise")
        if not known:
            # The journal first: what is charged is on record, if twice where a kill comes between the two.
            journal.charged(home, asked.model_dump(exclude={"time"}), visit, delta)
            write_atomic(home.root / ACCOUNT, canonical_json([one.model_dump() for one in after]))
    return DpSpent(
        epsilon=total,
        visit_epsilon=visit,
        delta=delta,
        noise_multiplier=asked.noise_multiplier,
        statistics_noise=asked.statistics_noise,
        sample_rate=asked.sample_rate,
        steps=asked.steps,
    )


def _check_budget(policy: Dp, before: Sequence[Charge], after: Sequence[Charge]) -> None:
    if policy.max_epsilon is None:
        return
    total = epsilon(after, policy.max_delta)
    if not total <= policy.max_epsilon:
        spent = epsilon(before, policy.max_delta) if before else 0.0
        raise BudgetSpent(
            f"epsilon would be {total:.3g} at delta {policy.max_delta:g}, after {spent:.3g} so far, and "
            f"[dp] max_epsilon in {POLICY} is {policy.max_epsilon:g}"
        )


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time looks at the budget and spends of it."""
    descriptor = os.open(root / f".{ACCOUNT}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
