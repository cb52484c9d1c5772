"""A table of attacks on a real deployment, and what refuses each; docs/attacks.md is this table in words."""

import base64
import json
import re
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from tests.federation.deployment import Deployment
from tests.federation.loopback import LoopbackCourier, site_of_today
from tests.federation.plans import tiny_plan
from tests.servers import coordinator

from invcoss_common.bundle import FEDERATION
from invcoss_common.canonical import sha256_file
from invcoss_common.errors import CredentialError, ProtocolError
from invcoss_common.keys import load_ec_key
from invcoss_common.records import Report, Response, from_bytes, to_bytes
from invcoss_common.supervise import flower_environment, free_port, program_path
from invcoss_common.wire import decode_request, decode_response, encode_response
from invcoss_server.flower_run import call_flower
from invcoss_server.gate import MAX_BODY_BYTES, NOTHING_ELSE
from invcoss_server.provision import init_consortium, load_consortium
from invcoss_server.relay import relay
from invcoss_server.runs import add_run
from invcoss_server.state import RunState
from invcoss_server.synthesis import synthesise_here
from invcoss_site.connection import find_way, secure
from invcoss_site.enrol import init_site, load_authority, load_join
from invcoss_site.simulated import simulated_home
from invcoss_site.visit import visit

pytestmark = pytest.mark.slow

# north is honest and at work, south is revoked while it is at work; the tests have the keys of mallory, who is enrolled
PLAN = tiny_plan(stages=[{"site": site, "modality": "xray"} for site in ("north", "south", "mallory")], simulation={})


