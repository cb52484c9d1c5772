"""The one door to the coordinator: passes on Flower's Fleet API to enrolled sites and nothing else to nobody.

    python -m invcoss_server.gate FOLDER SUPERLINK_PORT --listen ADDRESS

Whoever holds the consortium's CA certificate could otherwise call the SuperLink's control API, which starts code at
every site. The SuperLink listens on loopback only; the gate looks each key up in the register before it connects.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import CredentialError, InvcossError
from invcoss_server.provision import identify_site, load_consortium

KEY_HEADER = "flwr-public-key"  # base64 of the node key's PEM; Flower checks the signature that comes with it
OPEN = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    }
)
SEEN = "gate-seen.json"  # in FOLDER: when each site was last heard, seconds since 1970
SEEN_EVERY_S = 5.0
MAX_BODY_BYTES = 16 << 20  # Flower's objects have 5 MiB
MAX_KEY_CHARS = 4096
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host"})
REFUSED = 2004  # Flower's code of a node that is not let in; a SuperNode shows the text beside it
CUT_OFF, NOT_LET_IN = 401, 409  # a SuperNode ends on the first, and shows why on the second; on 403 it does neither
NOTHING_ELSE = "the coordinator's gate passes on what a site needs, and this is not part of it"


def gate(folder: Path, upstream: str) -> Starlette:
    """The application that serves the consortium in `folder`; `upstream` is the SuperLink's https address."""
    load_consortium(folder)
    trusting = ssl.create_default_context(cafile=str(folder / "pki" / "ca.crt"))

    seen = _Seen(folder)

    @asynccontextmanager
    async def connected(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=upstream, verify=trusting, timeout=60, limits=limits) as client:
            app.state.upstream = client
            yield

    async def fleet(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in OPEN:
            return _refusal(403, NOTHING_ELSE)
        refused = 403
        try:
            key = _key(request)
            refused = NOT_LET_IN if call == "activate-node" else CUT_OFF
            site = identify_site(folder, key)
            seen.note(site)
        except CredentialError as error:
            print(f"refused {request.client.host if request.client else '?'}: {error}", flush=True)
            return _refusal(refused, str(error))
        if int(request.headers.get("content-length", MAX_BODY_BYTES + 1)) > MAX_BODY_BYTES:
            return _refusal(413, f"a request must say its length, of at most {MAX_BODY_BYTES} bytes")
        client: httpx.AsyncClient = request.app.state.upstream
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        try:
            if call == "push-messages" and not _answers_for_itself(await request.body()):
                print(f"refused site {site}: it sent a message that is no answer of its own", flush=True)
                return _refusal(403, "a site answers what it was asked, in its own name, and sends nothing else")
            passed_on = client.build_request("POST", request.url.path, headers=headers, content=request.stream())
            answer = await client.send(passed_on, stream=True)
        except httpx.TransportError:
            return _refusal(503, "the coordinator is starting; try again")
        except ClientDisconnect:
            return _refusal(400, "the request was broken off")
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(_body(answer), answer.status_code, kept)

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def nothing_else(_: Request, __: Exception) -> Response:
        return _refusal(403, NOTHING_ELSE)

    routes = [Route("/v1/fleet/{call}", fleet, methods=["POST"]), Route("/health", health)]
    app = Starlette(routes=routes, lifespan=connected, exception_handlers={404: nothing_else, 405: nothing_else})
    app.router.redirect_slashes = False  # a redirect would name whatever host the caller names
    return app


def read_seen(folder: Path) -> dict[str, float]:
    """When the gate last heard each site, seconds since 1970."""
    with suppress(FileNotFoundError):
        seen: dict[str, float] = json.loads((folder / SEEN).read_bytes())
        return seen
    return {}


class _Seen:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times = read_seen(folder)
        self.written = 0.0

    def note(self, site: str) -> None:
        self.times[site] = time.time()
        if time.monotonic() - self.written > SEEN_EVERY_S:
            write_atomic(self.folder / SEEN, json.dumps(self.times).encode())
            self.written = time.monotonic()


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def _key(request: Request) -> str:
    text = request.headers.get(KEY_HEADER, "")
    try:
        if not 0 < len(text) <= MAX_KEY_CHARS:
            raise CredentialError("no site's key came with this request; a site must be enrolled")
        return base64.b64decode(text, validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        raise CredentialError("what came with this request is not a site's key; a site must be enrolled") from None


def _answers_for_itself(body: bytes) -> bool:
    """Whether the messages in a push are answers, in the name of the node that pushes them.

    Flower checks whose key it is, and then takes any sender: a site could speak to another one as the coordinator.
    """
    from flwr.proto.fleet_pb2 import PushMessagesRequest  # here, because importing Flower takes a second
    from google.protobuf.message import DecodeError

    try:
        pushed = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    told = [message.metadata for message in pushed.messages_list]
    return all(one.src_node_id == pushed.node.node_id and one.reply_to_message_id for one in told)


def _refusal(status: int, why: str) -> Response:
    return JSONResponse({"code": REFUSED, "detail": why}, status)


def main() -> None:
    """Serve until a signal asks to end; an InvcossError is one line on stderr and the error's exit code."""
    parser = argparse.ArgumentParser(description="The coordinator's gate.")
    parser.add_argument("folder", type=Path, help="the consortium's folder")
    parser.add_argument("superlink_port", type=int)
    parser.add_argument("--listen", required=True, help="address of the interface to listen on")
    asked = parser.parse_args()
    pki = asked.folder / "pki"
    try:
        consortium = load_consortium(asked.folder)
        app = gate(asked.folder, f"https://127.0.0.1:{asked.superlink_port}")
    except InvcossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    uvicorn.run(
        app,
        host=asked.listen,
        port=consortium.port,
        ssl_certfile=pki / "server.crt",
        ssl_keyfile=str(pki / "server.key"),
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
