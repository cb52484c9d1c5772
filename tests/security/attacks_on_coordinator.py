"""Attacks on a coordinator by an enrolled site, as data: it signs with its own key whatever it likes."""

# ruff: noqa: E501 - tables, one attack a line

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from tests.security.attacked import Change, Hostile, report_in
from torch import Tensor

from invcoss_common.canonical import canonical_json
from invcoss_common.keys import generate_signing_key, sign
from invcoss_common.records import REPORT, AuditFigures, Request, Response

TRAIN, AUDIT, EVALUATE = "train", "audit", "evaluate"
COURIER, ACCEPT, WIRE = "the courier", "acceptance", "the wire format"
STRANGER = generate_signing_key()
OTHER = {"sha256": "b" * 64, "size_bytes": 99}


class OnCoordinator(NamedTuple):
    """`who` is the phase of the run in which the site attacks; `says` is searched for in what the operator is told."""

    name: str
    who: str
    tried: str
    refuses: str
    error: str
    says: str
    act: Change


def in_answers(verb: str, edit: Callable[[Hostile, Request, Response], Response]) -> Change:
    """`edit` the answers to one verb; of `status` those with a report."""

    def change(hostile: Hostile, request: Request, response: Response) -> Response:
        meant = request.verb == verb and (verb != "status" or response.fields["report"])
        return edit(hostile, request, response) if meant else response

    return change


