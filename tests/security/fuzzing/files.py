"""What is read as a file: enrolment, tensors, parts, chains, plans, settings and bundles, and the readers of each."""

from __future__ import annotations

import io
import json
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load
from tests.security.fuzzing import containers, forgeries, mutations
from tests.security.fuzzing.sides import (
    COORDINATOR,
    GEOMETRY,
    JOIN,
    MODEL,
    NORTH,
    POOL,
    REQUEST,
    SHAPE,
    STATISTICS,
    STRANGER,
    Kind,
    artefact_of,
    handoffs,
    reports,
)

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.bundle import FEDERATION, MANIFEST, check_bundle
from invcoss_common.canonical import canonical_json
from invcoss_common.chain import Value, verify, writing
from invcoss_common.config import load_plan, parse_plan
from invcoss_common.encoding import FOR_IMAGES, FOR_WEIGHTS, decode, encode
from invcoss_common.enrolment import EnrolmentRequest, JoinFile, check_name, open_signed, read_enrolment_file
from invcoss_common.errors import (
    BundleRefused,
    ChainError,
    CredentialError,
    DataError,
    PlanError,
    ProtocolError,
    WeightsError,
)
from invcoss_common.pools import mapped_images, pool_shape
from invcoss_common.weights import model_from_bytes, model_to_bytes, read_model
from invcoss_server.accept import check_model, check_statistics
from invcoss_site.home import load_home
from invcoss_site.policy import POLICY, load_policy

CHAIN_RECORDS = 12


def enrolment_files(root: Path) -> dict[str, Kind]:
    """A request at the coordinator, a join file at the site; those `own` are signed by whoever altered them."""
    found: dict[str, Kind] = {}
    file = root / "enrolment.json"
    for record, key in ((REQUEST, NORTH), (JOIN, COORDINATOR)):
        kind = type(record)

        def receive(data: bytes, kind: type[EnrolmentRequest] | type[JoinFile] = kind) -> None:
            file.write_bytes(data)
            assert open_signed(kind, read_enrolment_file(file)).to_bytes() == data

        def own(
            data: bytes,
            kind: type[EnrolmentRequest] | type[JoinFile] = kind,
            key: Ed25519PrivateKey = key,
            receive: Callable[[bytes], None] = receive,
        ) -> None:
            with suppress(ValueError, RecursionError, AttributeError):
                fields = {name: value for name, value in json.loads(data).items() if name != "signature"}
                signature = key.sign(f"InvCoSS {kind.kind}\n".encode() + canonical_json(fields)).hex()
                data = (json.dumps({**fields, "signature": signature}, indent=2, sort_keys=True) + "\n").encode()
            receive(data)

        name, originals = kind.kind.replace(" ", "-"), (record.to_bytes(),)
        altered = mutations.altered_json(originals)
        found[name] = Kind(originals, receive, altered, (CredentialError,), sealed=True)
        found[f"{name}, own"] = Kind(originals, own, altered, (CredentialError,))
    return found


def tensor_files(root: Path) -> dict[str, Kind]:
    """A model at either side, statistics at the coordinator, a pool at a site: what their digests do not vouch for."""
    handoff, report = handoffs()[0], reports()[0]
    file = root / "tensors"

    def receive_model(data: bytes) -> None:
        file.write_bytes(data)
        check_model(file, handoff)
        read = read_model(file, SHAPE, [GEOMETRY])
        again = model_from_bytes(model_to_bytes(read), SHAPE, [GEOMETRY])
        assert all(torch.equal(again.state_dict()[name], one) for name, one in read.state_dict().items())

    def receive_statistics(data: bytes) -> None:
        file.write_bytes(data)
        check_statistics(file, report, handoff.task)
        taken = load(data)
        assert int(taken["images"]) == report.metrics["train_images"] and bool((taken["variance"] >= 0).all())

    def receive_pool(data: bytes) -> None:
        file.write_bytes(data)
        shape, read = pool_shape(file), mapped_images(file)
        assert (read.dtype, read.shape) == (np.uint8, shape)

    return {
        name: Kind((original,), receive, containers.altered_tensors(original), (WeightsError, ProtocolError))
        for name, original, receive in (
            ("model", MODEL, receive_model),
            ("statistics", STATISTICS, receive_statistics),
            ("pool", POOL, receive_pool),
        )
    }


def parts(root: Path) -> Kind:
    """A part of an artefact behind the line that names its encoding; it must come out as the artefact, to the bit."""
    content = bytes(range(250)) * 8
    artefact = artefact_of(content)

    def receive(data: bytes) -> None:
        encoding, _, part = data.partition(b"\n")
        try:
            store = ArtefactStore(root / "parts")
            store.append(artefact, 0, decode(part, encoding.decode(errors="replace"), artefact.size_bytes))
            assert (store.path(artefact).read_bytes() if store.has(artefact) else content) == content
        finally:
            store.keep_only(set())

    encoded = [encode(content, name) for name in ("", FOR_IMAGES, FOR_WEIGHTS)]
    originals = tuple(name.encode() + b"\n" + part for name, part in encoded)
    return Kind(originals, receive, containers.altered_part(originals), (ProtocolError,))


