"""A site's own folder: where its images are, and the spool, cache and log of this software."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import write_atomic
from invcoss_common.config import Name
from invcoss_common.errors import DataError


class _SiteFile(BaseModel):
    """`site.toml`. `data` is absolute or relative to the site's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    data: str
    index: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteHome:
    """One site's folder. `index` names CSV files in `data`, as the plan's [simulation] or the site wrote them."""

    name: str
    root: Path
    data: Path
    index: tuple[str, ...] = ()

    @property
    def spool(self) -> Path:
        """Hand-offs, their state and artefacts: all that the network-facing side of a site reads and writes."""
        return self.root / "spool"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def log(self) -> Path:
        """Full tracebacks; nothing in here ever leaves the site."""
        return self.root / "log"

    @property
    def artefacts(self) -> ArtefactStore:
        """What the site received and what it offers."""
        return ArtefactStore(self.spool / "artefacts")

    def hop_folder(self, hop: str) -> Path:
        """Where one hop is worked on: its hand-off, status, report and checkpoints; emptied for another hand-off."""
        return self.spool / hop


def write_home(root: Path, name: str, data: Path, index: tuple[str, ...] = ()) -> SiteHome:
    """Write `site.toml` under `root`; a JSON string is a TOML string too."""
    values = {"name": name, "data": str(data), "index": list(index)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    write_atomic(root / "site.toml", "".join(lines).encode())
    return load_home(root)


def load_home(root: Path) -> SiteHome:
    """Read `site.toml` under `root`; raises DataError that names the file and the field."""
    path = root / "site.toml"
    try:
        values = _SiteFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: can't read the site's settings ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TOML file: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return SiteHome(values.name, root.resolve(), (root / values.data).resolve(), values.index)
