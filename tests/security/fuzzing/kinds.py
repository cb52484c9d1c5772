"""Every kind of object that a side receives from another or reads from its disk."""

from __future__ import annotations

from pathlib import Path

from tests.security.fuzzing import files, messages
from tests.security.fuzzing.sides import Kind, joined_site


def kinds(root: Path) -> dict[str, Kind]:
    """Every kind by name, received by two sides that have their files under the empty folder `root`."""
    return {
        **messages.signed_records(root, joined_site(root / "north")),
        "status": messages.statuses(),
        **messages.messages(root),
        **files.enrolment_files(root),
        **files.tensor_files(root),
        "part": files.parts(root),
        **files.chains(root),
        "plan": files.plan_file(root),
        **files.site_settings(root),
        "bundle": files.app_bundle(),
    }
