"""The threat model names tests that exist, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text("utf-8")


def test_every_test_that_it_names_exists():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 30
    assert named - there == set()


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
