"""Records what sites send: a proxy that ends their TLS and starts its own to the gate, and what is in the recording."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from tests.security.search import PART

Things = Iterator[tuple[str, bytes]]


class Call(NamedTuple):
    """An HTTP request of a site."""

    path: str
    head: bytes
    body: bytes


class Recorder:
    """`sent` is what each connection carried to the coordinator; what it carried back is only counted."""

    def __init__(self) -> None:
        self.sent: list[bytearray] = []
        self.returned_bytes = 0

    @property
    def sent_bytes(self) -> int:
        return sum(map(len, self.sent))

    def calls(self) -> list[Call]:
        return [call for stream in self.sent for call in http_calls(bytes(stream))]

    def things(self) -> Things:
        """Every stream as it is, every body in it, and every message that its bodies make up."""
        yield from ((f"connection {number}", bytes(stream)) for number, stream in enumerate(self.sent))
        calls = self.calls()
        yield from ((call.path, call.body) for call in calls)
        for record in messages(calls):
            yield from values(record)


@contextmanager
def recording(pki: Path, listen: tuple[str, int], gate: tuple[str, int]) -> Iterator[Recorder]:
    """Stand at `listen` in place of the gate, with the certificate that the consortium's authority gave to it."""
    showing, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(pki / "ca.crt"))
    showing.load_cert_chain(pki / "server.crt", pki / "server.key")
    recorder, loop, started = Recorder(), asyncio.new_event_loop(), threading.Event()

    async def connected(site: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        stream = bytearray()
        recorder.sent.append(stream)
        writers = [to_site]
        with suppress(OSError, asyncio.CancelledError):  # where the gate is not up, the site tries again
            reader, to_gate = await asyncio.open_connection(*gate, ssl=trusting, server_hostname="localhost")
            writers.append(to_gate)
            await asyncio.gather(pump(site, to_gate, stream), pump(reader, to_site, None))
        for writer in writers:
            writer.transport.abort()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray | None) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 18):
                if kept is None:
                    recorder.returned_bytes += len(data)
                else:
                    kept += data
                sink.write(data)
                await sink.drain()
        sink.close()  # so that the other direction ends, too

    async def serve() -> None:
        server = await asyncio.start_server(connected, *listen, ssl=showing)
        started.set()
        with suppress(asyncio.CancelledError):
            await server.serve_forever()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.sleep(0.1)  # for the connections to be closed

    serving = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_until_complete, args=(serving,))
    thread.start()
    assert started.wait(10)
    try:
        yield recorder
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
        loop.close()


def http_calls(stream: bytes) -> Iterator[Call]:
    """The requests of one connection; the last may have been cut off."""
    at = 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        head = stream[at:end]
        line, *headers = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (header.partition(": ") for header in headers)}
        assert "transfer-encoding" not in fields, "a body that this does not read"
        at = end + 4 + int(fields.get("content-length", 0))
        yield Call(line.split(" ")[1], head, stream[end + 4 : at])


def messages(calls: list[Call]) -> Iterator[RecordDict]:
    """The answers of sites, made whole from the objects that Flower cut them into."""
    objects, roots = {}, []
    for call in calls:
        if call.path.endswith("/push-object"):
            pushed = PushObjectRequest.FromString(call.body)
            objects[pushed.object_id] = pushed.object_content
        elif call.path.endswith("/push-messages"):
            trees = PushMessagesRequest.FromString(call.body).message_object_trees
            roots += [tree.object_id for tree in trees]
    for root in roots:
        with suppress(Exception):  # one whose objects did not all come, because something was killed
            message = inflate_object_from_contents(root, objects)
            if message.has_content():
                yield message.content


def values(record: RecordDict) -> Things:
    """What an answer says, value by value."""
    for name, one in record.items():
        for key, value in one.items():
            if isinstance(one, ArrayRecord):
                yield f"{name}.{key}{PART}", value.data
                yield f"{name}.{key}, of what type", f"{value.dtype} {value.shape} {value.stype}".encode()
            else:
                yield f"{name}.{key}", str(value).encode()


def asked(content: RecordDict) -> Message:
    """A request as it comes to a site's app; the numbers of its run and nodes are made up."""
    now = time.time()
    metadata = Metadata(
        run_id=1,
        message_id="0",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=now,
        ttl=3600.0,
        message_type="query",
    )
    return Message(content=content, metadata=metadata)


def wire_things(message: Message) -> Things:
    """What a message is made of when it leaves a site without a network."""
    yield "message", message_to_proto(remove_content_from_message(message)).SerializeToString()
    for name, held in get_all_nested_objects(message).items():
        yield f"object {name}", held.deflate()
    if message.has_content():
        yield from values(message.content)
