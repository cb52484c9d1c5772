"""The pinned launcher: what a site runs in place of Flower's `flwr-clientapp`.

Flower's SuperExec finds the program for a task through PATH, and that program would unpack the coordinator's app bundle
and run the code in it. A site's `start` puts this first in PATH: the bundle is only looked at, the installed wheel
answers, and every other kind of task is refused. What goes wrong around the app is not told to the coordinator. Three
names that Flower does not declare public are replaced; a test holds them against each version that is allowed.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable

import flwr.supernode.runtime.run_clientapp as runtime
from flwr.app import Error
from flwr.clientapp import ClientApp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from invcoss_common.bundle import check_bundle

BUNDLE_REFUSED = re.compile(r"<class '[a-z_.]*BundleRefused'>:<'the app bundle [a-z0-9 ,;']{1,160}'>")
APP_FAILED = "the site's software could not run; the site's own log says why"


def check_only(fab_content: bytes, **_: object) -> None:
    """In place of unpacking a bundle; raises BundleRefused, whose text goes to the coordinator."""
    check_bundle(fab_content)


def load_installed(**_: object) -> Callable[[str, str, str], ClientApp]:
    """In place of loading the bundle's code."""

    def load(fab_id: str, fab_version: str, fab_hash: str) -> ClientApp:
        try:
            from invcoss_site.app import app
        except Exception:
            traceback.print_exc()
            raise RuntimeError("the site's software can't be loaded") from None  # Flower would send the error's text
        return app

    return load


def plain_error(code: int, reason: str | None = None) -> Error:
    """In place of Flower's Error, which would carry the text of any exception to the coordinator.

    That of a refused bundle is about the bundle alone, and stays.
    """
    return Error(code, reason if BUNDLE_REFUSED.fullmatch(reason or "") else APP_FAILED)


REPLACED = {  # names in `runtime`
    "install_from_fab": check_only,
    "get_load_client_app_fn": load_installed,
    "Error": plain_error,
}


def missing_names() -> list[str]:
    """Which of the names that are replaced this Flower does not have; none, or the site must not run."""
    return [name for name in REPLACED if not callable(getattr(runtime, name, None))]


def main() -> None:
    """Run one task of SuperExec, with the site's umask."""
    os.umask(0o077)
    for name, ours in REPLACED.items():
        setattr(runtime, name, ours)
    flwr_clientapp()


if __name__ == "__main__":
    main()
