"""Signs what goes to the sites of a federation, and checks what comes from them before anything in it is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from invcoss_common.errors import CredentialError
from invcoss_common.keys import check_signature, load_signing_key, parse_signing_key, sign
from invcoss_common.records import HANDOFF, REPORT
from invcoss_server.registry import Registry


@dataclass(frozen=True)
class Signatures:
    """The coordinator's key, and those of the sites in the register."""

    key: Ed25519PrivateKey
    registry: Registry

    def sign(self, handoff: bytes) -> str:
        return sign(self.key, HANDOFF, handoff)

    def check(self, site: str, report: bytes, signature: str) -> None:
        """Raise CredentialError unless `site`, not revoked, signed the report."""
        keys = self.registry.valid(site)
        if keys is None:
            raise CredentialError(f"site '{site}' has no valid key; its report is refused")
        check_signature(parse_signing_key(keys.signing_key), REPORT, report, signature, f"site '{site}'")


def load_signatures(folder: Path) -> Signatures:
    """Those of the consortium in `folder`; raises CredentialError."""
    return Signatures(load_signing_key(folder / "pki" / "coordinator.pem"), Registry(folder / "sites.db"))
