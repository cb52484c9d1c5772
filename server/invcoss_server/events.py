"""The running commentary of a relay: one JSON object a line, appended for whoever watches."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Events:
    """Appends to the file `path`, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:  # the writer before us was killed within a line
                file.write(b"\n")

    def add(self, event: str, **values: object) -> None:
        """Add one event with the time (seconds since 1970) and its values."""
        line = json.dumps({"time": time.time(), "event": event, **values}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def waiting(event: dict[str, Any]) -> str:
    """What the hop of a `status` event waits for at its site, in words; "" if it does not wait."""
    what = {"approval": "approval at the site", "hours": "the hours in which the site works"}.get(event["phase"])
    return f"{event['hop']} at {event['site']} waits for {what}" if what and event["state"] == "queued" else ""


class Tail:
    """The events that are added to a file from now on, or all with `from_start`, each once its line is complete."""

    def __init__(self, path: Path, from_start: bool = False) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() and not from_start else 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            complete = file.read().rpartition(b"\n")[0]
        self.position += len(complete) + 1 if complete else 0
        events = []
        for line in complete.splitlines():
            with suppress(json.JSONDecodeError):  # half a line of a relay that was killed
                events.append(json.loads(line))
        return events
