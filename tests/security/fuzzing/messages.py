"""What crosses the network: hand-offs, reports, statuses and messages, with the functions that receive them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as FlowerRecord
from tests.federation.loopback import work_here
from tests.security.fuzzing import containers, forgeries, mutations
from tests.security.fuzzing.sides import (
    COORDINATOR,
    MODEL,
    NORTH,
    POOL,
    REQUEST,
    STATISTICS,
    STRANGER,
    Kind,
    NeverArrives,
    Undeclared,
    handoffs,
    reports,
)

from invcoss_common import errors
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import sha256_hex
from invcoss_common.config import RelayConfig
from invcoss_common.errors import CredentialError, InvcossError, PolicyRefused, ProtocolError
from invcoss_common.keys import sign
from invcoss_common.records import HANDOFF, REPORT, HandOff, Report, Request, Response, Status, from_bytes, to_bytes
from invcoss_common.wire import decode_request, decode_response, encode_request, encode_response
from invcoss_server.accept import check_report, store_released
from invcoss_server.courier import wait
from invcoss_server.registry import Registry
from invcoss_server.signatures import Signatures
from invcoss_site.desk import answer
from invcoss_site.home import SiteHome, write_home


def signed_records(root: Path, home: SiteHome) -> dict[str, Kind]:
    """A hand-off at a site's desk and a report at the coordinator, each behind the line with its signature.

    Those `own` are signed by the very side that altered them.
    """
    asked, store = handoffs(), ArtefactStore(root / "store")
    pool = store.put(POOL)
    Registry.create(root / "sites.db").enrol(REQUEST)
    signatures = Signatures(COORDINATOR, Registry(root / "sites.db"))

    def hand_off(data: bytes) -> None:
        signature, content = _two_texts(data)
        home.artefacts.put(MODEL)
        home.artefacts.put(POOL)
        fields = {"handoff": content, "attempt": 1, "signature": signature}
        try:
            _raise_answered(answer(Request("start", fields), home, lambda home, hop: None))
            assert to_bytes(from_bytes(HandOff, content.encode())) == content.encode()
            assert (home.hop_folder(json.loads(content)["hop"]) / "handoff.json").read_bytes() == content.encode()
        finally:
            for path in home.spool.glob("s[0-9][0-9]-*"):
                shutil.rmtree(path)
            (home.spool / "sequence.json").unlink(missing_ok=True)

    def report(data: bytes) -> None:
        signature, content = _two_texts(data)
        fields = {"status": to_bytes(Status(state="done")).decode(), "report": content, "signature": signature}
        courier = SimpleNamespace(call=lambda site, request: Response(fields), check=signatures.check)
        handoff = next((one for one in asked if f'"{one.hop}"' in content), asked[0])
        found = wait(courier, "north", handoff, RelayConfig(), lambda status: None)
        check_report(found, handoff)
        assert to_bytes(found) == content.encode()
        if found.release is not None:
            store_released(store, pool, found.release)

    return {
        **_signed("hand-off", tuple(map(to_bytes, asked)), hand_off, COORDINATOR, HANDOFF),
        **_signed("report", tuple(map(to_bytes, reports())), report, NORTH, REPORT),
    }


def _signed(
    name: str, contents: tuple[bytes, ...], receive: Callable[[bytes], None], key: Ed25519PrivateKey, document: str
) -> dict[str, Kind]:
    def enveloped(content: bytes) -> bytes:
        return sign(key, document, content).encode() + b"\n" + content

    refusals = (ProtocolError, CredentialError, PolicyRefused, NeverArrives)
    originals, altered = tuple(map(enveloped, contents)), mutations.altered_json(contents)
    forged = forgeries.altered_envelope(originals, altered, STRANGER, document)
    return {
        name: Kind(originals, receive, forged, refusals, sealed=True),
        f"{name}, own": Kind(contents, lambda content: receive(enveloped(content)), altered, refusals),
    }


def _two_texts(data: bytes) -> tuple[str, str]:
    """The signature and the document behind it; Flower carries them as texts."""
    try:
        signature, _, content = data.decode().partition("\n")
    except UnicodeDecodeError:
        raise NeverArrives from None
    return signature, content


def _raise_answered(response: Response) -> None:
    """Raise the error whose class a site answered with; raises Undeclared if it is not one of ours."""
    if name := str(response.fields.get("error", "")):
        kind = getattr(errors, name, None)
        raise kind("at the site") if isinstance(kind, type) and issubclass(kind, InvcossError) else Undeclared(name)


def statuses() -> Kind:
    originals = tuple(
        to_bytes(one)
        for one in (
            Status(state="queued"),
            Status(state="running", phase="training", step=3, steps=9, images_per_s=2.5, loss=0.5),
            Status(state="failed", error="DataError"),
        )
    )

    def receive(data: bytes) -> None:
        assert to_bytes(from_bytes(Status, data)) == data

    return Kind(originals, receive, mutations.altered_json(originals), (ProtocolError,))


def messages(root: Path) -> dict[str, Kind]:
    """Requests at a site that has finished a hop, and answers at the coordinator, as Flower carries them."""
    home = write_home(root / "south", "south", root / "images")
    handoff = handoffs()[0].model_copy(update={"receiver": "south"})

    def visit(_handoff: HandOff, _home: SiteHome, _on_status: Callable[[Status], None]) -> Report:
        return reports()[0].model_copy(
            update={"sender": "south", "model": home.artefacts.put(MODEL), "statistics": home.artefacts.put(STATISTICS)}
        )

    home.artefacts.put(MODEL)
    home.artefacts.put(POOL)
    start = Request("start", {"handoff": to_bytes(handoff).decode(), "attempt": 1, "signature": ""})
    _raise_answered(answer(start, home, work_here(visit)))
    shutil.copytree(home.spool, root / "spool")
    pairs = [(asked, answer(asked, home, lambda home, hop: None)) for asked in _requests(handoff, start)]

    def request(data: bytes) -> None:
        shutil.rmtree(home.spool)
        shutil.copytree(root / "spool", home.spool)
        record = _arrived(data)
        asked = decode_request(record)
        encoded = encode_request(asked)
        if "protocol" in record["ctl"]:
            encoded["ctl"].setdefault("protocol", 1)  # the one field that may also be left out
        assert encoded == record
        response = answer(asked, home, lambda home, hop: None)
        assert decode_response(encode_response(response), asked) == response
        _raise_answered(response)

    def response(data: bytes) -> None:
        record, refusal = _arrived(data), None
        for asked, _ in pairs:
            try:
                assert encode_response(decode_response(record, asked)) == record
            except ProtocolError as error:
                refusal = error
            else:
                return
        assert refusal
        raise refusal

    def kind(records: list[RecordDict], receive: Callable[[bytes], None], *more: type[InvcossError]) -> Kind:
        originals = tuple(map(containers.flower_bytes, records))
        return Kind(originals, receive, containers.altered_message(records), (ProtocolError, NeverArrives, *more))

    return {
        "request": kind([encode_request(asked) for asked, _ in pairs], request, PolicyRefused),
        "answer": kind([encode_response(answered) for _, answered in pairs], response),
    }


def _requests(handoff: HandOff, start: Request) -> Iterator[Request]:
    """One request of every verb in both versions, at a site that has done what `start` asks for."""
    model: dict[str, str | int] = {"sha256": handoff.model.sha256, "size": handoff.model.size_bytes}
    new = b"a new artefact"
    put = {"sha256": sha256_hex(new), "size": len(new), "offset": 0}
    yield Request("hello", protocol=1)
    for version, coded in ((1, {}), (2, {"encoding": ""})):
        yield Request("have", model, protocol=version)
        yield Request("put", {**put, **coded}, new, version)
        yield Request("status", {"hop": handoff.hop}, protocol=version)
        yield Request("get", {**model, "offset": 20, "length": 60, **coded}, protocol=version)
        yield Request("purge", {"keep": model["sha256"]}, protocol=version)
    yield Request("abort", {"hop": handoff.hop})
    yield start


def _arrived(data: bytes) -> RecordDict:
    """A message as Flower hands it to our code."""
    try:
        return recorddict_from_proto(FlowerRecord.FromString(data))
    except Exception:
        raise NeverArrives from None
