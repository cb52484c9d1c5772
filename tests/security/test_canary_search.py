"""The search finds what it looks for: every form, in every package, in streams, messages, files and databases."""

import base64
import bz2
import gzip
import io
import json
import lzma
import sqlite3
import ssl
import zipfile
import zlib
from socket import create_connection, create_server
from threading import Thread
from urllib.parse import quote

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from PIL import Image
from safetensors.torch import save
from tests.security.capture import Call, asked, messages, recording, values
from tests.security.search import PART, Search, pixel_patterns, prepared_patterns, word_patterns

from invcoss_common.encoding import FOR_IMAGES, FOR_WEIGHTS, encode
from invcoss_common.records import Response
from invcoss_common.supervise import free_port
from invcoss_common.wire import encode_response
from invcoss_server.provision import init_consortium

WORDS = {"word": "QwxTzvKpLmRsNb", "accented": "Łüdwîg-Ørstedt", "latin": "JoséMüllerÇelik"}
PIXELS = np.random.default_rng(5).integers(0, 256, (20, 32)).astype(np.uint8)
VOLUME = np.random.default_rng(6).integers(-900, 900, (16, 18, 20)).astype(np.int16)
CACHED = np.random.default_rng(7).random((2, 1, 4, 32)).astype(np.float16)
NOISE = np.random.default_rng(8).bytes(50_000)
WEIGHTS = np.random.default_rng(9).standard_normal(50_000).astype(np.float32).tobytes()


@pytest.fixture(scope="module")
def search():
    words = [pattern for what, word in WORDS.items() for pattern in word_patterns(what, word)]
    pixels = [*pixel_patterns("pixels", PIXELS), *pixel_patterns("volume", VOLUME)]
    return Search([*words, *pixels, *prepared_patterns("cached", CACHED)])


def around(content):
    return NOISE[:777] + content + NOISE[777:1500]


WRITTEN = {
    "plain": lambda word: word.encode(),
    "in a long line": lambda word: b"/data/" + word.encode() * 3 + b".png",
    "lower case": lambda word: word.lower().encode(),
    "upper case": lambda word: word.upper().encode(),
    "UTF-16": lambda word: word.encode("utf-16"),
    "UTF-16, big end first": lambda word: word.encode("utf-16-be"),
    "UTF-32": lambda word: word.encode("utf-32"),
    "hex": lambda word: word.encode().hex().encode(),
    "hex, upper case": lambda word: word.encode().hex().upper().encode(),
    "list of bytes": lambda word: str(list(word.encode())).encode(),
    "JSON": lambda word: json.dumps({"path": word}).encode(),
    "repr": lambda word: ascii(word).encode(),
    "\\u escapes": lambda word: "".join(f"\\u{ord(c):04x}" for c in word).encode(),
    "repr of bytes": lambda word: repr(word.encode()).encode(),
    "URL": lambda word: quote(f"/a b/{word}").encode(),
    "URL, every byte": lambda word: "".join(f"%{byte:02X}" for byte in word.encode()).encode(),
    "reversed": lambda word: word.encode()[::-1],
    "base64, begins with it": lambda word: base64.b64encode(word.encode()),
    "base64, one byte before": lambda word: base64.b64encode(b"x" + word.encode() + b"yz"),
    "base64, two bytes before": lambda word: base64.b64encode(b"xy" + word.encode() + b"z"),
    "base64 of URLs": lambda word: base64.urlsafe_b64encode(b"\xff\xfe\xfd" + word.encode()),
    "base64 in lines": lambda word: base64.encodebytes(NOISE[:50] + word.encode() + NOISE[:50]),
    "base64 of base64": lambda word: base64.b64encode(base64.b64encode(word.encode())),
}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("what", WORDS)
def test_a_word_is_found_in_every_way_of_writing_it(search, what, form):
    found = search.in_bytes(around(WRITTEN[form](WORDS[what])), "it")
    assert {hit.what for hit in found} == {what}


def test_a_word_is_found_in_latin_1(search):
    assert {hit.form for hit in search.in_bytes(around(WORDS["latin"].encode("latin-1")), "it")} == {"Latin-1"}


BRAIN = "bfloat16"
KINDS = ("u1", "<i2", ">i2", "<i4", "<i8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", BRAIN)


