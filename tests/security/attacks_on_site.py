"""Attacks on a site, as data. Most are by a hostile coordinator, who has the key that the site trusts."""

# ruff: noqa: E501 - tables, one attack a line

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from flwr.app import ConfigRecord, RecordDict
from safetensors.torch import load, save
from tests.security.attacked import SITE, AttackedSite
from torch import Tensor

from invcoss_common.bundle import FEDERATION
from invcoss_common.config import DpConfig, EvaluateConfig, TrainConfig
from invcoss_common.keys import generate_signing_key, sign
from invcoss_common.modality import SIZES
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import HANDOFF, Artefact, HandOff, to_bytes
from invcoss_site.approval import digest_of
from invcoss_site.launch import check_only
from invcoss_site.work import take_lock

COORDINATOR, BETWEEN = "coordinator", "somebody in between"
DESK, WORKER, WIRE, LAUNCHER = "the desk", "the worker", "the wire format", "the launcher"
CASES = "[cases]\nmin_train = 1\nmin_heldout = 1\n"
STRANGER = generate_signing_key()


class OnSite(NamedTuple):
    """`says` is searched for in the site's own log: the attacker gets the class of the error only."""

    name: str
    who: str
    tried: str
    refuses: str
    error: str
    says: str
    act: Callable[[AttackedSite], object]


def with_policy(site: AttackedSite, text: str) -> AttackedSite:
    site.policy(text if "[cases]" in text else CASES + text)
    return site


# The Flower bundle


def bundle(text: str = FEDERATION, **others: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in {"pyproject.toml": text, ".info/CONTENT": "", **others}.items():
            archive.writestr(name, content)
    return data.getvalue()


def code_in_the_bundle(site: AttackedSite) -> None:
    check_only(bundle(**{"evil.py": "import os"}), skip_prompt=True)


def another_bundle(site: AttackedSite) -> None:
    check_only(bundle(FEDERATION.replace("invcoss_site.app:app", "os:system")), skip_prompt=True)


# Whose hand-off it is, and when


def changed_after_signing(site: AttackedSite) -> None:
    handoff = site.hand_off()
    site.deliver(handoff)
    content = to_bytes(handoff)
    site.start(content.replace(b'"seed":3', b'"seed":4'), site.sign(content))


def cut_after_signing(site: AttackedSite) -> None:
    handoff = site.hand_off()
    site.deliver(handoff)
    site.start(to_bytes(handoff)[:-1], site.sign(to_bytes(handoff)))


def too_long(site: AttackedSite) -> None:
    content = b'{"hop":"s02-train","padding":"' + b"x" * (1 << 20) + b'"}'
    site.start(content)


def long_within_the_wire(site: AttackedSite) -> None:
    """Characters of several bytes: fewer than the wire format counts, more than a record may have."""
    site.start(b'{"hop":"' + "ü".encode() * (1 << 19) + b'"}')


def replayed(site: AttackedSite) -> None:
    first = site.state.hand_off("s00-train")
    assert first is not None
    site.start(first)


def reordered(site: AttackedSite) -> None:
    site.start(site.hand_off(sequence=site.state.last_sequence() - 1))


def same_number(site: AttackedSite) -> None:
    site.start(site.hand_off(sequence=site.state.last_sequence()))


def downgraded(site: AttackedSite) -> None:
    """Protocol 1 has neither signatures nor numbers."""
    handoff = site.hand_off(protocol=1, sequence=0, audited=False)
    handed = {name: value for name, value in json.loads(handoff.model_dump_json()).items() if name not in HandOff.added}
    site.start(json.dumps(handed, sort_keys=True, separators=(",", ":")).encode(), protocol=1)


def downgraded_but_signed(site: AttackedSite) -> None:
    handoff = site.hand_off(protocol=1, sequence=0, audited=False)
    site.start(handoff)


# What is not in the protocol


def with_field(*where: str) -> Callable[[AttackedSite], None]:
    """A signed hand-off with a further field."""

    def act(site: AttackedSite) -> None:
        handed = json.loads(to_bytes(site.hand_off("evaluate")))
        inner = handed
        for name in where:
            inner = inner[name]
        inner["per_image"] = True
        site.start(json.dumps(handed, sort_keys=True, separators=(",", ":")).encode())

    return act


def with_value(name: str, value: str, *where: str) -> Callable[[AttackedSite], None]:
    def act(site: AttackedSite) -> None:
        handed = json.loads(to_bytes(site.hand_off("evaluate")))
        inner = handed
        for part in where:
            inner = inner[part]
        inner[name] = value
        content = json.dumps(handed, sort_keys=True, separators=(",", ":")).encode()
        fields: dict[str, str | int] = {"handoff": content.decode(), "attempt": 1, "signature": site.sign(content)}
        site.ask("start", **fields)

    return act


def unknown_verb(site: AttackedSite) -> None:
    site.ask("run")


def second_record(site: AttackedSite) -> None:
    record = RecordDict({"ctl": ConfigRecord({"verb": "hello"}), "code": ConfigRecord({"run": "ls"})})
    site.send(record)


# Files


def weights(site: AttackedSite) -> dict[str, Tensor]:
    known = site.state.hand_off("s01-eval-00")
    assert known is not None
    return load(site.content(known.model))


def model_with(edit: Callable[[dict[str, Tensor]], object], **metadata: str) -> Callable[[AttackedSite], None]:
    def act(site: AttackedSite) -> None:
        tensors = weights(site)
        edit(tensors)
        site.start(site.with_model(save(tensors, metadata or None)))

    return act


def first_with(value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[min(tensors)].view(-1)[0] = value

    return edit


def reshaped(tensors: dict[str, Tensor]) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1])
    tensors[name] = tensors[name].T.contiguous()


