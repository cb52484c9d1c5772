"""A consortium without processes for the tests of its service and runs: enrolled sites, runs, a relay that is alive."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tests.federation.plans import tiny_plan

from invcoss_common.config import Plan, parse_plan
from invcoss_common.enrolment import sign_request
from invcoss_common.keys import generate_ec_key, generate_signing_key, public_text
from invcoss_common.supervise import alone
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.runs import LOCK, Run
from invcoss_server.state import StageState


def make_consortium(folder: Path, *names: str) -> Path:
    """A consortium in `folder` with these sites enrolled."""
    init_consortium(folder, "chest", ("localhost",))
    for name in names:
        enrol(folder, name)
    return folder


def enrol(folder: Path, name: str) -> None:
    request = sign_request(name, public_text(generate_ec_key().public_key()), generate_signing_key())
    enrol_site(folder, request.to_bytes())


def plan_of(name: str, *sites: str, **changes: object) -> Plan:
    """A plan `name` with one X-ray stage at each site."""
    stages = [{"site": site, "modality": "xray"} for site in sites]
    values = {**tiny_plan(simulation={}).model_dump(exclude={"modalities"}), "name": name, "stages": stages}
    return parse_plan({**values, **changes}, name)


def alive(run: Run) -> AbstractContextManager[None]:
    """While it lasts, a relay of `run` seems to be alive."""
    return alone(run.folder / LOCK, "two relays")


def move_all(run: Run, state: StageState) -> None:
    for number in range(len(run.plan.stages)):
        run.state.move(number, state)