def as_numbers(values, kind):
    if kind == BRAIN:
        return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy().tobytes()
    return values.astype(kind).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WORDS)
def test_the_bytes_of_a_word_are_found_as_numbers_of_a_tensor(search, what, kind):
    plain = np.frombuffer(WORDS[what].encode(), np.uint8)
    assert {hit.what for hit in search.in_bytes(WEIGHTS + as_numbers(plain, kind), "it")} == {what}
    if "f" in kind:
        assert {hit.what for hit in search.in_bytes(WEIGHTS + as_numbers(plain / 255, kind), "it")} == {what}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("pixels", PIXELS[3]),
        ("pixels", PIXELS[:, 4:]),
        ("pixels", PIXELS.T),
        ("pixels", PIXELS[2, 4:31]),
        ("volume", VOLUME[2, 3]),
        ("volume", VOLUME.T),
    ],
)
def test_rows_of_an_image_are_found_as_numbers(search, what, part, kind):
    if what == "volume" and kind == "u1":
        pytest.skip("its values are no bytes")
    assert {hit.what for hit in search.in_bytes(WEIGHTS + as_numbers(part, kind), "it")} == {what}
    if what == "pixels" and "f" in kind:
        assert {hit.what for hit in search.in_bytes(WEIGHTS + as_numbers(part / 255, kind), "it")} == {what}


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", BRAIN])
def test_rows_of_a_prepared_image_are_found_as_numbers(search, kind):
    assert {hit.what for hit in search.in_bytes(WEIGHTS + as_numbers(CACHED[1, 0, 2], kind), "it")} == {"cached"}
    as_bytes = np.rint(CACHED.astype(np.float32) * 255).astype(np.uint8).tobytes()
    assert {hit.what for hit in search.in_bytes(as_bytes, "it")} == {"cached"}