def report(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Reports with other contents, signed: `edit` gets the report as JSON."""

    def change(hostile: Hostile, request: Request, response: Response) -> Response:
        values = json.loads(str(response.fields["report"]))
        edit(values)
        return hostile.signed(response, canonical_json(values))

    return in_answers("status", change)


def with_values(*where: str, **values: object) -> Change:
    """Reports with other values of the part `where`, signed."""

    def edit(report: dict[str, Any]) -> None:
        for name in where:
            report = report[name]
        report.update(values)

    return report(edit)


def file(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Reports that name another file as `name`, which is served."""

    def change(hostile: Hostile, request: Request, response: Response) -> Response:
        honest = getattr(report_in(response), name)
        made = hostile.serve(edit(hostile.own(honest)))
        values = json.loads(str(response.fields["report"])) | {name: made.model_dump()}
        return hostile.signed(response, canonical_json(values))

    return in_answers("status", change)


def tensors(name: str, edit: Callable[[dict[str, Tensor]], object], **metadata: str) -> Change:
    def edited(data: bytes) -> bytes:
        values = load(data)
        edit(values)
        return save(values, metadata or None)

    return file(name, edited)


def model(edit: Callable[[dict[str, Tensor]], object], **metadata: str) -> Change:
    return tensors("model", edit, **metadata)


def statistics(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    return tensors("statistics", edit)


def first_with(value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(values: dict[str, Tensor]) -> None:
        values[min(values)].view(-1)[0] = value

    return edit


def reshaped(values: dict[str, Tensor]) -> None:
    name = min(name for name, tensor in values.items() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1])
    values[name] = values[name].T.contiguous()


def as_double(values: dict[str, Tensor]) -> None:
    name = min(values)
    values[name] = values[name].double()


def signed_with(edit: Callable[[Hostile, bytes], tuple[bytes, str]]) -> Change:
    """Reports and signatures that do not belong together."""

    def change(hostile: Hostile, request: Request, response: Response) -> Response:
        content, signature = edit(hostile, str(response.fields["report"]).encode())
        return Response({**response.fields, "report": content.decode(), "signature": signature})

    return in_answers("status", change)


def fields(verb: str, **values: str | int) -> Change:
    return in_answers(verb, lambda hostile, request, response: Response({**response.fields, **values}, response.blob))


def error_with(text: str) -> Change:
    return in_answers("status", lambda *_: Response({"error": text}))


def part(edit: Callable[[bytes], bytes], **values: str) -> Change:
    return in_answers("get", lambda _, request, response: Response({**response.fields, **values}, edit(response.blob)))


def inflated(part: bytes) -> bytes:
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(256)) + deflate.flush()


def releases(edit: Callable[[dict[str, Any]], object]) -> Change:
    return report(lambda values: edit(values["release"]))


def in_a_training(values: dict[str, Any]) -> None:
    share = {"value": 0.0, "low": 0.0, "high": 0.0}
    figures = {name: 0 if name.endswith(("images", "copies")) else 0.0 for name in AuditFigures.model_fields}
    figures |= {"beyond": share, "closer": share}
    values["release"] = {
        "stage": 0, "pool": "a" * 64, "released": None, "dropped": [], "figures": figures, "membership": share
    }  # fmt: skip


def rows(*dropped: int) -> Change:
    """A release that drops these rows, and says so in its figures; what it names is made up."""

    def edit(release: dict[str, Any]) -> None:
        share = len(dropped) / release["figures"]["pool_images"]
        beyond = {"value": share, "low": share, "high": share}
        release["figures"] |= {"beyond": beyond, "copies": 0}
        release.update(dropped=list(dropped), released=OTHER)

    return releases(edit)


ANSWER = "the report of site 'north' does not answer hand-off s00-train"
UNSIGNED = "lacks the signature of site 'north'"

ON_COORDINATOR = (
    OnCoordinator("pixels in the model", TRAIN, "one more tensor, of the size of an image", ACCEPT, "WeightsError", "that the model does not have", model(lambda t: t.update(image=torch.rand(64, 64)))),
    OnCoordinator("text in the model's header", TRAIN, "metadata", ACCEPT, "WeightsError", "carries metadata", model(lambda t: None, note="patient")),
    OnCoordinator("bytes behind the tensors", TRAIN, "4 KiB", ACCEPT, "WeightsError", "not a safetensors file", file("model", lambda data: data + bytes(4096))),
    OnCoordinator("cut model", TRAIN, "the last KiB left out", ACCEPT, "WeightsError", "not a safetensors file", file("model", lambda data: data[:-1024])),
    OnCoordinator("NaN in the model", TRAIN, "one value", ACCEPT, "WeightsError", "NaN or infinite", model(first_with(float("nan")))),
    OnCoordinator("infinity in the model", TRAIN, "one value", ACCEPT, "WeightsError", "NaN or infinite", model(first_with(float("inf")))),
    OnCoordinator("huge norm", TRAIN, "one weight of 10^30", ACCEPT, "WeightsError", "no trained model's", model(first_with(1e30))),
    OnCoordinator("model of another shape", TRAIN, "a matrix transposed", ACCEPT, "WeightsError", "the model needs", model(reshaped)),
    OnCoordinator("model of another type", TRAIN, "float64 where float32 was asked for", ACCEPT, "WeightsError", "the model needs", model(as_double)),
    OnCoordinator("model with a missing tensor", TRAIN, "one tensor less", ACCEPT, "WeightsError", "is missing", model(lambda t: t.pop("cls_token"))),
    OnCoordinator("memory bomb", TRAIN, "a model of 2^40 bytes announced", ACCEPT, "ProtocolError", "offers has 1099511627776 bytes", with_values("model", size_bytes=1 << 40)),
    OnCoordinator("memory bomb in the statistics", TRAIN, "2^40 bytes announced", ACCEPT, "ProtocolError", "offers has 1099511627776 bytes", with_values("statistics", size_bytes=1 << 40)),
    OnCoordinator("too large for an artefact", TRAIN, "2^41 bytes announced", COURIER, "ProtocolError", "Report.model.size_bytes", with_values("model", size_bytes=1 << 41)),
    OnCoordinator("path as a digest", TRAIN, "`../../pki/coordinator.pem`", COURIER, "ProtocolError", "Report.model.sha256", with_values("model", sha256="../../pki/coordinator.pem")),
    OnCoordinator("no statistics", TRAIN, "a model only", ACCEPT, "ProtocolError", "lacks the trained model or its statistics", with_values(statistics=None)),
    OnCoordinator("negative variance", TRAIN, "in the statistics", ACCEPT, "WeightsError", "negative variance", statistics(lambda t: t["variance"].sub_(1e6))),
    OnCoordinator("NaN in the statistics", TRAIN, "one mean", ACCEPT, "WeightsError", "NaN or infinite", statistics(lambda t: t["mean"].view(-1)[:1].fill_(float("nan")))),
    OnCoordinator("statistics of other images", TRAIN, "a count of 10^6", ACCEPT, "WeightsError", "not over the images", statistics(lambda t: t["images"].fill_(10**6))),
    OnCoordinator("pixels in the statistics", TRAIN, "one more tensor", ACCEPT, "WeightsError", "that the model does not have", statistics(lambda t: t.update(image=torch.rand(64, 64)))),
    OnCoordinator("report of another hop", TRAIN, "s01-train, which nobody asked for, signed", COURIER, "ProtocolError", ANSWER, with_values(hop="s01-train")),
    OnCoordinator("report of another run", TRAIN, "signed", COURIER, "ProtocolError", ANSWER, with_values(run="other")),
    OnCoordinator("report of another plan", TRAIN, "signed", COURIER, "ProtocolError", ANSWER, with_values(plan_digest="0" * 64)),
    OnCoordinator("report in another site's name", TRAIN, "signed with its own key", COURIER, "ProtocolError", ANSWER, with_values(sender="south")),
    OnCoordinator("unsigned report", TRAIN, "no signature", COURIER, "CredentialError", UNSIGNED, signed_with(lambda site, content: (content, ""))),
    OnCoordinator("another's report", TRAIN, "signed with another site's key", COURIER, "CredentialError", UNSIGNED, signed_with(lambda site, content: (content, sign(STRANGER, REPORT, content)))),
    OnCoordinator("altered report", TRAIN, "one byte more after it was signed", COURIER, "CredentialError", UNSIGNED, signed_with(lambda site, content: (content + b" ", sign(site.key, REPORT, content)))),
    OnCoordinator("extra field in a report", TRAIN, "`pixels`, signed", COURIER, "ProtocolError", "Report.pixels", with_values(pixels=[1, 2, 3])),
    OnCoordinator("oversized report", TRAIN, "2 MiB, signed", WIRE, "ProtocolError", "text longer than the protocol allows", with_values(code_version="x" * (1 << 21))),
    OnCoordinator("report in another form", TRAIN, "the same with spaces, signed", COURIER, "ProtocolError", "not in the form it was written in", in_answers("status", lambda site, _, answer: site.signed(answer, json.dumps(json.loads(str(answer.fields["report"])), sort_keys=True).encode()))),
    OnCoordinator("metric that is not declared", TRAIN, "`patients_with_flu`", COURIER, "ProtocolError", "not declared", with_values("metrics", patients_with_flu=3.0)),
    OnCoordinator("metric out of its bounds", TRAIN, "a held-out loss of 10^9", COURIER, "ProtocolError", "outside", with_values("metrics", heldout_mim_loss=1e9)),
    OnCoordinator("missing metric", TRAIN, "no number of cases", ACCEPT, "ProtocolError", "lacks metrics.* train_cases", report(lambda r: r["metrics"].pop("train_cases"))),
    OnCoordinator("curve too long", TRAIN, "201 points", COURIER, "ProtocolError", "Report.curve", with_values(curve=[1.0] * 201)),
    OnCoordinator("privacy that was not asked for", TRAIN, "a DP account in an ordinary training", ACCEPT, "ProtocolError", "other differential privacy", with_values(dp={"epsilon": 1.0, "visit_epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.0, "statistics_noise": 1.0, "sample_rate": 0.5, "steps": 3})),
    OnCoordinator("release in a training", TRAIN, "a release that nobody asked for", ACCEPT, "ProtocolError", "lacks a release, or has one that was not asked for", report(in_a_training)),
    OnCoordinator("audit without a release", AUDIT, "none", ACCEPT, "ProtocolError", "lacks a release", with_values(release=None)),
    OnCoordinator("release of another pool", AUDIT, "another digest", ACCEPT, "ProtocolError", "of another pool", with_values("release", pool="c" * 64)),
    OnCoordinator("release of another stage", AUDIT, "stage 1 in the audit of stage 0", ACCEPT, "ProtocolError", "of another pool", with_values("release", stage=1)),
    OnCoordinator("rows out of order", AUDIT, "3, 1", ACCEPT, "ProtocolError", "once, in ascending order", rows(3, 1)),
    OnCoordinator("row dropped twice", AUDIT, "1, 1", ACCEPT, "ProtocolError", "once, in ascending order", rows(1, 1)),
    OnCoordinator("row beyond the pool", AUDIT, "row 999 of 4", ACCEPT, "ProtocolError", "no such rows to drop", rows(999)),
    OnCoordinator("release that names another file", AUDIT, "a digest that can't be made", ACCEPT, "ProtocolError", "not the file that its release names", rows(1)),
    OnCoordinator("release of a file of the site's", AUDIT, "no row dropped, but another file named", ACCEPT, "ProtocolError", "names another file than the pool", with_values("release", dropped=[], released=OTHER)),
    OnCoordinator("release that miscounts", AUDIT, "one image more than there are", ACCEPT, "ProtocolError", "counts 5 and drops", with_values("release", "figures", pool_images=5)),
    OnCoordinator("release against its figures", AUDIT, "copies found, none dropped", ACCEPT, "ProtocolError", "figures say something else", with_values("release", "figures", copies=2)),
    OnCoordinator("loss in an audit", AUDIT, "a metric not asked for", ACCEPT, "ProtocolError", "lacks metrics, or has some not asked for: heldout_mim_loss", with_values("metrics", heldout_mim_loss=0.5)),
    OnCoordinator("evaluation with artefacts", EVALUATE, "a model", ACCEPT, "ProtocolError", "brings artefacts", with_values(model=OTHER)),
    OnCoordinator("evaluation with a curve", EVALUATE, "200 numbers", ACCEPT, "ProtocolError", "brings artefacts", with_values(curve=[1.0] * 200)),
    OnCoordinator("text in a status", TRAIN, "a file name as its error", COURIER, "ProtocolError", "Status.error", fields("status", status='{"data_wait_share":0.0,"error":"/data/patient-7.dcm","images_per_s":0.0,"loss":0.0,"phase":"reading","state":"failed","step":0,"steps":0}')),
    OnCoordinator("letters in a status", TRAIN, "a patient's name as the class of an error", COURIER, "SiteError", "failed with Error; ", fields("status", status='{"data_wait_share":0.0,"error":"JohnDoe","images_per_s":0.0,"loss":0.0,"phase":"reading","state":"failed","step":0,"steps":0}')),
    OnCoordinator("text as an error", TRAIN, "`/data/patient-7.dcm is damaged`", COURIER, "SiteError", "failed with Error; ", error_with("/data/patient-7.dcm is damaged")),
    OnCoordinator("extra field in an answer", TRAIN, "`note`", WIRE, "ProtocolError", "fields missing or unknown", fields("status", note="patient")),
    OnCoordinator("part where none belongs", TRAIN, "pixels with a status", WIRE, "ProtocolError", "part missing, or where none belongs", in_answers("status", lambda site, _, answer: Response(answer.fields, bytes(4096)))),
    OnCoordinator("too large a part", TRAIN, "twice what was asked for", COURIER, "ProtocolError", "are expected", part(lambda data: data + data)),
    OnCoordinator("zip bomb", TRAIN, "a part that inflates to 256 MiB", COURIER, "ProtocolError", "does not hold 1 to", part(inflated, encoding="deflate")),
    OnCoordinator("model that is not its digest", TRAIN, "one bit turned on the way", COURIER, "ProtocolError", "announced sha256", part(lambda data: bytes([data[0] ^ 1]) + data[1:])),
)  # fmt: skip
