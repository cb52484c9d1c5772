"""What a site's service says of programs that ended, above all of a SuperNode that the coordinator does not let in."""

import pytest

from invcoss_site import service
from invcoss_site.home import write_home
from invcoss_site.service import _Ends, refusal

FLOWER = "Failed to activate SuperNode."
GATE = "this key of site 'north' is revoked since 2026-11-20; the site must make new keys"
START = "INFO :      Starting Flower SuperNode"


def log(text):
    return f"""{START}
INFO:     Uvicorn running on http://127.0.0.1:47143 (Press CTRL+C to quit)
ERROR :     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] {text}
The SuperNode could not establish a connection to the SuperLink.
INFO:     Application shutdown complete.
"""


def test_why_a_site_is_not_let_in():
    assert refusal(log(FLOWER)).startswith("the coordinator does not let this site in yet, ")
    assert refusal(log(GATE)) == f"the coordinator does not let this site in: {GATE}"
    assert refusal(log(GATE) + log(FLOWER)) == refusal(log(FLOWER))
    assert refusal(log(FLOWER) + f"{START}\nKilled\n") == ""
    assert refusal("") == ""


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """`ended(program, log, seconds later)` gives what is said of it."""
    now, said = [1000.0], []
    monkeypatch.setattr(service.time, "monotonic", lambda: now[0])
    home = write_home(tmp_path / "north", "north", tmp_path)
    home.log.mkdir()
    ends = _Ends(home, said.append)

    def end(name, text, seconds=5.0):
        now[0] += seconds
        said.clear()
        (home.log / f"{name}.log").write_text(text)
        ends(name, 1, text.splitlines()[-1])
        return tuple(said)

    return end


def test_a_refusal_is_said_in_one_line_and_not_at_every_try(ended):
    (line,) = ended("supernode", log(FLOWER))
    assert line.startswith("site north: the coordinator does not let this site in yet, ")
    assert line.endswith("; it tries again, and invcoss-site doctor says how it stands")
    assert ended("supernode", log(FLOWER)) == ()
    (line,) = ended("supernode", log(GATE))
    assert GATE in line
    assert ended("supernode", log(GATE)) == ()
    assert ended("supernode", log(GATE), service.TELL_AGAIN_S) == (line,)


def test_any_other_end_is_said_each_time_with_the_end_of_the_log(ended):
    assert ended("supernode", log(FLOWER)) != ()
    for _ in range(2):
        head, end = ended("agent", "Traceback\nMemoryError\n")
        assert head.startswith("site north: agent ended with status 1 and is started again; ")
        assert end == "  MemoryError"
