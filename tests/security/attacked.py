"""Two sides for the attacks of attack_table.py, joined with real keys: a site, and a coordinator's run in three phases.

One run of two stages at one site is broken off where the coordinator asks how a training, an audit and an evaluation
stand, all three being done at the site; what both sides then have is copied for each attack.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from flwr.app import RecordDict
from tests.federation.loopback import StartWork, site_of_today, work_here
from tests.federation.plans import tiny_plan
from tests.federation.test_signatures import SignedCourier

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_file, sha256_hex, write_atomic
from invcoss_common.chain import Record, records
from invcoss_common.errors import ProtocolError
from invcoss_common.keys import load_signing_key, sign
from invcoss_common.phantoms import write_phantoms
from invcoss_common.records import (
    HANDOFF,
    REPORT,
    Artefact,
    HandOff,
    Pool,
    Report,
    Request,
    Response,
    Status,
    from_bytes,
    to_bytes,
)
from invcoss_common.wire import decode_request, decode_response, encode_request, encode_response
from invcoss_server.courier import checked, site_error
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.relay import relay
from invcoss_server.signatures import Signatures, load_signatures
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site.enrol import init_site, join
from invcoss_site.home import SiteHome, load_home, write_home
from invcoss_site.policy import POLICY
from invcoss_site.simulated import SMALL
from invcoss_site.visit import visit

SITE = "north"
PLAN = tiny_plan(
    stages=[{"site": SITE, "modality": "xray"}] * 2,
    simulation={},
    relay={"poll_s": 0.01, "part_mib": 1, "stall_timeout_s": 20.0},
)
PHASES = {"train": "s00-train", "audit": "s00-audit", "evaluate": "s01-eval-00"}
BY_THE_WORKER = {"handoff.json", "handoff.signature", "attempt", "status.json", "lock", "began"}  # of a hop that failed
Change = Callable[["Hostile", Request, Response], Response]


class BrokenOff(BaseException):
    """Stands for the end of the coordinator's process."""


class BreaksOff(SignedCourier):
    """A courier that breaks off where the status of `hop` is asked for."""

    hop = ""

    def call(self, site: str, request: Request) -> Response:
        if request.verb == "status" and request.fields["hop"] == self.hop:
            raise BrokenOff
        return super().call(site, request)


def make_worlds(folder: Path) -> Path:
    """Everything that the attacks start from, under `folder`: the consortium, and of each phase both sides."""
    init_consortium(folder / "chest", "chest", ("localhost",), 9443)
    write_phantoms(folder / "images", "xray", 12, 0)
    write_home(folder / SITE, SITE, folder / "images", ("labels.csv",))
    request = init_site(folder / SITE, SITE, folder / "images")
    join(folder / SITE, enrol_site(folder / "chest", request.to_bytes()).to_bytes())
    write_atomic(folder / SITE / POLICY, SMALL)
    courier = BreaksOff({SITE: load_home(folder / SITE)}, load_signatures(folder / "chest"))
    courier.start_work = work_here(visit)
    for phase, courier.hop in PHASES.items():
        try:
            relay(PLAN, courier, folder / "run", synthesise_here)
        except BrokenOff:
            shutil.copytree(folder / SITE, folder / phase / SITE)
            shutil.copytree(folder / "run", folder / phase / "run")
    return folder