def chain_lines(path: Path, key: Ed25519PrivateKey, count: int) -> list[bytes]:
    """The lines of a new signed chain, with their newlines."""
    with writing(path, "journal of site north", key) as chain:
        for number in range(count):
            values: dict[str, Value] = {"verb": "get", "bytes": number, "pools": ["a" * 64], "hop": "s00-train"}
            chain.add("answered", values, f"2026-01-01T00:00:{number % 60:02}.000+00:00")
    return path.read_bytes().splitlines(keepends=True)


def chain_kind(path: Path, key: Ed25519PrivateKey, count: int) -> tuple[Kind, list[bytes]]:
    """A chain in `path` whose head an auditor has written down, and its lines."""
    lines = chain_lines(path, key, count)
    head = verify(path).head

    def receive(data: bytes) -> None:
        path.write_bytes(data)
        verify(path, [key.public_key()], head)

    altered = forgeries.altered_chain(lines, STRANGER)
    return Kind((b"".join(lines),), receive, altered, (ChainError,), sealed=True), lines


def chains(root: Path) -> dict[str, Kind]:
    return {
        name: chain_kind(root / f"{name}.jsonl", key, CHAIN_RECORDS)[0]
        for name, key in (("journal", NORTH), ("ledger", COORDINATOR))
    }


PLAN = {
    "name": "demo",
    "size": "nano",
    "seed": 3,
    "train": {"steps": 3, "batch_size": 4, "betas": [0.9, 0.95]},
    "replay": {"loss": "distil", "weight": 1.0},
    "inversion": {"pool_size": 4, "steps": 3},
    "dp": {"noise_multiplier": 1.0},
    "relay": {"poll_s": 0.5, "audit": True, "wire_dtype": "bfloat16"},
    "modalities": {"us": {"ndim": 2, "normalisation": "percentile", "low": 1.0, "high": 99.0}},
    "stages": [
        {"site": "north", "modality": "us", "epochs": 2},
        {"site": "south", "modality": "ct", "spacing_mm": [1.0, 1.0, 2.5]},
    ],
    "simulation": {"north": {"phantoms": 12}, "south": {"folder": "ct", "index": ["train.csv"]}},
}


def plan_file(root: Path) -> Kind:
    file = root / "plan.toml"

    def receive(data: bytes) -> None:
        file.write_bytes(data)
        found = load_plan(file)
        again = parse_plan(found.model_dump(mode="json"), "plan")
        assert (again, again.digest()) == (found, found.digest())
        assert all(found.geometry(stage).tokens for stage in range(len(found.stages)))

    return Kind((mutations.to_toml(PLAN).encode(),), receive, mutations.altered_toml([PLAN]), (PlanError,))


def site_settings(root: Path) -> dict[str, Kind]:
    """A site's own two files, which nobody sends: they must not end its service in a traceback."""
    folder = root / "settings"
    folder.mkdir()
    home = {"name": "north", "data": "images", "index": ["a.csv"], "processes": 2}
    home["transfer"] = {"max_mbit_s": 100, "hours": "20:00-06:00"}
    policy = {"trust": {"plans": ["a" * 64], "approval": True}, "egress": {"digits": 4, "max_upload_gb": 5.5}}
    policy |= {"work": {"kinds": ["train"], "modalities": ["xray"], "max_epochs": 3, "hours": "18:00-07:00"}}
    policy |= {"cases": {"min_train": 20}, "dp": {"max_epsilon": 8.0}, "audit": {"scales": [0.9, 1.0]}}

    def receive_home(data: bytes) -> None:
        (folder / "site.toml").write_bytes(data)
        check_name(load_home(folder).name)

    def receive_policy(data: bytes) -> None:
        (folder / POLICY).write_bytes(data)
        found = load_policy(folder)
        assert type(found).model_validate(found.model_dump()) == found

    return {
        name: Kind((mutations.to_toml(table).encode(),), receive, mutations.altered_toml([table]), (DataError,))
        for name, table, receive in (("site.toml", home, receive_home), (POLICY, policy, receive_policy))
    }


def app_bundle() -> Kind:
    """The bundle that Flower brings; what is taken must be, as Flower reads it, the text of the installed software."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("pyproject.toml", FEDERATION), (MANIFEST, "pyproject.toml,0,0")):
            archive.writestr(zipfile.ZipInfo(name), text)

    def receive(data: bytes) -> None:
        check_bundle(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert set(archive.namelist()) <= {"pyproject.toml", MANIFEST}
            assert tomllib.loads(archive.read("pyproject.toml").decode()) == tomllib.loads(FEDERATION)

    return Kind((file.getvalue(),), receive, containers.altered_bundle(), (BundleRefused,))
