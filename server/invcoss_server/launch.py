"""The pinned launcher of the coordinator: runs the relay for our own app bundle, and nothing for any other.

Flower's control API on loopback asks nobody who they are: without this, any account of the machine could have the
coordinator run the code of a bundle. One name that Flower does not declare public is wrapped; a test holds it against
each version of Flower that is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

from invcoss_common.bundle import check_bundle
from invcoss_common.supervise import LEAN

runtime = import_module("flwr.superlink.runtime.run_serverapp")  # its package has a function of the same name
_unpack: Callable[..., Path | None] = runtime.install_from_fab


def check_and_unpack(fab_content: bytes, *, skip_prompt: bool) -> Path | None:
    """Unpack a bundle that is ours; raises BundleRefused."""
    check_bundle(fab_content)
    return _unpack(fab_content, skip_prompt=skip_prompt)


def main() -> None:
    """Run one task of SuperExec, with the coordinator's umask."""
    os.umask(0o077)
    for name in LEAN:  # this process has it; the one that inverts must not
        os.environ.pop(name, None)
    setattr(runtime, "install_from_fab", check_and_unpack)  # noqa: B010 - mypy knows no such name of a module
    flwr_serverapp()


if __name__ == "__main__":
    main()
