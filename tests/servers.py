"""What a site may meet on its way, in threads on loopback: a coordinator over TLS, and an HTTP proxy."""

from __future__ import annotations

import http.server
import json
import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Coordinator(http.server.BaseHTTPRequestHandler):
    """Answers /health, and everything else as `answers` says by path, or with `otherwise`: (status, body)."""

    ahead_s: float | None = 0.0
    answers: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012 - replaced, never changed
    otherwise: tuple[int, bytes] = (403, b"")

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer()

    def answer(self):
        health = {"/health": (200, b"ok")}
        status, body = (health | self.answers).get(self.path, self.otherwise)
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_header(self, keyword, value):
        if keyword != "Date" or self.ahead_s is not None:
            super().send_header(keyword, value)

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + (self.ahead_s or 0))

    def log_message(self, *_):
        pass


def flower(status: int, code: int = 2004, detail: str = "") -> tuple[int, bytes]:
    """An answer in the form of Flower's."""
    return status, json.dumps({"code": code, "detail": detail}).encode()


@contextmanager
def coordinator(consortium: Path, port: int, **changes: object) -> Iterator[None]:
    """A Coordinator with the server certificate of `consortium`; `changes` are its class attributes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(consortium / "pki" / "server.crt", consortium / "pki" / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Coordinator,), changes))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with _serving(server):
        yield


@contextmanager
def proxy(port: int, target: int, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[list[str]]:
    """An HTTP proxy that connects to `target` on loopback whatever it is asked for; yields the heads of requests."""
    heads: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (part := self.request.recv(4096)):
                    return
                head += part
            heads.append(head.decode())
            if not answer:
                time.sleep(1)
                return
            self.request.sendall(answer)
            if b" 200 " not in answer:
                return
            with socket.create_connection(("127.0.0.1", target)) as there, suppress(OSError):
                while True:
                    for ready in select.select([self.request, there], [], [])[0]:
                        if not (part := ready.recv(65536)):
                            return
                        (there if ready is self.request else self.request).sendall(part)

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with _serving(socketserver.ThreadingTCPServer(("127.0.0.1", port), Handler)):
        yield heads


@contextmanager
def _serving(server: socketserver.TCPServer) -> Iterator[None]:
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up, as here it must
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