def in_file(format):
    """Bytes of a picture of PIXELS in a file; PNG and TIFF put other bytes than its pixels there, JPEG no pixel."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, format)
    return file.getvalue()


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("it", content)
    return file.getvalue()


def raw_deflate(content):
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return engine.compress(content) + engine.flush()


PACKAGES = {
    "zlib": zlib.compress,
    "zlib, best": lambda content: zlib.compress(content, 9),
    "zlib, small window": lambda content: (lambda e: e.compress(content) + e.flush())(zlib.compressobj(wbits=9)),
    "zlib, cut short": lambda content: zlib.compress(content + NOISE)[:3000],
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": zipped,
    "gzip in zlib": lambda content: zlib.compress(gzip.compress(content)),
    "base64 of gzip": lambda content: base64.b64encode(gzip.compress(content)),
    "base64 of gzip after a word": lambda content: b"key/" + base64.b64encode(b"ab" + gzip.compress(content)),
    "hex of zlib": lambda content: zlib.compress(content).hex().encode(),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_packed_is_found_anywhere_in_a_stream(search, package):
    content = b"In " + WORDS["accented"].encode() + PIXELS.tobytes()
    found = search.in_bytes(around(PACKAGES[package](content)), "it")
    assert {hit.what for hit in found} == {"accented", "pixels"}


def test_a_raw_deflate_stream_is_found_where_a_thing_begins(search):
    assert {hit.what for hit in search.in_bytes(raw_deflate(WORDS["word"].encode() * 3), "it")} == {"word"}


@pytest.mark.parametrize("encoding", [FOR_IMAGES, FOR_WEIGHTS])
def test_a_part_in_an_encoding_of_ours_is_found(search, encoding):
    tensors = {"weights": torch.zeros(3000), "mean": torch.from_numpy(CACHED.astype(np.float32))}
    name, part = encode(save(tensors), encoding)
    assert name == encoding
    assert {hit.what for hit in search.in_bytes(part, f"a{PART}")} == {"cached"}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_a_picture_is_found_by_its_pixels(search, format):
    assert {hit.what for hit in search.in_bytes(around(in_file(format)), "it")} == {"pixels"}


def test_innocent_bytes_hold_nothing(search):
    grey = bytes(range(256)) * 50
    for innocent in (NOISE, WEIGHTS, zlib.compress(WEIGHTS), bytes(100_000), grey, b"a/b " * 1000, b"", b"short"):
        assert search.in_bytes(innocent, "it") == []
    assert search.in_all([("a", NOISE), ("b", NOISE)]) == []
    assert search.searched < 2 * len(NOISE)  # the same bytes are looked at once


# In files and databases


def test_names_files_and_rows_of_databases_are_searched(search, tmp_path):
    (tmp_path / "logs" / WORDS["word"]).mkdir(parents=True)
    (tmp_path / "logs" / "run.log").write_text(f"error: /data/{WORDS['latin']}/1.png\n")
    with sqlite3.connect(tmp_path / "state.db") as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE hops (name TEXT, report BLOB)")
        row = (NOISE.hex()[:9000] + WORDS["accented"], gzip.compress(PIXELS.tobytes()))
        database.execute("INSERT INTO hops VALUES (?, ?)", row)
    found = search.in_folder(tmp_path)  # before the log of the database, which lies beside it, is moved into it
    database.close()
    assert ("word", "plain", f"the name of logs/{WORDS['word']}") in found
    assert {(hit.what, hit.where.partition(" >")[0]) for hit in found} >= {
        ("latin", "logs/run.log"),
        ("accented", "state.db, table hops"),
        ("pixels", "state.db, table hops"),
    }


# In what goes over the wire


def answer_as_calls(response):
    """What a SuperNode sends for an answer, as the bodies of its calls."""
    message = Message(encode_response(response), reply_to=asked(RecordDict()))
    message.metadata.__dict__["_message_id"] = message.object_id
    proto = message_to_proto(remove_content_from_message(message))
    push = PushMessagesRequest(messages_list=[proto], message_object_trees=[get_object_tree(message)])
    bodies = [("push-messages", push)]
    for name, held in get_all_nested_objects(message).items():
        bodies.append(("push-object", PushObjectRequest(object_id=name, object_content=held.deflate())))
    return [Call(f"/v1/fleet/{name}", b"", body.SerializeToString()) for name, body in bodies]


def test_a_part_that_flower_cut_into_chunks_is_searched_whole(search):
    size = 12 << 20  # Flower's chunks are 5 MiB
    plain = bytearray(np.random.default_rng(1).bytes(size))
    calls = answer_as_calls(Response({"encoding": ""}, bytes(plain)))
    chunk = max(len(call.body) for call in calls)
    assert chunk < size
    edge = 5 << 20
    plain[edge - 7 : edge + 7] = WORDS["word"].encode()
    calls = answer_as_calls(Response({"encoding": ""}, bytes(plain)))
    assert search.in_all((call.path, call.body) for call in calls) == []  # it lies on the edge of two chunks
    (record,) = messages(calls)
    assert {hit.what for hit in search.in_all(values(record))} == {"word"}


def test_the_recorder_keeps_what_is_sent_and_passes_it_on(tmp_path, search):
    init_consortium(tmp_path, "chest", ("localhost",), 9443)
    pki, port = tmp_path / "pki", free_port()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server.crt", pki / "server.key")
    got = []

    def gate():
        with gates, gates.accept()[0] as plain, context.wrap_socket(plain, server_side=True) as tls:
            while b"END" not in b"".join(got):
                got.append(tls.recv(65536))
            tls.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    gates = create_server(("127.0.0.2", port))
    thread = Thread(target=gate)
    thread.start()
    trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    first = gzip.compress(WORDS["word"].encode())
    head = f"host: localhost\r\nx-patient: {WORDS['latin']}\r\nContent-Length: ".encode("latin-1")
    sent = b"".join(
        b"POST /%d HTTP/1.1\r\n%s%d\r\n\r\n%s" % (number, head, len(body), body)
        for number, body in enumerate((first, b"END"))
    )
    with recording(pki, ("127.0.0.1", port), ("127.0.0.2", port)) as recorder:
        with (
            create_connection(("127.0.0.1", port)) as plain,
            trusting.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(sent)
            assert tls.recv(65536).endswith(b"ok")
        thread.join()
    assert b"".join(got) == bytes(recorder.sent[0]) == sent
    assert recorder.returned_bytes > 0
    assert [(call.path, call.body) for call in recorder.calls()] == [("/0", first), ("/1", b"END")]
    assert {hit.what for hit in search.in_all(recorder.things())} == {"word", "latin"}
