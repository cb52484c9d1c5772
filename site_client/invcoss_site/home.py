"""A site's own folder: where its images are, and the spool, cache and log of this software."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import one_line, write_atomic
from invcoss_common.config import Name, read_toml
from invcoss_common.errors import DataError


def _some_time(hours: str) -> str:
    if hours[:5] == hours[6:]:
        raise ValueError("begins and ends at the same minute; leave hours out if any time will do")
    return hours


Hours = Annotated[
    str,
    Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$"),
    AfterValidator(_some_time),
]  # of the day, from-to in the site's local time, which may run past midnight


class Transfer(BaseModel):
    """The site's own limits on artefacts that cross, both ways together; messages without a part always pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_mbit_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="average bandwidth")
    hours: Hours | None = Field(
        default=None, description='from-to in the site\'s local time, such as "20:00-06:00"; unset: all day'
    )


class _SiteFile(BaseModel):
    """`site.toml`. `data` is absolute or relative to the site's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    data: str
    index: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    layout: str = ""
    transfer: Transfer = Transfer()
    processes: Annotated[int, Field(ge=1, le=64, strict=True)] | None = None
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class SiteHome:
    """One site's folder. `index` names CSV files in `data`, as the plan's [simulation] or the site wrote them.

    `processes` train together; None is one a GPU. `only` are patterns that a file's name or path in `data` must match.
    `layout` names that of a published set, if the images are one.
    `cache_gb` (10^9 bytes) is what prepared images may take; None is all but the last of the disk.
    """

    name: str
    root: Path
    data: Path
    index: tuple[str, ...] = ()
    transfer: Transfer = field(default_factory=Transfer)
    processes: int | None = None
    only: tuple[str, ...] = ()
    cache_gb: float | None = None
    layout: str = ""

    @property
    def spool(self) -> Path:
        """Hand-offs, their state and artefacts: all that the network-facing side of a site reads and writes."""
        return self.root / "spool"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def secrets(self, hop: str) -> Path:
        """What differential privacy keeps of a hop until it is done: where the network-facing side can't read."""
        return self.cache / "dp" / hop

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
        values = _SiteFile.model_validate(read_toml(path, "the site's settings", DataError))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(one_line(f"{path}: {field[:100]}: {first['msg'][:300]}", most=1000)) from None
    data = (root / values.data).resolve()
    return SiteHome(
        values.name,
        root.resolve(),
        data,
        values.index,
        values.transfer,
        values.processes,
        values.only,
        values.cache_gb,
        values.layout,
    )
