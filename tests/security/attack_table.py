"""The table of attacks: who tries what, what refuses it, with which error, and the function that carries it out.

    python -m tests.security.attack_table

writes it into docs/attacks.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.security.attacks_on_coordinator import ON_COORDINATOR
from tests.security.attacks_on_site import ON_SITE

DOCS = Path(__file__).parents[2] / "docs" / "attacks.md"
BEGIN, END = "<!-- attack table: begin -->\n", "<!-- attack table: end -->\n"


def as_markdown() -> str:
    """The two tables as they are in the docs."""
    lines = []
    for title, who, attacks in (
        ("On a site", "who", ON_SITE),
        ("On the coordinator, by an enrolled site with its own key", "in", ON_COORDINATOR),
    ):
        lines += ["", f"### {title}", "", f"| attack | {who} | what is tried | refused by | error |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [_row(attack) for attack in attacks]
    return "\n".join(lines) + "\n\n"


def _row(attack: Any) -> str:
    return f"| {attack.name} | {attack.who} | {attack.tried} | {attack.refuses} | `{attack.error}` |"


def write() -> None:
    before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + as_markdown() + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    write()
