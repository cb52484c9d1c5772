"""The site's Flower node as the coordinator sees it: its id, leaving for a SuperNode that was killed, knocking.

A SuperNode that ends without a word stays "online" at the coordinator for a minute, and nobody with its key is let in
again until then. Saying goodbye for it lets the next one in at once.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Literal

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import CredentialError
from invcoss_common.keys import load_ec_key
from invcoss_site.enrol import load_join
from invcoss_site.home import SiteHome


def remember_node(home: SiteHome, node_id: int) -> None:
    """Keep the id that the coordinator's Flower gave to this site's key."""
    file, text = _file(home), str(node_id)
    if not file.exists() or file.read_text("ascii") != text:
        write_atomic(file, text.encode())


def release_node(home: SiteHome) -> None:
    """Say goodbye for the last SuperNode of this site; what goes wrong is left to the next one to report."""
    file = _file(home)
    if not file.exists():
        return
    with suppress(Exception), fleet_client(home.root) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(file.read_text("ascii"))))


def knock(root: Path, timeout_s: float) -> Literal["let in", "starting", "not told yet"]:
    """How the coordinator receives a call that this site signed; "not told yet" is its Flower, of a key just enrolled.

    The call asks to activate the node with a heartbeat interval that Flower refuses after it has checked key, signature
    and time, so that no SuperNode is disturbed. Raises CredentialError with what the coordinator says.
    """
    key = public_key_to_bytes(load_ec_key(root / "keys" / "node").public_key())
    address = load_join(root).address
    try:
        with fleet_client(root, timeout_s) as client:
            client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=0))
    except httpx.HTTPStatusError as error:
        status, (code, detail) = error.response.status_code, _answer(error.response)
    except (httpx.HTTPError, ValueError) as error:
        raise CredentialError(
            f"{address}: the signed call got no answer ({type(error).__name__}: {error}); try again, "
            "and if it stays so, tell the operator"
        ) from None
    else:
        return "let in"
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return "let in"
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED and status == httpx.codes.SERVICE_UNAVAILABLE:
        return "starting"
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED and status != httpx.codes.CONFLICT:  # that is the gate's
        return "not told yet"
    if status == httpx.codes.UNAUTHORIZED:
        raise CredentialError(
            f"{address}: Flower there does not accept this site's signature; the site's IT must set the clock (NTP), "
            "else the operator must restart the coordinator"
        )
    if code and status == httpx.codes.CONFLICT:
        raise CredentialError(f"{address} answers: {detail}")
    raise CredentialError(
        f"{address}: what answers there is not the coordinator's gate (HTTP status {status}); "
        "the operator must start it with invcoss-server start, or correct the address in a new join file"
    )


def fleet_client(root: Path, timeout_s: float = 30.0) -> FleetHttpClient:
    """A client of the coordinator's Fleet API that signs with this site's node key."""
    key = load_ec_key(root / "keys" / "node")
    return FleetHttpClient(
        f"https://{load_join(root).address}",
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        verify=ssl.create_default_context(cafile=str(root / "ca.crt")),
        timeout=timeout_s,
    )


def _answer(response: httpx.Response) -> tuple[int, str]:
    """Flower's error code, 0 if it is none of Flower's or the gate's, and the text beside it."""
    with suppress(ValueError, KeyError, TypeError):
        values = response.json()
        return int(values["code"]), "".join(c for c in str(values["detail"]) if c.isprintable())[:300]
    return 0, ""


def _file(home: SiteHome) -> Path:
    return home.spool / "node-id"
