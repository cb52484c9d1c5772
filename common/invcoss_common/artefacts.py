"""A content-addressed folder of artefacts: every file is named by its sha256, written atomically, filled part by part.

Both sides use it: the coordinator for models, statistics and pools, a site for what it received and what it offers.
"""

from __future__ import annotations

import os
from pathlib import Path

from invcoss_common.canonical import rename, sha256_file, sha256_hex, write_atomic
from invcoss_common.errors import ProtocolError
from invcoss_common.records import Artefact


class ArtefactStore:
    """Artefacts under one folder. Incomplete uploads lie beside them as `<sha256>.part` and can be continued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> Artefact:
        """Store `data`; storing the same bytes twice is harmless."""
        artefact = Artefact(sha256=sha256_hex(data), size_bytes=len(data))
        if not self.has(artefact):
            write_atomic(self.path(artefact), data)
        return artefact

    def adopt(self, path: Path) -> Artefact:
        """Move the finished file `path`, of the same file system, into the store: for what is large."""
        artefact = Artefact(sha256=sha256_file(path), size_bytes=path.stat().st_size)
        rename(path, self.path(artefact))
        return artefact

    def path(self, artefact: Artefact) -> Path:
        return self.folder / artefact.sha256

    def has(self, artefact: Artefact) -> bool:
        path = self.path(artefact)
        return path.is_file() and path.stat().st_size == artefact.size_bytes

    def received_bytes(self, artefact: Artefact) -> int:
        """How much of an artefact is here: where an interrupted transfer goes on."""
        if self.has(artefact):
            return artefact.size_bytes
        part = self._part(artefact)
        return part.stat().st_size if part.is_file() else 0

    def append(self, artefact: Artefact, offset: int, data: bytes) -> int:
        """Add one part at `offset` and return the bytes now held; the last part is checked against the digest.

        A part that is already here is ignored. Raises ProtocolError on a gap, an overrun or a wrong digest; after a
        wrong digest the upload starts from zero.
        """
        held = self.received_bytes(artefact)
        if held == artefact.size_bytes or 0 <= offset <= held - len(data):
            return held
        if offset != held or held + len(data) > artefact.size_bytes or not data:
            raise ProtocolError(f"part at {offset} of {len(data)} bytes does not continue an upload at {held} bytes")
        part = self._part(artefact)
        with part.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        held += len(data)
        if held == artefact.size_bytes:
            if sha256_file(part) != artefact.sha256:
                part.unlink()
                raise ProtocolError("artefact does not have the announced sha256; transfer it again")
            part.replace(self.path(artefact))
        return held

    def read(self, artefact: Artefact, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; raises ProtocolError when the artefact is not here."""
        if not self.has(artefact):
            raise ProtocolError("artefact is not here")
        with self.path(artefact).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def keep_only(self, artefacts: set[str]) -> None:
        """Remove every file whose digest is not in `artefacts`, partial uploads included."""
        for path in self.folder.iterdir():
            if path.name.removesuffix(".part") not in artefacts:
                path.unlink()

    def _part(self, artefact: Artefact) -> Path:
        return self.folder / f"{artefact.sha256}.part"