def as_double(tensors: dict[str, Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].double()


class Payload:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("unpickled",)


PICKLE = pickle.dumps(Payload())


def another_file(site: AttackedSite) -> None:
    announced = Artefact(sha256="a" * 64, size_bytes=9)
    site.put(announced, b"otherwise")


def too_long_a_part(site: AttackedSite) -> None:
    site.put(Artefact(sha256="a" * 64, size_bytes=9), b"more than nine bytes")


def gap(site: AttackedSite) -> None:
    site.put(Artefact(sha256="a" * 64, size_bytes=99), b"here", offset=9)


def before_the_beginning(site: AttackedSite) -> None:
    site.put(Artefact(sha256="a" * 64, size_bytes=99), b"here", offset=-9)


def bomb(site: AttackedSite) -> None:
    deflate = zlib.compressobj(9)
    packed = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(256)) + deflate.flush()
    site.put(Artefact(sha256="a" * 64, size_bytes=1 << 20), packed, encoding="deflate")


def unknown_encoding(site: AttackedSite) -> None:
    site.put(Artefact(sha256="a" * 64, size_bytes=9), b"123456789", encoding="lzma")


def large_pool(site: AttackedSite) -> None:
    with_policy(site, "[work]\nmax_disk_gb = 0.1\n")
    site.ask("have", sha256="a" * 64, size=10**9)


def large_pool_sent_at_once(site: AttackedSite) -> None:
    with_policy(site, "[work]\nmax_disk_gb = 0.1\n")
    site.put(Artefact(sha256="a" * 64, size_bytes=10**9), b"the first part")


def pool_with_more(site: AttackedSite) -> None:
    images = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    site.start(site.with_pool(save({"images": images, "more": images + 1})))


# What may be asked for


def file_of_the_site(site: AttackedSite) -> None:
    """An artefact that lies at the site, but came to it."""
    known = site.bring(b"a file in the spool")
    site.put(known, site.content(known))
    site.ask("get", sha256=known.sha256, size=known.size_bytes, offset=0, length=9, encoding="")


def part_of_own(offset: int, length: int) -> Callable[[AttackedSite], object]:
    """Of the statistics of the newest training, whose report is there."""

    def act(site: AttackedSite) -> None:
        report = json.loads((site.home.hop_folder("s01-train") / "report.json").read_bytes())
        named = report["statistics"]
        site.ask("get", sha256=named["sha256"], size=named["size_bytes"], offset=offset, length=length, encoding="")

    return act


def not_delivered(site: AttackedSite) -> None:
    site.start(to_bytes(site.hand_off(model=Artefact(sha256="a" * 64, size_bytes=9))))


# What the site's policy says


def asked_under(policy: str, kind: str = "train", **changes: object) -> Callable[[AttackedSite], object]:
    return lambda site: with_policy(site, policy).start(site.hand_off(kind, **changes))


