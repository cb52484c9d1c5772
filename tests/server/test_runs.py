"""The runs of a consortium as the operator's commands change them, and what they refuse."""

import json
import re
import sqlite3
from contextlib import closing

import pytest
from tests.server.consortium import alive, enrol, make_consortium, move_all, plan_of

from invcoss_common.errors import CredentialError, DataError, InvcossError, PlanError, SiteError
from invcoss_server.provision import revoke_site
from invcoss_server.runs import (
    Outcome,
    add_run,
    add_stages,
    in_the_way,
    names,
    open_run,
    raise_outcome,
    resume,
    skip_site,
    write_outcome,
)


@pytest.fixture
def folder(tmp_path):
    return make_consortium(tmp_path / "chest", "a", "b")


def test_a_plan_becomes_a_run_and_the_same_plan_again_is_that_run(folder):
    run = add_run(folder, plan_of("one", "a", "b"))
    assert (run.outcome(), run.is_alive(), run.is_done(), run.state.wanted()) == (None, False, False, "running")
    run.state.want("paused")
    write_outcome(run.folder, Outcome("DataError", "too few cases", "a"))
    again = add_run(folder, plan_of("one", "a", "b"))
    assert (again.folder, again.plan, again.state.wanted(), again.outcome()) == (run.folder, run.plan, "running", None)
    assert names(folder) == ["one"]
    with pytest.raises(PlanError, match=r"run 'one' is of another plan; .*if it only adds stages, use add-stage"):
        add_run(folder, plan_of("one", "a", "b", "a"))


def test_sites_must_be_enrolled(folder):
    with pytest.raises(CredentialError, match="site 'c' of this plan is not enrolled; enrol-site takes its request"):
        add_run(folder, plan_of("one", "a", "c"))
    assert names(folder) == []
    enrol(folder, "c")
    add_run(folder, plan_of("one", "a", "c"))
    revoke_site(folder, "c")
    with pytest.raises(CredentialError, match="site 'c' of this plan is not enrolled"):
        add_run(folder, plan_of("one", "a", "c"))


def test_open_run_names_those_that_there_are(tmp_path, folder):
    with pytest.raises(PlanError, match=re.escape("there is no run 'one' here; the runs are: none")):
        open_run(folder, "one")
    for name in ("one", "two"):
        add_run(folder, plan_of(name, "a"))
    with pytest.raises(PlanError, match="the runs are: one, two"):
        open_run(folder, "three")
    assert open_run(folder, "two").plan == plan_of("two", "a")
    with pytest.raises(CredentialError):
        open_run(tmp_path, "one")


def test_stages_are_added_to_a_finished_run_only(folder):
    with pytest.raises(PlanError, match="there is no run 'one' here"):
        add_stages(folder, plan_of("one", "a", "b"))
    run = add_run(folder, plan_of("one", "a"))
    with pytest.raises(PlanError, match="stage 1 of run 'one' is not done; stages are added to a finished run"):
        add_stages(folder, plan_of("one", "a", "b"))
    move_all(run, "released")
    write_outcome(run.folder, Outcome())
    resume(run)
    assert run.is_done()
    for plan, says in (
        (plan_of("one", "a"), "must begin with the 1 stages that are done, and add some"),
        (plan_of("one", "b", "a"), "must begin with the 1 stages that are done"),
        (plan_of("one", "a", "b", seed=4), "besides further stages and modalities"),
    ):
        with pytest.raises(PlanError, match=says):
            add_stages(folder, plan)
    with pytest.raises(CredentialError, match="site 'c' of this plan is not enrolled"):
        add_stages(folder, plan_of("one", "a", "c"))
    run.state.want("paused")
    longer = add_stages(folder, plan_of("one", "a", "b"))
    assert (longer.is_done(), longer.state.wanted()) == (False, "running")
    assert open_run(folder, "one").plan == plan_of("one", "a", "b")


def test_resume_takes_the_outcome_of_what_ended_but_not_of_what_runs(folder):
    run = add_run(folder, plan_of("one", "a"))
    run.state.want("stopped")
    write_outcome(run.folder, Outcome("RunHalted", "stopped"))
    with alive(run):
        resume(run)
        assert run.state.wanted() == "running"
        assert run.outcome() == Outcome("RunHalted", "stopped")
    resume(run)
    assert run.outcome() is None


def test_a_site_is_skipped(folder):
    run = add_run(folder, plan_of("one", "a", "b"))
    with pytest.raises(PlanError, match="run 'one' has no stage at site 'c'; its sites: a, b"):
        skip_site(run, "c")
    failed = Outcome("SiteError", "site 'b' failed", "b")
    write_outcome(run.folder, failed)
    run.state.want("paused")
    skip_site(run, "b")
    assert run.sites() == {"a"}
    assert (run.state.wanted(), run.outcome()) == ("paused", failed)  # a paused run stays so
    run.state.want("running")
    skip_site(run, "b")
    assert run.outcome() is None


def test_who_is_in_the_way(folder):
    enrol(folder, "c")
    one, two = (add_run(folder, plan_of(name, *sites)) for name, sites in (("one", "ab"), ("two", "bc")))
    assert in_the_way(folder, two) == ""
    with alive(one):
        assert in_the_way(folder, two) == "one"
        assert in_the_way(folder, one) == ""
        assert in_the_way(folder, add_run(folder, plan_of("three", "c"))) == ""
        two.state.skip("b")
        assert in_the_way(folder, two) == ""


@pytest.mark.parametrize(
    ("outcome", "kind", "says"),
    [
        (Outcome("DataError", "too few cases"), DataError, "^too few cases$"),
        (Outcome("SiteUnreachable", "no answer", "a"), SiteError, "^no answer$"),
        (Outcome("KeyError"), InvcossError, r"the coordinator failed with KeyError; see x\.jsonl"),
    ],
)
def test_the_error_of_an_outcome(tmp_path, outcome, kind, says):
    with pytest.raises(kind, match=says):
        raise_outcome(outcome, tmp_path.joinpath("x.jsonl").relative_to(tmp_path))


def test_a_run_of_older_software_whose_plan_lacked_a_field_can_still_be_opened(folder):
    run = add_run(folder, plan_of("one", "a", "b"))
    with closing(sqlite3.connect(run.folder / "state.db")) as db, db:
        plan = json.loads(db.execute("SELECT plan FROM run").fetchone()[0])
        del plan["relay"]["skip_absent_s"], plan["relay"]["compress"]
        db.execute("UPDATE run SET plan = ?, plan_digest = ?", (json.dumps(plan), "0" * 64))
    assert open_run(folder, "one").plan == run.plan
