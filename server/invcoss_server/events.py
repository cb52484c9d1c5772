"""The running commentary of a relay: one JSON object a line, appended for whoever watches; nothing is read back."""

from __future__ import annotations

import json
import time
from pathlib import Path


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
