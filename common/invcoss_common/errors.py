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
└── ChainError (10)        a journal or ledger that was altered or damaged
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
