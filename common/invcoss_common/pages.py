"""How every HTML page is made: whatever comes from outside is escaped, and a value that is missing is an error."""

from __future__ import annotations

import jinja2


def templates(package: str) -> jinja2.Environment:
    """The `*.html.j2` that lie in `package`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
