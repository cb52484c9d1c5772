"""What both commands share: lines for people or JSON for programs, and errors as one line with an exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from invcoss_common.errors import InvcossError

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def tell(as_json: bool, values: dict[str, object], *lines: str) -> None:
    """Print `lines`, or with `as_json` the object `values`."""
    print(json.dumps(values) if as_json else "\n".join(lines), flush=True)


def service_says(as_json: bool) -> Callable[[str], None]:
    """What a service says as it runs goes to stderr, for people, or to stdout as JSON lines."""

    def say(text: str) -> None:
        if as_json:
            print(json.dumps({"time": time.time(), "text": text}), flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    return say


def run_command(app: typer.Typer) -> None:
    """Run a command line; an InvcossError ends it with one line on stderr and the error's exit code."""
    try:
        app()
    except InvcossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        sys.exit(130)
