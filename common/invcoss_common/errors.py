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
│   ├── TaskNotAllowed     modality or kind of work
│   ├── LimitExceeded      epochs, steps, hours, disk, size of the model or the pools
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

    @property
    def wire_class(self) -> str:
        """The only thing about this error that may leave a site: the name of its class."""
        return type(self).__name__


class PlanError(InvcossError):
    """The plan can't be run as written."""

    exit_code = 3


class DataError(InvcossError):
    """A site's data can't be used as they are."""

    exit_code = 4


class UnreadableFile(DataError):
    """One file can't be read or must not be used; the text names it and stays at the site."""


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
    """A site's own policy does not allow it; the name of the class is all that the coordinator learns."""

    exit_code = 11


class PlanNotAllowed(PolicyRefused):
    """The plan is not one of those that the site agreed to."""


class TaskNotAllowed(PolicyRefused):
    """The modality, or the kind of work, is not one that the site does."""


class LimitExceeded(PolicyRefused):
    """Epochs, steps, hours, disk, or the size of the model or the pools are beyond the site's limits."""


class TooFewCases(PolicyRefused):
    """Fewer cases than the site lets stand behind a model or a number."""


class OutsideHours(PolicyRefused):
    """Not at this hour of the day."""


class NotApproved(PolicyRefused):
    """A person at the site said no."""


class DpRequired(PolicyRefused):
    """The site trains with differential privacy only, or with more of it than was asked for."""


class BudgetSpent(PolicyRefused):
    """The visit would exceed the site's privacy budget."""


class AuditRequired(PolicyRefused):
    """The site's pools may not be handed on without its audit."""


class UploadSpent(PolicyRefused):
    """The visit would send more than the site's upload budget."""


class EgressRefused(InvcossError):
    """Something was about to leave a site that is not on the list of what may; nothing of it left."""

    exit_code = 12


class ReleaseMissing(InvcossError):
    """A pool without the release of its origin site, or not the one that was released; it goes nowhere."""

    exit_code = 13


class PoolRefused(ReleaseMissing):
    """The origin site's audit refused the whole pool."""