class AttackedSite:
    """A site that did its training, audit and evaluation, asked by whoever has, or has not, the coordinator's key."""

    def __init__(self, worlds: Path, folder: Path) -> None:
        self.home = load_home(shutil.copytree(worlds / "evaluate" / SITE, folder / SITE))
        self.store = ArtefactStore(worlds / "evaluate" / "run" / "artefacts")
        self.state = RunState(worlds / "evaluate" / "run" / "state.db", PLAN)
        self.sequence = self.state.last_sequence() + 1
        self.key = load_signatures(worlds / "chest").key
        self.start_work: StartWork = work_here(visit)
        self.brought: dict[str, bytes] = {}  # what the attacker has made, by digest
        self.own: set[str] = set()  # files that the test itself wrote
        self.answer = Response()  # the last
        self.said = ""  # in what was refused before it came to the desk
        self.before = self.snapshot()
        self.first_new = len(self.journal())

    def write(self, name: str, text: str) -> None:
        """As the site's own people do."""
        write_atomic(self.home.root / name, text.encode())
        self.own.add(name)

    def policy(self, text: str) -> None:
        self.write(POLICY, text)

    def bring(self, data: bytes) -> Artefact:
        """An artefact of the attacker's."""
        self.brought[sha256_hex(data)] = data
        return Artefact(sha256=sha256_hex(data), size_bytes=len(data))

    def content(self, artefact: Artefact) -> bytes:
        return self.brought.get(artefact.sha256) or self.store.path(artefact).read_bytes()

    def hand_off(
        self, kind: str = "train", task: Mapping[str, object] | None = None, hop: str = "", **changes: object
    ) -> HandOff:
        """The newest hand-off of the run, by its number; what is asked for differs from an honest one by `changes`."""
        known = self.state.hand_off(PHASES[kind])
        assert known is not None
        values = {
            "hop": hop or {"train": "s02-train", "audit": "s00-audit", "evaluate": "s03-eval-00"}[kind],
            "sequence": self.sequence,
            "task": known.task.model_copy(update=dict(task or {})),
        }
        return known.model_copy(update=values | changes)

    def with_model(self, data: bytes) -> HandOff:
        return self.hand_off("evaluate", model=self.bring(data))

    def with_pool(self, data: bytes, kind: str = "train") -> HandOff:
        known = self.state.hand_off("s00-audit")
        assert known is not None
        pool: Pool = known.pools[0].model_copy(update={"artefact": self.bring(data)})
        return self.hand_off(kind, pools=(pool,))

    def sign(self, content: bytes) -> str:
        return sign(self.key, HANDOFF, content)

    def ask(self, verb: str, blob: bytes = b"", protocol: int = 2, **fields: str | int) -> Response:
        """The answer to a request; raises SiteError when it is refused."""
        return self.send(encode_request(Request(verb, dict(fields), blob, protocol)))  # type: ignore[arg-type]

    def send(self, record: RecordDict) -> Response:
        """The answer to any message; raises SiteError when it is refused."""
        request = Request("hello")
        try:
            request = decode_request(record)
        except ProtocolError as error:
            self.said += str(error)
        self.answer = decode_response(site_of_today(record, self.home, self.start_work), request)
        return checked(SITE, self.answer)

    def put(self, artefact: Artefact, part: bytes, offset: int = 0, encoding: str = "") -> None:
        self.ask("put", part, sha256=artefact.sha256, size=artefact.size_bytes, offset=offset, encoding=encoding)

    def deliver(self, handoff: HandOff) -> None:
        for artefact in handoff.artefacts:
            self.put(artefact, self.content(artefact))

    def start(self, handoff: HandOff | bytes, signature: str | None = None, protocol: int = 2) -> None:
        """Deliver a hand-off with its artefacts, and see what becomes of it; raises SiteError."""
        content = handoff
        if isinstance(handoff, HandOff):
            self.deliver(handoff)
            content = to_bytes(handoff)
        assert isinstance(content, bytes)
        fields: dict[str, str | int] = {"handoff": content.decode("utf-8", "replace"), "attempt": 1}
        if protocol == 2:
            fields["signature"] = self.sign(content) if signature is None else signature
        self.ask("start", protocol=protocol, **fields)
        told = self.ask("status", hop=json.loads(content)["hop"])
        status = from_bytes(Status, str(told.fields["status"]).encode())
        if status.state == "failed":
            raise site_error(SITE, status.error)

    def snapshot(self) -> dict[str, str]:
        """Every file of the site's folder by its digest, but the images it has cached, its logs, and the journal."""
        root = self.home.root
        files = {str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file()}
        kept = {name for name in files if not name.startswith(("cache/", "log/", "."))} - {"journal.jsonl"}
        return {name: sha256_file(files[name]) for name in kept}

    def changed(self, by_worker: bool) -> set[str]:
        """Files that were made, altered or removed, besides what the attacker may leave: artefacts of his own, whole.

        `by_worker`: the hop was taken, and has failed. Its hand-off, number and status are there, and its artefacts in
        place of earlier ones.
        """
        after = self.snapshot()
        found = {name for name in self.before.keys() | after.keys() if self.before.get(name) != after.get(name)}
        delivered = {*self.brought, *(path.name for path in self.store.folder.iterdir())}
        allowed = self.own | {f"spool/artefacts/{digest}" for digest in delivered}
        if by_worker:
            allowed |= self.before.keys() - after.keys() | {"spool/sequence.json"}
            allowed |= {name for name in found if name.rpartition("/")[2] in BY_THE_WORKER}
        return found - allowed

    def journal(self) -> list[Record]:
        return list(records(self.home.root / "journal.jsonl"))

    def recorded(self) -> list[Record]:
        """What came to the journal."""
        return self.journal()[self.first_new :]

    def told(self) -> str:
        """All that the site has said of it, to itself only."""
        logs = [self.home.log / name for name in ("desk.log", "visit.log")]
        return self.said + "".join(log.read_text("utf-8") for log in logs if log.exists())


