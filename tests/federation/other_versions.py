"""Sites with the software of other protocol versions, message in, message out, for LoopbackCourier."""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, RecordDict
from tests.federation.loopback import Site, StartWork, site_of_today

from invcoss_site.home import SiteHome

# The whole of version 1, as its software had it; never to be changed.
ASKS = {
    "hello": {},
    "have": {"sha256": str, "size": int},
    "put": {"sha256": str, "size": int, "offset": int},
    "start": {"handoff": str, "attempt": int},
    "status": {"hop": str},
    "get": {"sha256": str, "size": int, "offset": int, "length": int},
    "purge": {"keep": str},
}
ANSWERS = {
    "hello": {"site", "protocol", "code_version"},
    "have": {"received"},
    "put": {"received"},
    "start": {"state"},
    "status": {"status", "report"},
    "get": set(),
    "purge": set(),
}
HAND_OFF = {"protocol", "run", "hop", "receiver", "plan_digest", "code_version", "task", "model", "pools"}
REPORT = {"protocol", "run", "hop", "sender", "plan_digest", "code_version", "model", "statistics", "metrics", "curve"}
STATUS = {"state", "phase", "step", "steps", "images_per_s", "data_wait_share", "loss", "error"}
TASK = {"kind", "stage", "modality_name", "modality", "geometry", "spacing_mm", "model", "families", "train", "replay"}
TASK |= {"evaluate", "seed", "threads"}


def site_of_version_1(record: RecordDict, home: SiteHome, start_work: StartWork) -> RecordDict:
    """Refuses what version 1 did not know, strictly as its software did, and answers in the words of version 1."""
    fields = dict(record["ctl"])
    verb = fields.pop("verb")
    if {name: type(value) for name, value in fields.items()} != ASKS.get(verb):
        return RecordDict({"ctl": ConfigRecord({"error": "ProtocolError"})})
    if verb == "start":
        handoff = json.loads(fields["handoff"])
        if handoff["protocol"] != 1 or set(handoff) != HAND_OFF or set(handoff["task"]) != TASK:
            return RecordDict({"ctl": ConfigRecord({"error": "ProtocolError"})})
    answer = site_of_today(record, home, start_work)
    if "error" in answer["ctl"]:
        return answer
    if verb == "hello":
        answer["ctl"]["protocol"] = 1
    assert set(answer["ctl"]) == ANSWERS[verb]
    if verb == "status":
        assert set(json.loads(answer["ctl"]["status"])) == STATUS
        if answer["ctl"]["report"]:
            report = json.loads(answer["ctl"]["report"])
            assert set(report) == REPORT and report["protocol"] == 1
    return answer


def site_that_says(protocol: int) -> Site:
    """A site whose newest version is `protocol` and that speaks today's as well."""

    def site(record: RecordDict, home: SiteHome, start_work: StartWork) -> RecordDict:
        answer = site_of_today(record, home, start_work)
        if record["ctl"]["verb"] == "hello":
            answer["ctl"]["protocol"] = protocol
        return answer

    return site
