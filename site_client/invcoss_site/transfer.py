"""When artefacts may cross, and how much of them on average: the site's `[transfer]`, kept across restarts.

After each part the door stays shut for as long as the part takes at `max_mbit_s`. A part itself crosses as fast as the
line allows; the average over parts keeps the limit.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import TransferClosed
from invcoss_site.home import SiteHome


class _Shut(BaseModel):
    """`spool/transfer.json`: from when until when nothing crosses, seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    since: float = 0.0
    until: float = 0.0


def check_open(home: SiteHome) -> None:
    """Raise TransferClosed outside the site's hours, and while earlier parts have not yet had their time."""
    hours, now = home.transfer.hours, time.time()
    if hours and not within(hours, time.strftime("%H:%M", time.localtime(now))):
        raise TransferClosed(f"artefacts may cross at {hours} only ([transfer] in site.toml)", home.name)
    if home.transfer.max_mbit_s:
        shut = _shut(home)
        if shut.since <= now < shut.until:  # not so when the clock was put back: nobody waits for its old time
            raise TransferClosed("earlier parts used up max_mbit_s ([transfer] in site.toml)", home.name)


def is_open(home: SiteHome) -> bool:
    """Whether a part may cross now."""
    try:
        check_open(home)
    except TransferClosed:
        return False
    return True


def count(home: SiteHome, wire_bytes: int) -> None:
    """Note that `wire_bytes` cross now."""
    if not home.transfer.max_mbit_s:
        return
    home.spool.mkdir(parents=True, exist_ok=True)
    with (home.spool / "transfer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two messages may be answered at once
        shut, now = _shut(home), time.time()
        begins = shut.until if shut.since <= now < shut.until else now
        until = begins + wire_bytes * 8 / (home.transfer.max_mbit_s * 1e6)
        write_atomic(_file(home), _Shut(since=now, until=until).model_dump_json().encode())


def within(hours: str, clock: str) -> bool:
    """Whether `clock` ("HH:MM") lies in `hours` ("HH:MM-HH:MM", the end excluded), which may run past midnight."""
    begin, end = hours.split("-")
    return begin <= clock < end if begin < end else clock >= begin or clock < end


def _shut(home: SiteHome) -> _Shut:
    file = _file(home)
    return _Shut.model_validate_json(file.read_bytes()) if file.exists() else _Shut()


def _file(home: SiteHome) -> Path:
    return home.spool / "transfer.json"
