"""The courier's wire format: a Request or Response as Flower records, decoded strictly.

Small fields travel in a ConfigRecord `ctl`, one part of an artefact in an ArrayRecord `part` with one raw-bytes array.
A request names its protocol version; one that does not is of version 1, and `hello` never does.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from invcoss_common.errors import ProtocolError
from invcoss_common.records import MAX_RECORD_BYTES, SPOKEN, Request, Response, Verb, spoken

MAX_PART_BYTES = 128 << 20  # Flower's SQLite state locks up on messages of a few hundred MiB

Fields = dict[str, type[str] | type[int]]


class Form(NamedTuple):
    """What one verb asks and answers: field names and types, and which direction carries a part."""

    asks: Fields
    answers: Fields
    part: str = ""  # "asks", "answers" or neither


ARTEFACT: Fields = {"sha256": str, "size": int}

_VERSION_1: dict[Verb, Form] = {
    "hello": Form({}, {"site": str, "protocol": int, "code_version": str}),
    "have": Form(ARTEFACT, {"received": int}),
    "put": Form(ARTEFACT | {"offset": int}, {"received": int}, part="asks"),
    "start": Form({"handoff": str, "attempt": int}, {"state": str}),
    "status": Form({"hop": str}, {"status": str, "report": str}),
    "get": Form(ARTEFACT | {"offset": int, "length": int}, {}, part="answers"),
    "purge": Form({"keep": str}, {}),
}
_VERSION_2: dict[Verb, Form] = _VERSION_1 | {
    "put": Form(ARTEFACT | {"offset": int, "encoding": str}, {"received": int, "closed": int}, part="asks"),
    "get": Form(ARTEFACT | {"offset": int, "length": int, "encoding": str}, {"encoding": str}, part="answers"),
    "start": Form({"handoff": str, "attempt": int, "signature": str}, {"state": str}),
    "status": Form({"hop": str}, {"status": str, "report": str, "signature": str}),
    "abort": Form({"hop": str}, {"state": str}),
}
VERBS: dict[int, dict[Verb, Form]] = {1: _VERSION_1, 2: _VERSION_2}
ERROR: Fields = {"error": str}  # the answer to any verb that failed

assert set(VERBS) == set(SPOKEN) and set(VERBS[max(SPOKEN)]) == set(get_args(Verb))


def encode_request(request: Request) -> RecordDict:
    version = {} if request.protocol == 1 or request.verb == "hello" else {"protocol": request.protocol}
    return _encode({"verb": request.verb, **version, **request.fields}, request.blob)


def encode_response(response: Response) -> RecordDict:
    return _encode(response.fields, response.blob)


def decode_request(record: RecordDict) -> Request:
    """The Request in `record`; raises ProtocolError on a version not spoken, or anything outside its table of verbs."""
    fields, blob = _decode(record)
    verb, version = fields.pop("verb", None), 1
    if verb != "hello" and "protocol" in fields:
        _check({"protocol": fields["protocol"]}, {"protocol": int})
        version = spoken(int(fields.pop("protocol")))
    for known, form in VERBS[version].items():
        if verb == known:
            _check(fields, form.asks)
            _check_part(blob, form.part == "asks")
            return Request(known, fields, blob, version)
    raise ProtocolError("message with an unknown verb")


def decode_response(record: RecordDict, request: Request) -> Response:
    """The answer to `request` in `record`; raises ProtocolError on anything outside the table of its version."""
    fields, blob = _decode(record)
    failed, form = "error" in fields, VERBS[request.protocol][request.verb]
    _check(fields, ERROR if failed else form.answers)
    _check_part(blob, not failed and form.part == "answers")
    return Response(fields, blob)


def _encode(fields: dict[str, str | int], blob: bytes) -> RecordDict:
    record = RecordDict({"ctl": ConfigRecord(dict(fields))})
    if blob:
        record["part"] = ArrayRecord({"part": Array("uint8", (len(blob),), "raw.bytes", blob)})
    return record


def _decode(record: RecordDict) -> tuple[dict[str, str | int], bytes]:
    if not set(record) <= {"ctl", "part"}:
        raise ProtocolError("message with a record that the protocol does not know")
    ctl, part = record.get("ctl"), record.get("part")
    if not isinstance(ctl, ConfigRecord):
        raise ProtocolError("message without the record 'ctl'")
    fields: dict[str, str | int] = {}
    for name, value in ctl.items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ProtocolError("message with a field that is neither text nor a whole number")
        if isinstance(value, str) and len(value) > MAX_RECORD_BYTES:
            raise ProtocolError("message with a text longer than the protocol allows")
        fields[name] = value
    if part is None:
        return fields, b""
    if not isinstance(part, ArrayRecord) or set(part) != {"part"}:
        raise ProtocolError("message with a 'part' that is not one array of raw bytes")
    array = part["part"]
    if not array.data or (array.stype, array.dtype, tuple(array.shape)) != ("raw.bytes", "uint8", (len(array.data),)):
        raise ProtocolError("message with a 'part' that is not one array of raw bytes")
    return fields, array.data


def _check(fields: dict[str, str | int], form: Fields) -> None:
    if set(fields) != set(form):
        raise ProtocolError("message with fields missing or unknown to the protocol")
    for name, kind in form.items():
        if not isinstance(fields[name], kind):
            raise ProtocolError(f"message with a field '{name}' that is not {kind.__name__}")


def _check_part(blob: bytes, expected: bool) -> None:
    if bool(blob) != expected:
        raise ProtocolError("message with a part missing, or where none belongs")
    if len(blob) > MAX_PART_BYTES:
        raise ProtocolError(f"part of {len(blob)} bytes is larger than the protocol allows")
