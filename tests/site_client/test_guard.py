"""The guard at the door: answers of an enrolled site that has done an honest hop, as they are and twisted."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from tests.federation.loopback import work_here
from tests.site_client.visits import asked, honest

from invcoss_common import errors
from invcoss_common.artefacts import ArtefactStore
from invcoss_common.canonical import write_atomic
from invcoss_common.chain import records
from invcoss_common.encoding import FOR_IMAGES, FOR_WEIGHTS, encode
from invcoss_common.errors import ERROR_CODES, DataError, EgressRefused, InvcossError, ProtocolError, error_class
from invcoss_common.keys import generate_signing_key, sign
from invcoss_common.records import REPORT, Report, Request, Response, Status, from_bytes, to_bytes
from invcoss_common.wire import VERBS, decode_response, encode_request, encode_response
from invcoss_server.provision import enrol_site, init_consortium
from invcoss_server.signatures import load_signatures
from invcoss_site import app, desk, uploads
from invcoss_site.desk import answer
from invcoss_site.enrol import init_site, join
from invcoss_site.guard import check_response
from invcoss_site.home import load_home

HOP = "s00-train"
SECRET = "MEIER-ANNA-1931"


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """An enrolled site that has done one training, honestly; its report, and how to start."""
    root = tmp_path_factory.mktemp("guard")
    init_consortium(root / "chest", "chest", ("localhost",), 9443)
    (root / "images").mkdir()
    request = init_site(root / "north", "north", root / "images")
    join(root / "north", enrol_site(root / "chest", request.to_bytes()).to_bytes())
    home, store = load_home(root / "north"), ArtefactStore(root / "coordinator")
    handoff = asked(store, sequence=1)
    content = to_bytes(handoff)
    signature = load_signatures(root / "chest").sign(content)
    home.artefacts.append(handoff.model, 0, store.path(handoff.model).read_bytes())
    start = Request("start", {"handoff": content.decode(), "attempt": 1, "signature": signature})
    assert answer(start, home, work_here(honest)).fields == {"state": "done"}
    home.artefacts.append(handoff.model, 0, store.path(handoff.model).read_bytes())
    return home, start, from_bytes(Report, (home.hop_folder(HOP) / "report.json").read_bytes()), handoff


def nothing(home, hop):
    pass


def get(artefact, offset=0, length=1 << 20, encoding="", protocol=2):
    fields = {"sha256": artefact.sha256, "size": artefact.size_bytes, "offset": offset, "length": length}
    return Request("get", fields | ({"encoding": encoding} if protocol > 1 else {}), b"", protocol)


def questions(worked):
    """Every verb in every version, with artefacts in every encoding."""
    home, start, report, handoff = worked
    named = {"sha256": handoff.model.sha256, "size": handoff.model.size_bytes}
    for protocol in VERBS:
        old = protocol == 1
        yield Request("hello", protocol=1)
        yield Request("have", named, protocol=protocol)
        part = home.artefacts.path(handoff.model).read_bytes()
        yield Request("put", named | {"offset": 0} | ({} if old else {"encoding": ""}), part, protocol)
        yield Request("status", {"hop": HOP}, protocol=protocol)
        yield Request("status", {"hop": "s07-train"}, protocol=protocol)
        yield get(report.statistics, protocol=protocol)
        for encoding in ("", FOR_IMAGES, FOR_WEIGHTS):
            yield get(report.model, 1 << 20, 1 << 19, encoding) if not old else get(report.model, protocol=1)
        yield Request("purge", {"keep": ",".join(path.name for path in home.artefacts.folder.iterdir())}, b"", protocol)
    yield Request("abort", {"hop": HOP})
    yield start


def test_honest_answers_to_every_verb_in_every_version_pass(worked):
    home = worked[0]
    verbs = set()
    for request in questions(worked):
        response = answer(request, home, nothing)
        assert "error" not in response.fields, request
        check_response(request, response, home)
        leaving = app.reply(encode_request(request), home, nothing)
        assert "error" not in leaving["ctl"]
        verbs.add((request.protocol, request.verb))
    assert verbs >= {
        (version, verb) for version, table in VERBS.items() for verb in table if verb not in ("start", "hello")
    }


# Each: what is asked, and how the honest answer to it is twisted.

STATUS, UNKNOWN = Request("status", {"hop": HOP}), Request("status", {"hop": "s07-train"})
HELLO = Request("hello", protocol=1)


def fields(**changes):
    return lambda response: replace(response, fields=response.fields | changes)


def blob(edit):
    return lambda response: replace(response, blob=edit(response.blob))


def status(**changes):
    return lambda response: fields(
        status=json.dumps(json.loads(response.fields["status"]) | changes, separators=(",", ":"), sort_keys=True)
    )(response)


def report(**changes):
    def change(response):
        told = json.loads(response.fields["report"]) | changes
        return fields(report=json.dumps(told, separators=(",", ":"), sort_keys=True))(response)

    return change


def without(name):
    return lambda response: Response(
        {key: value for key, value in response.fields.items() if key != name}, response.blob
    )


TWISTS = {
    "a field more": (HELLO, fields(note=SECRET)),
    "a field less": (HELLO, without("protocol")),
    "no field at all": (STATUS, lambda response: Response()),
    "a part with an answer that has none": (STATUS, blob(lambda part: b"pixels")),
    "a part with an empty answer": (Request("purge", {"keep": "x"}), blob(lambda part: b"pixels")),
    "another site's name": (HELLO, fields(site="south")),
    "a text for the site's name": (HELLO, fields(site=f"north {SECRET}")),
    "another protocol": (HELLO, fields(protocol=19310401)),
    "a truth value for a number": (HELLO, fields(protocol=True)),
    "a text for the version": (HELLO, fields(code_version=SECRET)),
    "a state that is none": (Request("abort", {"hop": "s07-train"}), fields(state=SECRET)),
    "another error than those on the list": (STATUS, lambda response: Response({"error": "PatientMeierHasMoved"})),
    "a text for an error": (STATUS, lambda response: Response({"error": f"/images/{SECRET}.dcm: not found"})),
    "an error and a part": (STATUS, lambda response: Response({"error": "DataError"}, b"pixels")),
    "an error and a field": (STATUS, lambda response: Response({"error": "DataError", "status": ""})),
    "a status with a text": (UNKNOWN, status(error=SECRET.replace("-", ""))),
    "a status with another error": (UNKNOWN, status(state="failed", error="MeierError")),
    "a status with a field more": (UNKNOWN, status(file=SECRET)),
    "a status in another form": (
        UNKNOWN,
        lambda response: fields(status=response.fields["status"].replace(":", ": "))(response),
    ),
    "a status in another order": (
        UNKNOWN,
        lambda r: fields(
            status=json.dumps(dict(reversed(json.loads(r.fields["status"]).items())), separators=(",", ":"))
        )(r),
    ),
    "a status with all digits": (UNKNOWN, status(loss=0.123456789)),
    "a status that is done without a report": (UNKNOWN, status(state="done")),
    "a report while it runs": (STATUS, status(state="running")),
    "no report when it is done": (STATUS, fields(report="", signature="")),
    "a report with other numbers": (
        STATUS,
        lambda r: report(metrics=json.loads(r.fields["report"])["metrics"] | {"train_cases": 13.0})(r),
    ),
    "a report with a field more": (STATUS, report(patients=[SECRET])),
    "a report in another form": (STATUS, lambda r: fields(report=r.fields["report"] + " ")(r)),
    "a text for a report": (STATUS, fields(report=SECRET)),
    "the report of another hop": (STATUS, report(hop="s01-train")),
    "no signature": (STATUS, fields(signature="")),
    "a text for a signature": (STATUS, fields(signature=base64.b64encode(SECRET.encode().ljust(64)).decode())),
    "a signature and more": (STATUS, lambda r: fields(signature=r.fields["signature"] + "\n")(r)),
    "more held than there is": (None, fields(received=1 << 40)),
    "fewer than none held": (None, fields(received=-1)),
    "a door that is neither open nor closed": (Request("put"), fields(closed=2)),
    "an encoding that is a text": (Request("get"), fields(encoding=SECRET)),
    "an encoding that was not asked for": (
        Request("get"),
        lambda r: Response({"encoding": FOR_IMAGES}, encode(r.blob, FOR_IMAGES)[1]),
    ),
    "a cached image": (Request("get"), blob(lambda part: np.arange(len(part), dtype=np.uint8).tobytes())),
    "a part and more": (Request("get"), blob(lambda part: part + SECRET.encode())),
    "a part less a byte": (Request("get"), blob(lambda part: part[:-1])),
    "another part": (Request("get"), blob(lambda part: part[::-1])),
    "no part": (Request("get"), blob(lambda part: b"")),
}


def question(worked, twist):
    """The request of a twist; what needs an artefact is filled in."""
    _, _, released, handoff = worked
    request = TWISTS[twist][0]
    named = {"sha256": handoff.model.sha256, "size": handoff.model.size_bytes}
    if request is None:
        return Request("have", named)
    if request.verb == "put":
        return Request("put", named | {"offset": 0, "encoding": ""}, b"x")
    return get(released.statistics) if request.verb == "get" else request


def honest_answer(request, home):
    """What the desk would say, without carrying it out where that would change something."""
    if request.verb == "purge":
        return Response()
    return desk._answer(request, home, nothing)


@pytest.mark.parametrize("twist", TWISTS)
def test_a_twisted_answer_does_not_leave(worked, twist, monkeypatch):
    home, request = worked[0], question(worked, twist)
    honestly = honest_answer(request, home)
    check_response(request, honestly, home)
    twisted = TWISTS[twist][1](honestly)
    assert twisted != honestly
    with pytest.raises(EgressRefused):
        check_response(request, twisted, home)

    monkeypatch.setattr(desk, "_answer", lambda *_: twisted)
    assert answer(request, home, nothing) == Response({"error": "EgressRefused"})
    *_, newest = records(home.root / "journal.jsonl")
    assert (newest["kind"], newest["error"], newest["verb"]) == ("refused", "EgressRefused", request.verb)
    assert SECRET not in (home.root / "journal.jsonl").read_text()


def test_with_no_request_that_could_be_read_only_an_error_leaves(worked):
    home = worked[0]
    check_response(None, Response({"error": "ProtocolError"}), home)
    for response in (Response(), Response({"site": "north"}), Response({"error": SECRET})):
        with pytest.raises(EgressRefused):
            check_response(None, response, home)


@pytest.mark.parametrize("encoding", ["", FOR_IMAGES, FOR_WEIGHTS])
def test_no_file_but_a_released_one_leaves_in_parts(worked, encoding):
    """Though it lies in the store, and the part is cut from it correctly."""
    home, _, released, handoff = worked
    cached = home.artefacts.put(np.zeros(100_000, np.uint8).tobytes())
    for artefact in (cached, handoff.model):
        request = get(artefact, 0, 4096, encoding)
        used, part = encode(home.artefacts.read(artefact, 0, 4096), encoding)
        with pytest.raises(EgressRefused, match="byte for byte"):
            check_response(request, Response({"encoding": used}, part), home)
    for request in (
        get(released.model, -8, 8),
        get(released.model, released.model.size_bytes, 8),
        get(released.model, 0, 4),
    ):
        with pytest.raises(EgressRefused, match="byte for byte"):
            check_response(request, Response({"encoding": ""}, b"12345678"), home)
        assert answer(request if request.fields["length"] == 8 else get(cached, 0, 4), home, nothing).fields == {
            "error": "ProtocolError"
        }


def test_a_report_that_the_site_did_not_sign_does_not_leave_nor_do_its_files(worked, tmp_path):
    """Somebody who may write the spool, but has no key, puts a report of an image there."""
    home, _, released, _ = worked
    image = home.artefacts.put(np.ones(50_000, np.uint8).tobytes())
    forged = to_bytes(released.model_copy(update={"hop": "s05-train", "model": image}))
    folder = home.hop_folder("s05-train")
    write_atomic(folder / "report.json", forged)
    write_atomic(folder / "report.signature", sign(generate_signing_key(), REPORT, forged).encode())
    write_atomic(folder / "status.json", to_bytes(Status(state="done")))
    assert answer(Request("status", {"hop": "s05-train"}), home, nothing).fields == {"error": "EgressRefused"}
    assert answer(get(image), home, nothing).fields == {"error": "EgressRefused"}


def test_an_altered_file_of_a_released_report_is_seen_by_its_size_and_by_the_coordinator(worked):
    home, _, released, _ = worked
    path = home.artefacts.path(released.statistics)
    content = path.read_bytes()
    try:
        path.write_bytes(content + SECRET.encode())
        assert answer(get(released.statistics), home, nothing).fields == {"error": "ProtocolError"}
    finally:
        path.write_bytes(content)


# The record that leaves


def test_a_record_that_is_not_what_the_guard_has_seen_does_not_leave(worked, monkeypatch):
    home = worked[0]
    honest_encode = encode_response

    def talkative(response):
        return honest_encode(response if "error" in response.fields else Response({"error": "ValueError"}))

    monkeypatch.setattr(app, "encode_response", talkative)
    leaving = app.reply(encode_request(HELLO), home, nothing)
    assert dict(leaving["ctl"]) == {"error": "EgressRefused"}
    *_, newest = records(home.root / "journal.jsonl")
    assert (newest["kind"], newest["error"]) == ("refused", "EgressRefused")


@pytest.mark.parametrize(
    "array", [("uint8", (3,), SECRET), (SECRET, (3,), "raw.bytes"), ("uint8", (1931, 4), "raw.bytes")]
)
def test_a_part_whose_type_or_shape_says_anything_is_no_answer(array):
    dtype, shape, stype = array
    part = ArrayRecord({"part": Array(dtype, shape, stype, b"abc")})
    record = RecordDict({"ctl": ConfigRecord({"encoding": ""}), "part": part})
    with pytest.raises(ProtocolError, match="raw bytes"):
        decode_response(record, Request("get"))


def test_what_flower_itself_tells_the_coordinator_has_no_place_for_more():
    """No node config, path, host or log of a site is in Flower's calls; a new version of it must be looked at."""

    def names(message):
        return set(message.DESCRIPTOR.fields_by_name)

    assert names(fleet_pb2.ActivateNodeRequest) == {"public_key", "heartbeat_interval"}
    assert names(fleet_pb2.DeactivateNodeRequest) == {"node_id"}
    assert names(heartbeat_pb2.SendNodeHeartbeatRequest) == {"node", "heartbeat_interval"}
    assert names(fleet_pb2.PullMessagesRequest) == {"node", "message_ids"}
    assert names(fleet_pb2.PushMessagesRequest) == {
        *("node", "messages_list", "message_object_trees", "clientapp_runtime_list"),
    }
    assert names(message_pb2.Metadata) == {
        *("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "ttl"),
        *("message_type", "created_at", "src_task_id", "dst_task_id"),
    }
    assert names(message_pb2.Message) == {"metadata", "content", "error"}


# Errors


def test_every_error_has_a_class_on_the_list_and_nothing_else_leaves():
    def tree(kind):
        return {kind}.union(*map(tree, kind.__subclasses__()))

    ours = {kind for kind in tree(InvcossError) if kind.__module__ == errors.__name__}
    assert len(ours) > 20 and {kind.__name__ for kind in ours} <= ERROR_CODES
    assert all(re.fullmatch("[A-Za-z]{1,48}", code) for code in ERROR_CODES), "the form that a Status has"
    for error, code in (
        (DataError(SECRET), "DataError"),
        (FileNotFoundError(2, SECRET), "OSError"),
        (KeyError(SECRET), "LookupError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, SECRET), "ValueError"),
        (type(SECRET.replace("-", ""), (Exception,), {})(), "Error"),
        (type("OutOfMemoryError", (RuntimeError,), {})(), "OutOfMemoryError"),
    ):
        assert error_class(error) == code


# The upload budget at the door


def test_asking_for_the_same_part_again_and_again_ends_with_the_budget(worked, monkeypatch):
    home, _, released, _ = worked
    (home.root / uploads.UPLOADS).unlink(missing_ok=True)
    part, day = released.statistics.size_bytes, uploads._today()
    write_atomic(home.root / "policy.toml", f"[egress]\nmax_upload_gb = {3.5 * part / 1e9}\n".encode())
    try:
        answers = [answer(get(released.statistics), home, nothing) for _ in range(5)]
        assert [response.fields.get("error", "") for response in answers] == ["", "", "", "UploadSpent", "UploadSpent"]
        assert json.loads((home.root / uploads.UPLOADS).read_bytes()) == {day.isoformat(): 3 * part}
        for days, error in ((30, "UploadSpent"), (31, "")):
            later = day.fromordinal(day.toordinal() + days)
            monkeypatch.setattr(uploads, "_today", lambda later=later: later)
            assert answer(get(released.statistics), home, nothing).fields.get("error", "") == error
    finally:
        (home.root / "policy.toml").unlink()