def plan_for(name, site):
    stages = [{"site": site, "modality": "xray"}]
    return tiny_plan(name=name, stages=stages, simulation={}, relay={"poll_s": 0.2, "answer_s": 60.0})


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The deployment under attack, with a run that sleeps; south is revoked, and its service still runs."""
    with Deployment(tmp_path_factory.mktemp("attacked"), PLAN) as deployment:
        deployment.enrol()
        sleeping = add_run(deployment.consortium, plan_for("sleeping", "mallory"))
        sleeping.state.want("paused")
        for name in ("coordinator", "north", "south"):
            deployment.start(name)
        for site in ("north", "south"):
            deployment.wait_until(
                lambda site=site: "SuperNode ID" in log_of(deployment, site), 120, f"letting in {site}"
            )
        deployment.server("revoke-site", deployment.consortium, "south")
        deployment.wait_until(
            lambda: "a key of site south is revoked" in said(deployment, "coordinator"), 60, "telling Flower of it"
        )
        yield deployment


@pytest.fixture
def untouched(attacked):
    """For attacks in which the coordinator must store nothing at all."""
    before = digests(attacked.consortium / "runs")
    yield
    assert before
    assert digests(attacked.consortium / "runs") == before


def digests(folder):
    return {file.relative_to(folder): sha256_file(file) for file in folder.rglob("*") if file.is_file()}


def said(deployment, name):
    return (deployment.root / f"{name}.log").read_text()


def log_of(deployment, site):
    log = deployment.home_folder(site) / "log" / "supernode.log"
    return log.read_text() if log.exists() else ""


def port_of(deployment):
    return load_consortium(deployment.consortium).port


# A SuperNode that must not be let in, or must not let itself be fooled


def supernode(tmp_path, key, authority, port):
    """What a SuperNode says that dials localhost:`port`, until it ends by itself."""
    (tmp_path / "secret").write_bytes(bytes(32))
    command = [
        program_path("flower-supernode"),
        *("--superlink", f"localhost:{port}", "--root-certificates", authority, "--auth-supernode-private-key", key),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port())),
        *("--superexec-auth-secret-file", tmp_path / "secret"),
    ]
    env = flower_environment(tmp_path / "flower")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr


REVOKED = r"this key of site 'south' is revoked since 20\d\d-\d\d-\d\dT[\d:]+\+00:00; the site must make new keys"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("stranger", "this key is unknown: no site was enrolled with it; the site must send its request"),
        ("south", REVOKED),
        ("north", r"Failed to activate SuperNode"),  # while another one with its key is there
    ],
)
def test_a_node_that_is_not_let_in_is_told_why_and_ends(attacked, tmp_path, site, says):
    folder = attacked.home_folder(site)
    if site == "stranger":
        folder = tmp_path / site
        init_site(folder, site, attacked.images("north"))
    output = supernode(tmp_path, folder / "keys" / "node", attacked.consortium / "pki" / "ca.crt", port_of(attacked))
    assert re.search(rf"\[code: 2004\] {says}", output)


@pytest.mark.usefixtures("untouched")
def test_a_revoked_site_is_cut_off_and_told_since_when_also_when_it_starts_again(attacked):
    told = re.compile(f"site south: the coordinator does not let this site in: {REVOKED}; it tries again")
    attacked.wait_until(lambda: told.search(said(attacked, "south")) is not None, 60, "cutting off a revoked site")
    attacked.stop("south")
    before = len(said(attacked, "south"))
    attacked.start("south")
    attacked.wait_until(
        lambda: told.search(said(attacked, "south")[before:]) is not None, 60, "refusing it when it starts again"
    )
    attacked.stop("south")
    with pytest.raises(CredentialError, match="site 'south' of this plan is not enrolled"):
        add_run(attacked.consortium, plan_for("with-south", "south"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("fooled", ["by its join file", "by who answers"])
@pytest.mark.parametrize(
    ("other_name", "says"),
    [
        ("chest", "issued by another authority of the same name, 'CN=InvCoSS CA chest'; .* else do not connect"),
        ("evil", "not the coordinator's certificate: it was issued by 'CN=InvCoSS CA"),
    ],
)
def test_a_site_speaks_with_no_coordinator_of_another_authority(attacked, tmp_path, fooled, other_name, says):
    other, port = tmp_path / "other", port_of(attacked)
    init_consortium(other, other_name, ("localhost",), port)
    trusted, answering = other, nullcontext()
    if fooled == "by who answers":
        trusted, port = attacked.consortium, free_port()
        answering = coordinator(other, port)
    authority = trusted / "pki" / "ca.crt"
    join = load_join(attacked.home_folder("north")).model_copy(update={"ca_certificate": authority.read_text()})
    with answering:
        with pytest.raises(CredentialError, match=says):
            secure(find_way(f"localhost:{port}"), load_authority(join), join.ca_certificate, 5)
        if other_name == "evil":  # Flower's own check; starting a SuperNode once for each way is enough
            key = attacked.home_folder("north") / "keys" / "node"
            assert "certificate verify failed" in supernode(tmp_path, key, authority, port)


# What is asked at the door


def ask(deployment, line, headers="", body=b"", key=True):
    """Status and body of the answer to a request as it is written, over TLS, with the public key of north."""
    trusting = ssl.create_default_context(cafile=str(deployment.consortium / "pki" / "ca.crt"))
    shown = f"flwr-public-key: {base64.b64encode(public_key(deployment, 'north')).decode()}\r\n" if key else ""
    plain = socket.create_connection(("127.0.0.1", port_of(deployment)), timeout=20)
    with trusting.wrap_socket(plain, server_hostname="localhost") as tls:
        head = f"{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{shown}{headers}\r\n"
        tls.sendall(head.encode("latin-1") + body)
        answer = b""
        while part := tls.recv(65536):
            answer += part
    head, _, content = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), content


def public_key(deployment, site):
    return public_key_to_bytes(load_ec_key(deployment.home_folder(site) / "keys" / "node").public_key())


EMPTY = "content-length: 0\r\n"
PUSH = "POST /v1/fleet/push-object"
TOO_LARGE = f"a request must say its length, of at most {MAX_BODY_BYTES} bytes"
MALFORMED = "Invalid HTTP request received."
DOOR = [
    *(
        (line, EMPTY, 403, NOTHING_ELSE)
        for line in (
            "POST /v1/control/start-run",
            "POST /v1/control/list-runs",
            "POST /v1/runtime/acquire-task",
            "POST /v1/runtime/push-task-output",
            "GET /docs",
            "GET /openapi.json",
            "GET /",
            "POST /anything",
            "POST /v1/fleet/register-node",
            "POST /v1/fleet/unregister-node",
            "GET /v1/fleet/pull-messages",
            "PUT /v1/fleet/push-object",
            "POST /v1/fleet/push-object/",
            "POST /v1/fleet/../control/list-runs",
            "POST /v1/fleet/%2e%2e/control/list-runs",
            "POST /v1/fleet/%2e%2e%2fcontrol%2flist-runs",
            "POST /v1/fleet/..%2fcontrol/list-runs",
            "POST /health/../v1/control/list-runs",
            "POST //v1/control/list-runs",
            "POST //v1/fleet/push-object",
            "POST /V1/FLEET/PUSH-OBJECT",
            "POST /v1/fleet/push-object%00",
            "POST /v1/fleet/push-object%0a",
            "POST /v1/fleet/push-object;/../../control",
            "POST /v1/fleet/push-object%3f",
            "POST https://localhost/v1/control/list-runs",
            "OPTIONS *",
        )
    ),
    (PUSH, f"content-length: {MAX_BODY_BYTES + 1}\r\n", 413, TOO_LARGE),
    (PUSH, "", 413, TOO_LARGE),
    (PUSH, "transfer-encoding: chunked\r\n", 413, TOO_LARGE),
    (PUSH, "transfer-encoding: chunked\r\ncontent-length: 5\r\n", 400, MALFORMED),
    (PUSH, "content-length: 5\r\ncontent-length: 6\r\n", 400, MALFORMED),
    (PUSH, "content-length: -1\r\n", 400, MALFORMED),
]


@pytest.mark.usefixtures("untouched")
def test_nothing_but_what_a_site_needs_is_passed_on(attacked):
    log = attacked.consortium / "log" / "superlink.log"
    before = log.stat().st_size
    for line, headers, status, text in DOOR:
        body = b"5\r\nhello\r\n0\r\n\r\n" if "chunked" in headers else b""
        answer = (status, text if status == 400 else json.dumps({"code": 2004, "detail": text}, separators=(",", ":")))
        assert ask(attacked, line, headers, body) == answer, line
    no_key = ask(attacked, PUSH, EMPTY, key=False)
    assert (no_key[0], "no site's key came with this request" in no_key[1]) == (403, True)
    assert ask(attacked, "POST /v1/fleet/get-fab", EMPTY)[0] == 415  # Flower's answer, to show that its log would tell
    reached = set(re.findall(r'"[A-Z]+ (\S+) HTTP', log.read_text()[before:]))
    assert "/v1/fleet/get-fab" in reached
    assert not [path for path in reached if not path.startswith("/v1/fleet/")]
    assert not reached & {"/v1/fleet/push-object", "/v1/fleet/register-node", "/v1/fleet/unregister-node"}


def listening(pid):
    """(address, port) of every TCP socket that a process listens on."""
    inodes = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in inodes:
                address, _, port = local.partition(":")
                found.add((address, int(port, 16)))
    return found


@pytest.mark.usefixtures("untouched")
def test_only_the_gate_can_listen_outside_and_no_task_is_given_without_the_secret(attacked, caller):
    pids = json.loads((attacked.consortium / "service.pids").read_text())
    pids |= {
        f"north {name}": pid for name, pid in json.loads((attacked.home("north").root / "all.pids").read_text()).items()
    }
    ports = {name: listening(pid) for name, pid in pids.items()}
    loopback = "0100007F"  # 127.0.0.1 as the kernel writes it
    assert {name for name, found in ports.items() if found} == {"superlink", "gate", "north supernode"}
    assert {address for found in ports.values() for address, _ in found} == {loopback}  # the gate by --listen
    for name, scheme in (("superlink", "https"), ("north supernode", "http")):
        ((_, port),) = ports[name]
        answer = caller.post(
            f"{scheme}://127.0.0.1:{port}/v1/runtime/acquire-task",
            content=AcquireTaskRequest().SerializeToString(),
            headers={"content-type": PROTOBUF_MEDIA_TYPE},
        )
        assert answer.status_code == 401, (name, answer.text)


# Who says that he is whom


@pytest.fixture
def caller(attacked):
    """An HTTP client that trusts the coordinator, and calls it unless another address is given."""
    trusting = ssl.create_default_context(cafile=str(attacked.consortium / "pki" / "ca.crt"))
    base_url = f"https://localhost:{port_of(attacked)}"
    with httpx.Client(base_url=base_url, verify=trusting, timeout=30, trust_env=False) as client:
        yield client


def signed(deployment, key, signer, seconds=0.0, shift=0.0):
    """Headers with the public key of site `key`, signed by `signer`'s, `seconds` from now; `shift` is added after."""
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    signature = sign_message(load_ec_key(deployment.home_folder(signer) / "keys" / "node"), at.isoformat().encode())
    return {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "flwr-public-key": base64.b64encode(public_key(deployment, key)).decode(),
        "flwr-timestamp": (at + timedelta(seconds=shift)).isoformat(),
        "flwr-signature": base64.b64encode(signature).decode(),
    }


