"""The guard: the last look at every message that leaves a site. What is not on its list is refused.

Every field has one case in `_may_leave` and one line in docs/egress.md, which says its type, bound and reason. Reports
and artefacts were looked at before they were signed (guard_report.py); here they must be those very bytes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

from invcoss_common import __version__
from invcoss_common.encoding import decode
from invcoss_common.errors import ERROR_CODES, EgressRefused, InvcossError
from invcoss_common.keys import check_signature
from invcoss_common.records import (
    PROTOCOL_VERSION,
    REPORT,
    Artefact,
    HopState,
    Report,
    Request,
    Response,
    Status,
    from_bytes,
    to_bytes,
)
from invcoss_common.wire import VERBS
from invcoss_site.home import SiteHome
from invcoss_site.journal import journal_key
from invcoss_site.rounding import egress_policy, rounded_status


def check_response(request: Request | None, response: Response, home: SiteHome) -> None:
    """Raise EgressRefused unless `response` holds what the answer to `request` may hold, and nothing besides.

    `request` is None when it could not be read: only the class of an error may leave then.
    """
    fields, blob = response.fields, response.blob
    if set(fields) == {"error"}:
        if fields["error"] not in ERROR_CODES or blob:
            raise EgressRefused("an error that is more than one of the classes on the list")
        return
    form = VERBS.get(request.protocol, {}).get(request.verb) if request else None
    if request is None or form is None:
        raise EgressRefused("an answer to something that can't be asked")
    if set(fields) != set(form.answers) or bool(blob) != (form.part == "answers"):
        raise EgressRefused(f"an answer to '{request.verb}' with other fields or parts than it may have")
    for name, value in fields.items():
        if type(value) is not form.answers[name] or not _may_leave(name, request, response, home):
            raise EgressRefused(f"field '{name}' of an answer to '{request.verb}' is not what may leave")
    if blob and not _is_released_part(request, response, home):
        raise EgressRefused("a part that is not, byte for byte, of an artefact that a report of this site names")


def _may_leave(name: str, request: Request, response: Response, home: SiteHome) -> bool:
    """Whether the field `name` of `response`, of the right type, has a value that may leave."""
    value, hop = response.fields[name], str(request.fields.get("hop", ""))
    match name:
        case "site":
            return value == home.name
        case "protocol":
            return value == PROTOCOL_VERSION
        case "code_version":
            return value == __version__
        case "received":
            return 0 <= int(value) <= int(request.fields["size"])
        case "closed":
            return value in (0, 1)
        case "state":
            return value in get_args(HopState)
        case "encoding":
            return value in ("", request.fields["encoding"])  # which of them are known, `decode` knows
        case "status":
            return _is_status(str(value), bool(response.fields["report"]), home)
        case "report":
            report = _released(home, hop) if value else None
            return value == (to_bytes(report).decode() if report else "")
        case "signature":
            return value == (_signature(home, hop) if response.fields["report"] else "")
    return False


def _is_status(text: str, reported: bool, home: SiteHome) -> bool:
    """Whether `text` is a canonical Status, rounded, with a report beside it when it is done and only then."""
    with suppress(InvcossError, ValueError):
        status = from_bytes(Status, text.encode())
        return (
            (not status.error or status.error in ERROR_CODES)
            and (status.state == "done") == reported
            and rounded_status(status, egress_policy(home.root)) == status
        )
    return False


def _is_released_part(request: Request, response: Response, home: SiteHome) -> bool:
    fields = request.fields
    offset, length = int(fields["offset"]), int(fields["length"])
    with suppress(InvcossError, ValueError, OSError):
        artefact = Artefact.model_validate({"sha256": fields["sha256"], "size_bytes": fields["size"]})
        reports = [_released(home, file.parent.name) for file in home.spool.glob("*/report.json")]
        if not any(report and artefact in report.artefacts for report in reports):
            return False
        part = decode(response.blob, str(response.fields.get("encoding", "")), length)
        return offset >= 0 and part == home.artefacts.read(artefact, offset, length)
    return False


def _released(home: SiteHome, hop: str) -> Report | None:
    """The report that the worker released for `hop`; None unless it is of this site and hop, and signed by the site."""
    with suppress(InvcossError, ValueError, OSError):
        content = (home.hop_folder(hop) / "report.json").read_bytes()
        report = from_bytes(Report, content)
        if key := journal_key(home):
            check_signature(key.public_key(), REPORT, content, _signature(home, hop), "this site")
        if (report.sender, report.hop) == (home.name, hop):
            return report
    return None


def _signature(home: SiteHome, hop: str) -> str:
    """The signature beside the report of `hop`; "" where there is none, as in a simulation."""
    file = home.hop_folder(hop) / "report.signature"
    return file.read_text("ascii") if file.exists() else ""
