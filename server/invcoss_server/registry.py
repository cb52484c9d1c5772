"""The register of enrolled sites, in one SQLite file: one row per pair of keys ever enrolled, none removed.

A row is written when a pair is enrolled and changed once, when it is revoked; each change is one transaction, and the
rules (a key serves once, a name has one valid pair) are the table's own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.enrolment import EnrolmentRequest
from invcoss_common.errors import CredentialError
from invcoss_common.keys import key_digest, parse_public_key

_TABLE = """
CREATE TABLE site (
    name TEXT NOT NULL,
    node_key TEXT NOT NULL, node_key_sha256 TEXT NOT NULL UNIQUE,
    signing_key TEXT NOT NULL, signing_key_sha256 TEXT NOT NULL UNIQUE,
    enrolled TEXT NOT NULL, revoked TEXT
);
CREATE UNIQUE INDEX one_valid_pair ON site (name) WHERE revoked IS NULL;
"""
_COLUMNS = "name, node_key, node_key_sha256, signing_key, signing_key_sha256, enrolled, revoked"


@dataclass(frozen=True)
class SiteKeys:
    """One pair of keys that a site has or had; times are UTC in ISO form, `revoked` is None while the pair is valid."""

    name: str
    node_key: str
    node_key_sha256: str
    signing_key: str
    signing_key_sha256: str
    enrolled: str
    revoked: str | None


class Registry:
    """The sites of the consortium in `path`."""

    def __init__(self, path: Path) -> None:
        """Open the register; raises CredentialError when the file is missing."""
        if not path.is_file():
            raise CredentialError(f"{path}: the register of sites is missing; restore it from the backup")
        self._path = path

    @classmethod
    def create(cls, path: Path) -> Registry:
        """An empty register that only its owner can read (0600); raises CredentialError if there is one with sites."""
        if path.exists() and cls(path).sites():
            raise CredentialError(f"{path} holds the sites of another consortium; choose an empty folder")
        draft = path.with_name(f".{path.name}.unfinished")
        write_atomic(draft, b"")
        with closing(sqlite3.connect(draft)) as db:
            db.executescript(_TABLE)
        draft.replace(path)
        return cls(path)

    def sites(self) -> list[SiteKeys]:
        """Every pair of keys, in the order of enrolment."""
        with self._transaction() as db:
            return [SiteKeys(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM site ORDER BY rowid")]  # noqa: S608 - ours

    def enrol(self, request: EnrolmentRequest, replace: bool = False) -> None:
        """Enter the keys of a request; entering the same request twice changes nothing.

        With `replace` the keys that the site has now are revoked. Raises CredentialError when one of the keys is known
        already, or the name is known with other keys and `replace` is not set.
        """
        node, signing = request.node_key_sha256, request.signing_key_sha256
        with self._transaction() as db:
            for row in db.execute(
                f"SELECT {_COLUMNS} FROM site WHERE node_key_sha256 = ? OR signing_key_sha256 = ?",  # noqa: S608 - ours
                (node, signing),
            ).fetchall():
                known = SiteKeys(*row)
                if known.revoked:
                    raise CredentialError(
                        f"a key in this request was revoked on {known.revoked} (site '{known.name}'); "
                        "the site must make new keys"
                    )
                if (known.name, known.node_key_sha256, known.signing_key_sha256) == (request.site, node, signing):
                    return
                raise CredentialError(
                    f"a key in this request is that of site '{known.name}' already; the site must make keys of its own"
                )
            if not replace and db.execute("SELECT 1 FROM site WHERE name = ?", (request.site,)).fetchone():
                raise CredentialError(
                    f"site '{request.site}' is known with other keys; if it really made new ones, "
                    "give --replace: its old keys are revoked"
                )
            db.execute("UPDATE site SET revoked = ? WHERE name = ? AND revoked IS NULL", (_now(), request.site))
            db.execute(
                f"INSERT INTO site ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, NULL)",  # noqa: S608 - ours
                (request.site, request.node_key, node, request.signing_key, signing, _now()),
            )

    def revoke(self, name: str) -> None:
        """End the validity of a site's keys; raises CredentialError when it has no valid ones."""
        with self._transaction() as db:
            changed = db.execute("UPDATE site SET revoked = ? WHERE name = ? AND revoked IS NULL", (_now(), name))
            if changed.rowcount == 0:
                last = db.execute("SELECT max(revoked) FROM site WHERE name = ?", (name,)).fetchone()[0]
                raise CredentialError(
                    f"site '{name}' {f'was revoked on {last} already' if last else 'is not enrolled'}"
                )

    def valid(self, name: str) -> SiteKeys | None:
        """The valid pair of a site, None if it has none."""
        return next((site for site in self.sites() if site.name == name and site.revoked is None), None)

    def find(self, key: str) -> SiteKeys | None:
        """The pair that a public key (OpenSSH form or PEM) belongs to; raises CredentialError if it is not a key."""
        digest = key_digest(parse_public_key(key))
        with self._transaction() as db:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM site WHERE node_key_sha256 = ? OR signing_key_sha256 = ?",  # noqa: S608 - ours
                (digest, digest),
            ).fetchone()
        return SiteKeys(*row) if row else None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            # isolation_level None: we say BEGIN ourselves, so that reading and writing are one transaction.
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise CredentialError(f"{self._path}: can't use the register of sites: {error}") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
