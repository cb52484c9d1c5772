"""The container's health: whether every process of the service that it was started for runs.

What that service is, is read from process 1, which is the service or a small init with the service's command line. Not
being connected to the coordinator is no illness: a site waits.
"""

import json
import sys
from pathlib import Path

PROGRAMS = {
    "service": {"superlink", "superexec", "gate"},
    "agent": {"agent"},
    "network": {"supernode", "superexec"},
    "all": {"agent", "supernode", "superexec"},
}


def missing(command: list[str], proc: Path = Path("/proc")) -> set[str]:
    """Programs of the service with this command line that do not run; none if it is another command."""
    if "start" not in command:
        return set()
    folder = Path(command[command.index("start") + 1])
    serves_site = any(Path(word).name == "invcoss-site" for word in command)
    part = command[command.index("--part") + 1] if "--part" in command else "all"
    part = part if serves_site else "service"
    try:
        running: dict[str, int] = json.loads((folder / f"{part}.pids").read_bytes())
    except (OSError, ValueError):
        return PROGRAMS[part]
    return {name for name in PROGRAMS[part] if name not in running or not (proc / str(running[name])).exists()}


if __name__ == "__main__":
    ill = missing(Path("/proc/1/cmdline").read_text().split("\0"))
    sys.exit(f"not running: {', '.join(sorted(ill))}" if ill else 0)