def without(headers, *names):
    return {name: value for name, value in headers.items() if name not in names}


def knocking(deployment, site):
    return ActivateNodeRequest(public_key=public_key(deployment, site), heartbeat_interval=0)


def node_of(deployment, site):
    """The id of a site's node at the coordinator's Flower; it is no secret, but no site is told another's."""
    nodes = json.loads((deployment.consortium / "flower" / "nodes.json").read_text())
    return nodes[load_join(deployment.home_folder(site)).node_key_sha256]


FORGED = {
    "no signature": lambda d: (without(signed(d, "north", "north"), "flwr-signature"), knocking(d, "north")),
    "no time": lambda d: (without(signed(d, "north", "north"), "flwr-timestamp"), knocking(d, "north")),
    "the signature of another key": lambda d: (signed(d, "north", "mallory"), knocking(d, "north")),
    "the signature of another moment": lambda d: (signed(d, "north", "north", shift=1), knocking(d, "north")),
    "captured 310 s ago": lambda d: (signed(d, "north", "north", -310), knocking(d, "north")),
    "signed for later": lambda d: (signed(d, "north", "north", 60), knocking(d, "north")),
    "another's key in the body": lambda d: (signed(d, "mallory", "mallory"), knocking(d, "north")),
    "another's node": lambda d: (
        signed(d, "mallory", "mallory"),
        DeactivateNodeRequest(node_id=node_of(d, "north")),
    ),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("attack", FORGED)
def test_a_forged_signature_is_refused(attacked, caller, attack):
    headers, message = FORGED[attack](attacked)
    path = "deactivate-node" if isinstance(message, DeactivateNodeRequest) else "activate-node"
    answer = caller.post(f"/v1/fleet/{path}", content=message.SerializeToString(), headers=headers)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Invalid SuperNode authentication"})
    headers, message = signed(attacked, "north", "north"), knocking(attacked, "north")
    honest = caller.post("/v1/fleet/activate-node", content=message.SerializeToString(), headers=headers)
    assert honest.json()["code"] == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL  # it came as far as the question


# Runs under attack


@contextmanager
def in_place_of(file, text):
    before = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)


