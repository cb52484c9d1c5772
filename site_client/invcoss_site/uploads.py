"""The site's upload budget: how many bytes of artefacts left it in the last days, in ROOT/uploads.json.

Counted is what really leaves, so a part that is asked for again counts again. The file is kept apart from the spool,
which may be emptied; without a budget it is kept too, so that one set later knows of what went before.
"""

from __future__ import annotations

import fcntl
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import UploadSpent
from invcoss_site.home import SiteHome
from invcoss_site.policy import Egress

UPLOADS = "uploads.json"
DAYS = 30


def check_upload(home: SiteHome, egress: Egress, more_bytes: int) -> None:
    """Raise UploadSpent when `more_bytes` would be more than the site's policy lets leave in 30 days."""
    if egress.max_upload_gb is None:
        return
    sent = sum(_sent(home).values())
    if sent + more_bytes > egress.max_upload_gb * 1e9:
        raise UploadSpent(
            f"{more_bytes} bytes of artefacts after {sent} in the last {DAYS} days are more than "
            f"{egress.max_upload_gb:g} GB (egress.max_upload_gb in policy.toml)"
        )


def count_upload(home: SiteHome, egress: Egress, wire_bytes: int) -> None:
    """Note that `wire_bytes` leave now; raises UploadSpent, and notes nothing, when they must not."""
    with (home.root / "uploads.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two messages may be answered at once
        check_upload(home, egress, wire_bytes)
        sent, day = _sent(home), _today().isoformat()
        write_atomic(_file(home), json.dumps(sent | {day: sent.get(day, 0) + wire_bytes}).encode())


def _sent(home: SiteHome) -> dict[str, int]:
    """Bytes by day (UTC), today and the 30 days before, which hold any 30 times 24 hours up to now."""
    file = _file(home)
    days: dict[str, int] = json.loads(file.read_bytes()) if file.exists() else {}
    first = (_today() - timedelta(days=DAYS)).isoformat()
    return {day: sent for day, sent in days.items() if day >= first}


def _today() -> date:
    return datetime.now(UTC).date()


def _file(home: SiteHome) -> Path:
    return home.root / UPLOADS
