"""The error tree: what a user can meet, what to do about it, and the exit code that a script can rely on.

InvcossError (1)
├── PlanError (3)          the plan file: unknown modality, misspelt field, impossible size
├── DataError (4)          a site's images: empty folder, too few cases, nothing readable
│   └── UnreadableFile     one file; it is quarantined, the visit goes on
├── WeightsError (5)       tensors missing, extra, misshapen, not finite, wrong digest
├── ProtocolError (6)      a message or hand-off outside the protocol's schema
│   ├── HopBusy            a site still works on an earlier hand-off of the same name
│   └── BundleRefused      a Flower app bundle that is not the reviewed one
├── TrainingError (7)      the loss stopped being a number
├── SiteError (8)          a site failed or refused; carries its error class, never its text
│   ├── TransferClosed     the site's own [transfer] lets nothing cross now; it will later
│   └── SiteUnreachable    no answer, or no progress; a site that is only away for a while comes back
├── CredentialError (9)    a key, certificate or enrolment file, or a connection that they should secure
├── ChainError (10)        a journal or ledger that was altered or damaged
├── PolicyRefused (11)     a site's own policy does not allow it; the class is the class of rule
│   ├── PlanNotAllowed     the plan's digest is not on the site's list
│   ├── TaskNotAllowed     modality or kind of work, an audit of a model that the site did not train
│   ├── LimitExceeded      epochs, steps, hours, disk, size of the model or the pools, audits of one model
│   ├── TooFewCases        fewer cases than may stand behind a model or a number
│   ├── OutsideHours       the hour of the day; it will be allowed later
│   ├── NotApproved        a person at the site said no
│   ├── DpRequired         the site trains with differential privacy only, or with more of it
│   ├── BudgetSpent        the visit would exceed the site's privacy budget
│   ├── AuditRequired      the plan would hand pools on without the site's audit
│   └── UploadSpent        the visit would send more than the site's upload budget
├── EgressRefused (12)     the guard: something was about to leave a site that is not on the list of what may
└── ReleaseMissing (13)    a pool without, or not as in, the signed release of its origin site
    └── PoolRefused        the origin site's audit refused the whole pool
"""

from __future__ import annotations


class InvcossError(Exception):
    """Base of every error shown to a user as one line; its text says what is wrong and what to do."""

    exit_code = 1


class PlanError(InvcossError):
    """The plan can't be run as written."""

    exit_code = 3


class DataError(InvcossError):
    """A site's data can't be used as they are."""

    exit_code = 4


class UnreadableFile(DataError):
    """One file can't be read or must not be used; the text names it and stays at the site. `kind` is for counts."""

    def __init__(self, text: str, kind: str = "damaged") -> None:
        super().__init__(text)
        self.kind = kind


class WeightsError(InvcossError):
    """Tensors that don't fit the model's schema, or are not finite, or have the wrong digest."""

    exit_code = 5


class ProtocolError(InvcossError):
    """A message, manifest or artefact outside the protocol."""

    exit_code = 6


class HopBusy(ProtocolError):
    """The site still works on another hand-off of the same name."""


class BundleRefused(ProtocolError):
    """A Flower app bundle carries code, or is not the one that this site installed."""


class TrainingError(InvcossError):
    """Training can't go on."""

    exit_code = 7


class SiteError(InvcossError):
    """A site reported a failure; `site` is its name."""

    exit_code = 8

    def __init__(self, text: str, site: str = "") -> None:
        super().__init__(text)
        self.site = site


class TransferClosed(SiteError):
    """A site lets no part of an artefact cross now, because of its own hours or limit of bandwidth."""


class SiteUnreachable(SiteError):
    """A site did not answer, or its work shows no progress."""


class CredentialError(InvcossError):
    """A key, certificate, enrolment request or join file can't be used, or a connection can't be trusted."""

    exit_code = 9


class ChainError(InvcossError):
    """A journal or ledger is not as it was written; the text names the line."""

    exit_code = 10


class PolicyRefused(InvcossError):
    """A site's own policy does not allow it; the name of the class is all that the coordinator learns.

    An operator is told the docstring of the class; what is in brackets there stands in the site's policy.toml.
    """

    exit_code = 11


class PlanNotAllowed(PolicyRefused):
    """The plan is not one that the site agreed to ([trust] plans; invcoss-server check-plan shows its digest)."""


class TaskNotAllowed(PolicyRefused):
    """The modality or kind of work is not one that the site does ([work]), or the audit not of a model it trained."""


class LimitExceeded(PolicyRefused):
    """Epochs, steps, hours, disk, size of the model or the pools, or audits are beyond the site's limits ([work])."""


class TooFewCases(PolicyRefused):
    """Fewer cases than the site lets stand behind a model or a number ([cases])."""


class OutsideHours(PolicyRefused):
    """Not at this hour of the day ([work] hours)."""


class NotApproved(PolicyRefused):
    """A person at the site said no; they may still approve it (invcoss-site approve)."""


class DpRequired(PolicyRefused):
    """The site trains with differential privacy only, or with more of it than the plan asks for ([dp])."""


class BudgetSpent(PolicyRefused):
    """The visit would exceed the site's privacy budget ([dp] max_epsilon)."""


class AuditRequired(PolicyRefused):
    """The site's pools may not be handed on without its audit (relay.audit of the plan; [audit] required)."""


class UploadSpent(PolicyRefused):
    """The visit would send more than the site's upload budget ([egress] max_upload_gb)."""


class EgressRefused(InvcossError):
    """Something was about to leave a site that is not on the list of what may; nothing of it left."""

    exit_code = 12


class ReleaseMissing(InvcossError):
    """A pool without the release of its origin site, or not the one that was released; it goes nowhere."""

    exit_code = 13


class PoolRefused(ReleaseMissing):
    """The origin site's audit refused the whole pool."""


OTHER_CODES = frozenset(
    {
        "Error",  # any class that is not here
        "WorkerKilled",
        "Aborted",
        "OSError",
        "MemoryError",
        "OutOfMemoryError",  # of the GPU
        "RuntimeError",
        "ValueError",
        "TypeError",
        "LookupError",
        "ArithmeticError",
        "AssertionError",
        "ImportError",
    }
)
ERROR_CODES = OTHER_CODES | {
    kind.__name__ for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, InvcossError)
}


def error_class(error: BaseException) -> str:
    """The only thing about an error that may leave a site: the nearest of its classes that is in ERROR_CODES."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERROR_CODES), "Error")