def trained(**changes: object) -> dict[str, TrainConfig]:
    return {"train": TrainConfig.model_validate({"batch_size": 4, "steps": 3} | changes)}


def denied(site: AttackedSite) -> None:
    handoff = site.hand_off("evaluate")
    with_policy(site, '[trust]\napproval = true\napprove_kinds = ["evaluate"]\n')
    site.write(f"approvals/{digest_of(handoff)}.json", json.dumps({"word": "denied"}))
    site.start(handoff)


def denied_and_altered(site: AttackedSite) -> None:
    """Where a person approved another hand-off of that name. It waits, and is refused once somebody looks at it."""
    with_policy(site, '[trust]\napproval = true\napprove_kinds = ["evaluate"]\n')
    seen, sent = site.hand_off("evaluate"), site.hand_off("evaluate", plan_digest="1" * 64)
    site.write(f"approvals/{digest_of(seen)}.json", json.dumps({"word": "approved"}))
    site.write(f"approvals/{digest_of(sent)}.json", json.dumps({"word": "denied"}))
    site.start(sent)


DP = DpConfig(noise_multiplier=0.5, statistics_noise=5.0)


# The audit as an oracle


def pool_of(site: AttackedSite, seed: int) -> bytes:
    known = site.state.hand_off("s00-audit")
    assert known is not None
    size = known.task.geometry.size
    noise = torch.rand(4, 1, *size, generator=torch.Generator().manual_seed(seed))
    return pool_to_bytes((255 * noise).byte().numpy())


def audits_of_a_model_made_up(site: AttackedSite) -> None:
    handoff = site.with_pool(pool_of(site, 0), "audit")
    tensors = weights(site)
    first_with(0.5)(tensors)
    site.start(handoff.model_copy(update={"model": site.bring(save(tensors))}))


def audit_for_another_run(site: AttackedSite) -> None:
    site.start(site.with_pool(pool_of(site, 0), "audit").model_copy(update={"run": "another"}))


def audit_of_another_stage(site: AttackedSite) -> None:
    """The model of the second stage, as if it were that of the first."""
    report = json.loads((site.home.hop_folder("s01-train") / "report.json").read_bytes())
    later = Artefact.model_validate(report["model"])
    site.start(site.with_pool(pool_of(site, 0), "audit").model_copy(update={"model": later}))


def one_pool_too_many(site: AttackedSite) -> None:
    with_policy(site, "[audit]\nmax_audits = 1\n")
    site.start(site.with_pool(pool_of(site, 0), "audit"))


# Under a name that is taken


def second_under_a_running_name(site: AttackedSite) -> None:
    lock = take_lock(site.home, "s01-eval-00")  # as its worker has while it works
    assert lock is not None
    try:
        site.start(site.hand_off("evaluate", hop="s01-eval-00"))
    finally:
        os.close(lock)


TWO = "s00-train/../../../keys"