def settings(deployment):
    return deployment.home("north").root / "site.toml"


def bundle(deployment):
    return deployment.consortium / "flower" / "app" / "pyproject.toml"


def unpinned(deployment):
    """A hostile coordinator: it runs whatever bundle it has."""
    file = deployment.consortium / "flower" / "launcher" / "flwr-serverapp"
    return in_place_of(file, f'#!/bin/sh\nexec "{program_path("flwr-serverapp")}" "$@"\n')


@contextmanager
def another_app(deployment):
    text = FEDERATION.replace("invcoss_site.app:app", "invcoss_server.app:app")
    with unpinned(deployment), in_place_of(bundle(deployment), text):
        yield


RUNS = {
    "claims-another-name": (
        lambda d: in_place_of(settings(d), settings(d).read_text().replace('"north"', '"mallory"')),
        "the node with the key of site 'north' says that it is site 'mallory'",
    ),
    "bundle-of-another-app": (
        another_app,
        "site 'north' refuses our app: "
        "the app bundle is not the one of the software that was reviewed and installed here",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_under_attack_fails_and_stores_nothing(attacked, name):
    attack, text = RUNS[name]
    with attack(attacked):
        run = add_run(attacked.consortium, plan_for(name, "north"))
        attacked.wait_until(lambda: run.outcome() is not None and not run.is_alive(), 45, name)
    told = json.loads(attacked.server("status", attacked.consortium, name, "--json"))
    (line,) = told["runs"]
    assert (line["state"], line["error"]) == ("failed", text)
    stage = run.state.stage(0)
    assert (stage.state, stage.model, stage.statistics, run.state.hops()) == ("failed", None, None, [])
    assert len(list((run.folder / "artefacts").iterdir())) == 1  # the coordinator's own: the model to start from
    assert not any((run.folder / made).exists() for made in ("models", "pools", "model.safetensors"))


SERVER = """\
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    ask = [Message(RecordDict({{"c": ConfigRecord({{}})}}), node, "query") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(ask, timeout=60)
    told = [reply.error.reason if reply.has_error() else "it ran" for reply in replies]
    open({told!r} + ".new", "w").write(json.dumps(told))
    import os; os.replace({told!r} + ".new", {told!r})
"""
CLIENT = """\
open({canary!r}, "w").write("imported")
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    open({canary!r}, "w").write("ran")
    return message
"""


def send_code(deployment, folder):
    """As somebody with a shell at the coordinator could: through the control API, with the operator's own settings."""
    app, told, canary = folder / "app", folder / "told.json", folder / "canary"
    app.mkdir()
    text = FEDERATION.replace('"/pyproject.toml"', '"/pyproject.toml", "/*.py"').replace("invcoss_server.app", "server")
    (app / "pyproject.toml").write_text(text.replace("invcoss_site.app", "evil"))
    (app / "server.py").write_text(SERVER.format(told=str(told)))
    (app / "evil.py").write_text(CLIENT.format(canary=str(canary)))
    flower = deployment.consortium / "flower"
    run = call_flower(flower_environment(flower), flower, "run", str(app))["run-id"]
    return str(run), told, canary


@pytest.mark.usefixtures("untouched")
def test_code_that_is_sent_does_not_run_at_the_coordinator(attacked, tmp_path):
    run, told, canary = send_code(attacked, tmp_path)
    flower = attacked.consortium / "flower"

    def of_flower():
        return call_flower(flower_environment(flower), flower, "ls", "--run-id", run)["runs"][0]

    attacked.wait_until(lambda: of_flower()["status"].startswith("finished"), 90, "the end of the run that was sent")
    assert of_flower()["status"] == "finished:failed"
    assert "code is never accepted" in of_flower()["status-details"]
    assert not told.exists()
    assert not canary.exists()


@pytest.mark.usefixtures("untouched")
def test_code_that_is_sent_does_not_run_at_a_site(attacked, tmp_path):
    """By a coordinator that runs it itself."""
    with unpinned(attacked):
        _, told, canary = send_code(attacked, tmp_path)
        attacked.wait_until(told.exists, 90, "the answer of the attacked site")
    (reason,) = json.loads(told.read_text())
    says = "the app bundle carries 2 files besides its configuration; code is never accepted"
    assert reason == f"<class 'invcoss_common.errors.BundleRefused'>:<'{says}'>"
    assert not canary.exists()
    assert not (attacked.home("north").root / "flower" / "apps").exists()


# A site that is enrolled, and answers as no honest software does


class Played:
    """The node of mallory, played by the test: `sent` is the last request, as anybody might have captured it."""

    def __init__(self, deployment, http):
        self.deployment, self.http = deployment, http
        self.node = node_of(deployment, "mallory")

    def call(self, name, message, answer=None):
        headers = signed(self.deployment, "mallory", "mallory")
        self.sent = self.http.build_request(
            "POST", f"/v1/fleet/{name}", content=message.SerializeToString(), headers=headers
        )
        got = self.http.send(self.sent)
        if answer is None:
            return got
        assert got.status_code == 200, got.text
        return answer.FromString(got.content)

    def pull(self):
        pulled = self.call("pull-messages", PullMessagesRequest(node=Node(node_id=self.node)), PullMessagesResponse)
        return message_from_proto(pulled.messages_list[0]) if pulled.messages_list else None

    def push(self, message, src, dst, reply_to):
        """What is pushed for `message` with such metadata."""
        made = message.metadata.__dict__
        made |= {"_src_node_id": src, "_dst_node_id": dst, "_reply_to_message_id": reply_to}
        made["_message_id"] = message.object_id
        tree, proto = get_object_tree(message), message_to_proto(remove_content_from_message(message))
        return PushMessagesRequest(node=Node(node_id=self.node), messages_list=[proto], message_object_trees=[tree])

    def objects(self, message, pushed):
        for name, held in get_all_nested_objects(message).items():
            if name in set(pushed.objects_to_push):
                parts = {"session_id": pushed.session_id, "object_id": name, "object_content": held.deflate()}
                run = message.metadata.run_id
                push = PushObjectRequest(node=Node(node_id=self.node), run_id=run, **parts)
                assert self.call("push-object", push, PushObjectResponse).stored


def test_an_enrolled_site_speaks_for_itself_only_and_a_replay_changes_nothing(attacked, caller):
    """A site that could push what it likes could speak to another one as the coordinator, or in its name."""
    run = add_run(attacked.consortium, plan_for("played", "mallory"))
    player, north, superlink = Played(attacked, caller), node_of(attacked, "north"), 1
    asked = []
    player.call("activate-node", ActivateNodeRequest(public_key=public_key(attacked, "mallory"), heartbeat_interval=60))
    attacked.wait_until(lambda: asked.append(player.pull()) or asked[-1] is not None, 60, "the coordinator's hello")
    hello, me = asked[-1], player.node
    answer = Message(encode_response(Response({"site": "mallory", "protocol": 2, "code_version": "0"})), reply_to=hello)
    purge = Message(encode_response(Response({"verb": "purge", "keep": ""})), reply_to=hello)

    received = log_of(attacked, "north").count("Receiving: query message")
    for what, src, dst, reply_to in (
        (purge, superlink, north, ""),
        (purge, me, north, ""),
        (answer, north, superlink, hello.metadata.message_id),
        (answer, me, superlink, ""),
    ):
        got = player.call("push-messages", player.push(what, src, dst, reply_to))
        assert got.status_code == 403
        assert got.json()["detail"] == "a site answers what it was asked, in its own name, and sends nothing else"
    assert player.call("push-messages", PushMessagesRequest()).status_code != 200
    time.sleep(4)  # a SuperNode looks for messages every 3 s
    assert log_of(attacked, "north").count("Receiving: query message") == received

    pushed = player.call(
        "push-messages", player.push(answer, me, superlink, hello.metadata.message_id), PushMessagesResponse
    )
    captured = player.sent
    player.objects(answer, pushed)
    attacked.wait_until(lambda: asked.append(player.pull()) or asked[-1] is not None, 60, "the next request")
    again = caller.send(captured)  # Flower's signature is of the time only, and good for 300 s
    assert (again.status_code, list(PushMessagesResponse.FromString(again.content).objects_to_push)) == (200, [])
    assert player.pull() is None
    run.state.want("stopped")
    assert run.state.hops() == []
    assert run.state.stage(0).model is None
    player.call("deactivate-node", DeactivateNodeRequest(node_id=me))


PLAYED = tiny_plan(("xray", "ct"), relay={"poll_s": 0.01, "part_mib": 1, "stall_timeout_s": 20.0})


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """The folder of a site that has done its visit of PLAYED, so that no attack has to train again."""
    out = tmp_path_factory.mktemp("visited")
    homes = {name: simulated_home(PLAYED, name, None, out / "sites") for name in PLAYED.sites}

    class Leaves(LoopbackCourier):
        def call(self, site, request):
            if request.verb == "get":
                raise KeyboardInterrupt
            return super().call(site, request)

    with pytest.raises(KeyboardInterrupt):
        relay(PLAYED, Leaves(homes, visit), out / "run", synthesise_here)
    return homes


def in_report(**changes):
    """The report's answer with other values; what a stale or replayed report would hold."""

    def change(request, response):
        if request.verb != "status" or not response.fields["report"]:
            return response
        report = from_bytes(Report, str(response.fields["report"]).encode()).model_copy(update=changes)
        return Response({**response.fields, "report": to_bytes(report).decode()})

    return change


def in_part(edit):
    def change(request, response):
        return Response(response.fields, edit(request, response.blob)) if request.verb == "get" else response

    return change


def to(verb, **fields):
    def change(request, response):
        return Response({**response.fields, **fields}) if request.verb == verb else response

    return change


def swapped(request, part):
    half = len(part) // 2
    return part[half:] + part[:half]


ANSWER = "the report of site 'xray-site' does not answer hand-off s00-train"
STALE = {
    "the report of another hop": (in_report(hop="s01-train"), ANSWER),
    "the report of another run": (in_report(run="other"), ANSWER),
    "the report of an earlier plan": (in_report(plan_digest="0" * 64), ANSWER),
    "the report of another site": (in_report(sender="ct-site"), ANSWER),
    "the report of another protocol": (in_report(protocol=1), ANSWER),
    "done, but no report": (to("status", report=""), "Report.record: Invalid JSON"),
    "the answer to another verb": (
        lambda request, response: Response({"state": "done"}) if request.verb == "status" else response,
        "message with fields missing or unknown",
    ),
    "more held than there is": (to("have", received=1 << 40), "says it holds 1099511627776 of"),
    "an artefact that is not what was announced": (
        in_part(lambda request, part: bytes([part[0] ^ 1]) + part[1:]),
        "artefact does not have the announced sha256",
    ),
    "parts out of order": (in_part(swapped), "artefact does not have the announced sha256"),
    "a part that overlaps the next": (in_part(lambda request, part: part + part), "part of .* bytes where at most"),
    "no part": (in_part(lambda request, part: b""), "message with a part missing"),
}


@pytest.mark.parametrize("attack", STALE)
def test_a_stale_or_replayed_answer_is_refused(visited, tmp_path, attack):
    change, says = STALE[attack]

    def site(record, home, start_work):
        request = decode_request(record)
        honest = decode_response(site_of_today(record, home, start_work), request)
        return encode_response(change(request, honest))

    courier = LoopbackCourier(visited, visit, {"xray-site": site})
    with pytest.raises(ProtocolError, match=says):
        relay(PLAYED, courier, tmp_path, synthesise_here)
    state = RunState(tmp_path / "state.db", PLAYED)
    stage = state.stage(0)
    assert (stage.state, stage.error, stage.model, state.hops()) == ("failed", "ProtocolError", None, [])
    handoff = state.hand_off("s00-train")
    assert {file.name for file in (tmp_path / "artefacts").iterdir()} == {handoff.model.sha256}