class Hostile:
    """An enrolled site with its own key that answers what it likes; `files` are what it serves, by digest."""

    def __init__(self, home: SiteHome, change: Change) -> None:
        self.home, self.change = home, change
        self.key = load_signing_key(home.root / "keys" / "signing.pem")
        self.files: dict[str, bytes] = {}

    def __call__(self, record: RecordDict, home: SiteHome, start_work: StartWork) -> RecordDict:
        request = decode_request(record)
        digest = str(request.fields.get("sha256", ""))
        if request.verb == "get" and digest in self.files:
            offset, length = int(request.fields["offset"]), int(request.fields["length"])
            honest = Response({"encoding": ""}, self.files[digest][offset : offset + length])
        else:
            honest = decode_response(site_of_today(record, home, start_work), request)
        return encode_response(self.change(self, request, honest))

    def serve(self, data: bytes) -> Artefact:
        self.files[sha256_hex(data)] = data
        return Artefact(sha256=sha256_hex(data), size_bytes=len(data))

    def own(self, artefact: Artefact) -> bytes:
        """A file that it made honestly."""
        return self.home.artefacts.path(artefact).read_bytes()

    def signed(self, response: Response, content: bytes) -> Response:
        """The answer with this as its report, signed."""
        return Response(
            {**response.fields, "report": content.decode(), "signature": sign(self.key, REPORT, content)}, response.blob
        )


class AttackedCoordinator:
    """A run that a relay goes on with, its site being hostile from now on."""

    def __init__(self, worlds: Path, folder: Path, phase: str) -> None:
        self.out = shutil.copytree(worlds / phase / "run", folder / "run")
        self.home = load_home(shutil.copytree(worlds / phase / SITE, folder / SITE))
        self.signatures: Signatures = load_signatures(worlds / "chest")
        self.before = self.snapshot()
        self.first_new = len(list(records(self.out / "ledger.jsonl")))

    def go_on(self, change: Change) -> None:
        courier = SignedCourier({SITE: self.home}, self.signatures)
        courier.start_work = work_here(visit)
        courier.others = {SITE: Hostile(self.home, change)}
        relay(PLAN, courier, self.out, synthesise_here)

    def snapshot(self) -> dict[str, object]:
        """Rows of the state but that of the stage that fails, artefacts, and what is published."""
        found: dict[str, object] = {}
        with closing(sqlite3.connect(self.out / "state.db")) as db:
            for table in ("run", "hop", "audit", "hand_off", "wanted", "skipped"):
                found[table] = db.execute(f"SELECT * FROM {table}").fetchall()
            found["stage"] = db.execute("SELECT stage, model, statistics, pool FROM stage").fetchall()
        for file in self.out.rglob("*"):
            name = str(file.relative_to(self.out))
            if file.is_file() and name.startswith(("artefacts/", "models/", "pools/", "inversion/", "model.")):
                found[name] = sha256_file(file)
        return found

    def entered(self) -> list[Record]:
        """What came to the ledger."""
        return list(records(self.out / "ledger.jsonl"))[self.first_new :]


def report_in(response: Response) -> Report:
    return from_bytes(Report, str(response.fields["report"]).encode())