ON_SITE = (
    OnSite("code in the bundle", COORDINATOR, "a Flower bundle with a module", LAUNCHER, "BundleRefused", "code is never accepted", code_in_the_bundle),
    OnSite("another bundle", COORDINATOR, "the reviewed bundle, but with another app", LAUNCHER, "BundleRefused", "not the one of the software that was reviewed", another_bundle),
    OnSite("unsigned hand-off", BETWEEN, "no signature", DESK, "CredentialError", "lacks the signature of the coordinator", lambda s: s.start(s.hand_off(), "")),
    OnSite("another's hand-off", BETWEEN, "the signature of another key", DESK, "CredentialError", "lacks the signature of the coordinator", lambda s: s.start(s.hand_off(), sign(STRANGER, HANDOFF, to_bytes(s.hand_off())))),
    OnSite("altered hand-off", BETWEEN, "one digit changed after it was signed", DESK, "CredentialError", "lacks the signature of the coordinator", changed_after_signing),
    OnSite("cut hand-off", BETWEEN, "the last byte left out", DESK, "CredentialError", "lacks the signature of the coordinator", cut_after_signing),
    OnSite("oversized hand-off", COORDINATOR, "more than 1 MiB of text, signed", WIRE, "ProtocolError", "text longer than the protocol allows", too_long),
    OnSite("oversized in bytes", COORDINATOR, "1 MiB of bytes in fewer characters, signed", DESK, "ProtocolError", "larger than the protocol allows", long_within_the_wire),
    OnSite("replayed hand-off", COORDINATOR, "the first hand-off of the run again, as it was signed", DESK, "ProtocolError", "stale or replayed", replayed),
    OnSite("reordered hand-off", COORDINATOR, "a new one under an earlier number", DESK, "ProtocolError", "stale or replayed", reordered),
    OnSite("number used twice", COORDINATOR, "another one under the newest number", DESK, "ProtocolError", "stale or replayed", same_number),
    OnSite("hand-off for another site", COORDINATOR, "signed, receiver `south`", DESK, "ProtocolError", "for another site", lambda s: s.start(s.hand_off(receiver="south"))),
    OnSite("downgrade to protocol 1", BETWEEN, "protocol 1, which has no signatures", DESK, "CredentialError", "lacks the signature of the coordinator", downgraded),
    OnSite("signed downgrade", COORDINATOR, "protocol 1, which has no numbers, signed", DESK, "ProtocolError", "stale or replayed", downgraded_but_signed),
    OnSite("unknown protocol", COORDINATOR, "a request of protocol 3", WIRE, "ProtocolError", "protocol 3 is not spoken here", lambda s: s.ask("status", hop="s00-train", protocol=3)),
    OnSite("hand-off of an unknown protocol", COORDINATOR, "protocol 3 in a hand-off, signed", DESK, "ProtocolError", "HandOff.protocol: protocol 3 is not spoken", lambda s: s.start(s.hand_off(protocol=3))),
    OnSite("unknown verb", COORDINATOR, "`run`", WIRE, "ProtocolError", "unknown verb", unknown_verb),
    OnSite("extra field in a request", COORDINATOR, "`status` with a path", WIRE, "ProtocolError", "fields missing or unknown", lambda s: s.ask("status", hop="s00-train", path="/etc")),
    OnSite("extra record in a message", COORDINATOR, "a second Flower record", WIRE, "ProtocolError", "record that the protocol does not know", second_record),
    OnSite("part where none belongs", COORDINATOR, "`status` with bytes", WIRE, "ProtocolError", "part missing, or where none belongs", lambda s: s.ask("status", b"bytes", hop="s00-train")),
    OnSite("extra field in a hand-off", COORDINATOR, "`per_image`, signed", DESK, "ProtocolError", "HandOff.per_image", with_field()),
    OnSite("per-image metrics", COORDINATOR, "a task with a field `per_image`, signed", DESK, "ProtocolError", "HandOff.task.per_image", with_field("task")),
    OnSite("per-image losses", COORDINATOR, "an evaluation with a field `per_image`, signed", DESK, "ProtocolError", "HandOff.task.evaluate.per_image", with_field("task", "evaluate")),
    OnSite("unknown kind of task", COORDINATOR, "`export`, signed", DESK, "ProtocolError", "HandOff.task.kind", with_value("kind", "export", "task")),
    OnSite("loss of a single image", COORDINATOR, "an evaluation of one held-out image", WORKER, "TooFewCases", "1 held-out cases", asked_under("[cases]\nmin_train = 1\nmin_heldout = 2\n", "evaluate", task={"evaluate": EvaluateConfig(max_images=1)})),
    OnSite("extra tensors in the model", COORDINATOR, "one more tensor", WORKER, "WeightsError", "that the model does not have", model_with(lambda t: t.update(more=torch.zeros(9)))),
    OnSite("model with a missing tensor", COORDINATOR, "one tensor less", WORKER, "WeightsError", "is missing", model_with(lambda t: t.pop(min(t)))),
    OnSite("model of another shape", COORDINATOR, "a matrix transposed", WORKER, "WeightsError", "the model needs", model_with(reshaped)),
    OnSite("model of another type", COORDINATOR, "float64", WORKER, "WeightsError", "torch.float64; the model needs", model_with(as_double)),
    OnSite("NaN in the model", COORDINATOR, "one value", WORKER, "WeightsError", "NaN or infinite", model_with(first_with(float("nan")))),
    OnSite("metadata in the model", COORDINATOR, "a text in its header", WORKER, "WeightsError", "carries metadata", model_with(lambda t: None, run="ls")),
    OnSite("pickle as a model", COORDINATOR, "a pickle that makes a folder", WORKER, "WeightsError", "not a safetensors file", lambda s: s.start(s.with_model(PICKLE))),
    OnSite("pickle as a pool", COORDINATOR, "the same", WORKER, "ProtocolError", "not a pool", lambda s: s.start(s.with_pool(PICKLE))),
    OnSite("pool with more in it", COORDINATOR, "a second tensor", WORKER, "ProtocolError", "not a pool", pool_with_more),
    OnSite("pool of other numbers", COORDINATOR, "float32 images", WORKER, "ProtocolError", "not a pool", lambda s: s.start(s.with_pool(save({"images": torch.zeros(4, 1, 64, 64)})))),
    OnSite("pool of another size", COORDINATOR, "images of another size than it says", WORKER, "ProtocolError", "images of another size", lambda s: s.start(s.with_pool(save({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)})))),
    OnSite("artefact that is not its digest", COORDINATOR, "other bytes than announced", DESK, "ProtocolError", "announced sha256", another_file),
    OnSite("hand-off of what was not sent", COORDINATOR, "a model that is not there", DESK, "ProtocolError", "artefacts that were not delivered", not_delivered),
    OnSite("part beyond the announced size", COORDINATOR, "20 bytes of 9", DESK, "ProtocolError", "where at most 9 are expected", too_long_a_part),
    OnSite("part behind a gap", COORDINATOR, "at byte 9 of none", DESK, "ProtocolError", "does not continue an upload", gap),
    OnSite("part before the beginning", COORDINATOR, "at byte -9", DESK, "ProtocolError", "does not continue an upload", before_the_beginning),
    OnSite("zip bomb", COORDINATOR, "a part that inflates to 256 times its limit", DESK, "ProtocolError", "does not hold 1 to 1048576 bytes", bomb),
    OnSite("unknown encoding", COORDINATOR, "`lzma`", DESK, "ProtocolError", "unknown encoding", unknown_encoding),
    OnSite("oversized pool, announced", COORDINATOR, "10^9 bytes where 10^8 are allowed", DESK, "LimitExceeded", "max_disk_gb", large_pool),
    OnSite("oversized pool, sent", COORDINATOR, "its first part, unannounced", DESK, "LimitExceeded", "max_disk_gb", large_pool_sent_at_once),
    OnSite("path as a hop, asked for", COORDINATOR, "`s00-train/../../../keys`", DESK, "ProtocolError", "not the name of a hop", lambda s: s.ask("status", hop=TWO)),
    OnSite("path as a hop, called off", COORDINATOR, "the same in `abort`", DESK, "ProtocolError", "not the name of a hop", lambda s: s.ask("abort", hop=TWO)),
    OnSite("path as a hop, in a hand-off", COORDINATOR, "the same, signed", DESK, "ProtocolError", "HandOff.hop", with_value("hop", TWO)),
    OnSite("path as a run", COORDINATOR, "`../../policy`, signed", DESK, "ProtocolError", "HandOff.run", with_value("run", "../../policy")),
    OnSite("path as a receiver", COORDINATOR, f"`../{SITE}`, signed", DESK, "ProtocolError", "HandOff.receiver", with_value("receiver", f"../{SITE}")),
    OnSite("path as a digest", COORDINATOR, "`../../keys/signing.pem`", DESK, "ProtocolError", "not the name and size of an artefact", lambda s: s.ask("have", sha256="../../keys/signing.pem", size=9)),
    OnSite("path as a digest, read", COORDINATOR, "the same in `get`", DESK, "ProtocolError", "not the name and size of an artefact", lambda s: s.ask("get", sha256="../../keys/signing.pem", size=9, offset=0, length=9, encoding="")),
    OnSite("file that no report names", COORDINATOR, "an artefact that lies in the spool", DESK, "ProtocolError", "no finished report of this site names", file_of_the_site),
    OnSite("part outside", COORDINATOR, "from behind the end of its statistics", DESK, "ProtocolError", "outside the artefact", part_of_own(1 << 30, 9)),
    OnSite("part before the file", COORDINATOR, "from byte -9", DESK, "ProtocolError", "outside the artefact", part_of_own(-9, 9)),
    OnSite("too large a part", COORDINATOR, "2^40 bytes at once", DESK, "ProtocolError", "outside the artefact", part_of_own(0, 1 << 40)),
    OnSite("plan not agreed to", COORDINATOR, "a plan not on the list", DESK, "PlanNotAllowed", r"\[trust\] plans", asked_under(f'[trust]\nplans = ["{"1" * 64}"]\n')),
    OnSite("kind of work not done", COORDINATOR, "a training where only evaluations are", DESK, "TaskNotAllowed", r"\[work\] kinds", asked_under('[work]\nkinds = ["evaluate"]\n')),
    OnSite("modality not allowed", COORDINATOR, "X-ray where only CT is", DESK, "TaskNotAllowed", r"\[work\] modalities", asked_under('[work]\nmodalities = ["ct"]\n')),
    OnSite("too many epochs", COORDINATOR, "9 of 5", DESK, "LimitExceeded", r"9 epochs.*\[work\] max_epochs", asked_under("[work]\nmax_epochs = 5\n[audit]\nrequired = false\n", task=trained(steps=None, epochs=9))),
    OnSite("too many steps", COORDINATOR, "3 of 2", DESK, "LimitExceeded", r"3 steps.*\[work\] max_steps", asked_under("[work]\nmax_steps = 2\n")),
    OnSite("epochs in disguise", COORDINATOR, "so many steps that they are 100 epochs", WORKER, "LimitExceeded", r"epochs.*\[work\] max_epochs", asked_under("[work]\nmax_epochs = 5\n", task=trained(steps=300))),
    OnSite("too large a model", COORDINATOR, "ViT-B where 10^7 parameters are allowed", DESK, "LimitExceeded", r"\[work\] max_parameters", asked_under("[work]\nmax_parameters = 10_000_000\n", task={"model": SIZES["base"].model})),
    OnSite("without the audit", COORDINATOR, "`audited` false where the site requires it", DESK, "AuditRequired", r"\[audit\] required", asked_under("[audit]\nrequired = true\n", audited=False)),
    OnSite("without privacy", COORDINATOR, "no DP where it is required", DESK, "DpRequired", r"\[dp\] required", asked_under("[dp]\nrequired = true\n")),
    OnSite("with less noise", COORDINATOR, "0.5 where 0.8 is the least", DESK, "DpRequired", r"\[dp\] min_noise_multiplier", asked_under("[dp]\nmin_noise_multiplier = 0.8\n", dp=DP)),
    OnSite("with a worthless delta", COORDINATOR, "0.05", DESK, "DpRequired", r"\[dp\] max_delta", asked_under("[dp]\nrequired = true\n", dp=DP.model_copy(update={"delta": 0.05}))),
    OnSite("beyond the privacy budget", COORDINATOR, "a training of a larger epsilon", WORKER, "BudgetSpent", r"\[dp\] max_epsilon", asked_under("[dp]\nmax_epsilon = 0.1\n", dp=DP)),
    OnSite("too few cases", COORDINATOR, "a training on 9 cases where 100 are the least", WORKER, "TooFewCases", r"\[cases\] min_train", asked_under("[cases]\nmin_train = 100\nmin_heldout = 1\n")),
    OnSite("too few held-out cases", COORDINATOR, "an evaluation on as few", WORKER, "TooFewCases", r"\[cases\] min_heldout", asked_under("[cases]\nmin_heldout = 100\n", "evaluate")),
    OnSite("not approved", COORDINATOR, "a hand-off that a person refused", WORKER, "NotApproved", "was refused here", denied),
    OnSite("another than was approved", COORDINATOR, "a hand-off changed after the person's word, and looked at again", WORKER, "NotApproved", "was refused here", denied_and_altered),
    OnSite("audit of a model made up", COORDINATOR, "a pool and a model of its choosing", WORKER, "TaskNotAllowed", "this site did not train", audits_of_a_model_made_up),
    OnSite("audit for another run", COORDINATOR, "the site's model, under the name of another run", WORKER, "TaskNotAllowed", "this site did not train", audit_for_another_run),
    OnSite("audit of another stage", COORDINATOR, "the site's model of another stage", WORKER, "TaskNotAllowed", "this site did not train", audit_of_another_stage),
    OnSite("audit as an oracle", COORDINATOR, "one pool more than `max_audits`", WORKER, "LimitExceeded", r"2 pools of one model.*\[audit\] max_audits", one_pool_too_many),
    OnSite("second hand-off of a running name", COORDINATOR, "while the first is worked on", DESK, "HopBusy", "another hand-off of this name", second_under_a_running_name),
)  # fmt: skip
