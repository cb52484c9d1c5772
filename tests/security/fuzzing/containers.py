"""Tensors, parts of artefacts, messages and app bundles with other contents than they claim, or too much of them."""

from __future__ import annotations

import bz2
import copy
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import strategies as st
from tests.security.fuzzing.mutations import LARGE, WORDS, altered_value

from invcoss_common.bundle import FEDERATION, MANIFEST


@st.composite
def altered_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """Safetensors files with another header, of any claimed length, and more or fewer bytes behind it."""
    begin = 8 + int.from_bytes(data[:8], "little")
    dtypes = st.sampled_from(("F32", "BF16", "F64", "I64", "U8", "BOOL", "F4", "F8_E8M0", "C64", "Q9", ""))
    sizes = st.sampled_from((0, 1, 2, 7, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1))
    entry = st.fixed_dictionaries(
        {"dtype": dtypes, "shape": st.lists(sizes, max_size=4), "data_offsets": st.lists(sizes, min_size=2, max_size=2)}
    )
    header, body = json.loads(data[8:begin]), data[begin:]
    name = draw(st.sampled_from(sorted(header)))
    match draw(st.integers(0, 5)):
        case 0:
            header[draw(st.sampled_from((name, "a", "\x1b[2J\n", "__metadata__")))] = draw(entry)
        case 1:
            header[name] |= {"shape": draw(st.permutations(header[name]["shape"]))}
        case 2:
            header[name] |= {"dtype": draw(dtypes)}
        case 3:
            header[name] |= {"shape": [0, *draw(st.lists(sizes, max_size=3))], "data_offsets": [0, 0]}
        case 4:
            body = draw(st.sampled_from((body[:-1], body + b"\0", b"", b"\xff" * len(body), b"\x7f\xc0" * len(body))))
        case _:
            header = draw(altered_value([header]))
    text = json.dumps(header).encode(errors="surrogatepass") + b" " * draw(st.integers(0, 9))
    claimed = draw(
        st.sampled_from((*[len(text)] * 9, 0, 1, len(text) + 1, len(text) + len(body), 10**8, 2**63, 2**64 - 1))
    )
    return claimed.to_bytes(8, "little") + text + body


BOMB_BYTES = 128 << 20


@cache
def bomb(pack: Callable[[int], Any]) -> bytes:
    """Few bytes that hold BOMB_BYTES."""
    packer, zeros = pack(9), bytes(1 << 20)
    return b"".join([*(packer.compress(zeros) for _ in range(BOMB_BYTES >> 20)), packer.flush()])


@st.composite
def altered_part(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Encoded parts, the line before which names their encoding: bombs, other encodings, other compressors' output."""
    name, _, part = draw(st.sampled_from(originals)).partition(b"\n")
    name = draw(st.sampled_from((name, b"", b"deflate", b"shuffle4-deflate", b"gzip", b"deflate\0", b"DEFLATE")))
    content = draw(st.sampled_from((b"", b"\0", part, bytes(1 << 18))) | st.binary(max_size=100))
    window, strategy = draw(st.sampled_from((15, 15, 9, -15, 31))), draw(st.sampled_from((0, 2, 3, 4)))
    packer = zlib.compressobj(draw(st.integers(0, 9)), zlib.DEFLATED, window, 8, strategy)
    packed = packer.compress(content) + packer.flush(draw(st.sampled_from((zlib.Z_FINISH, zlib.Z_SYNC_FLUSH))))
    whole = (packed, packed * 2, packed + part, packed[:-4], part + packed, content, bomb(zlib.compressobj))
    return name + b"\n" + draw(st.sampled_from(whole))


FLOWER = (  # what Flower carries in a ConfigRecord
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from((-1, 0, 1, 2, 3, 1 << 40, (1 << 40) + 1, 128 << 20))
    | st.floats()
    | WORDS
    | st.text(max_size=20)
    | st.sampled_from(("x" * 5000, "x" * LARGE, "[" * 9000))
    | st.binary(max_size=20)
    | st.lists(st.integers(-9, 9), max_size=3)
    | st.lists(WORDS, max_size=3)
)


@st.composite
def altered_message(draw: st.DrawFn, originals: Sequence[RecordDict]) -> bytes:
    """Messages of Flower with other fields, parts and records."""
    record = copy.deepcopy(draw(st.sampled_from(originals)))
    names = st.sampled_from(
        ("verb", "protocol", "hop", "sha256", "size", "offset", "length", "encoding", "keep", "error")
    )
    for _ in range(draw(st.integers(1, 3))):
        ctl = record.get("ctl")
        match draw(st.integers(0, 5)):
            case 0 | 1 if isinstance(ctl, ConfigRecord) and ctl:
                ctl[draw(st.sampled_from(sorted(ctl)))] = draw(FLOWER)
            case 2 if isinstance(ctl, ConfigRecord) and ctl:
                del ctl[draw(st.sampled_from(sorted(ctl)))]
            case 3 if isinstance(ctl, ConfigRecord):
                ctl[draw(names | WORDS)] = draw(FLOWER)
            case 4:
                array = st.builds(
                    Array,
                    st.sampled_from(("uint8", "float32", "object", "")),
                    st.lists(st.sampled_from((0, 1, 3, 100, 2**31 - 1)), max_size=3).map(tuple),
                    st.sampled_from(("raw.bytes", "numpy.ndarray", "")),
                    st.sampled_from((b"", b"x", b"x" * 100, b"\x80\x04.")),
                )
                arrays = st.dictionaries(st.sampled_from(("part", "more", "")), array, max_size=2)
                _put(record, "part", ArrayRecord(draw(arrays)))
            case _:
                records = st.sampled_from((MetricRecord({"a": 1}), ConfigRecord({"verb": "hello"}), ArrayRecord()))
                _put(record, draw(st.sampled_from(("ctl", "part", "images", ""))), copy.deepcopy(draw(records)))
    return flower_bytes(record)


def _put(record: RecordDict, name: str, part: ArrayRecord | ConfigRecord | MetricRecord) -> None:
    record.pop(name, None)  # Flower warns where a record takes the place of one of another type
    record[name] = part


def flower_bytes(record: RecordDict) -> bytes:
    """A record as it is on the wire."""
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


@st.composite
def altered_bundle(draw: st.DrawFn) -> bytes:
    """Zip archives with code, other configuration, names that a reader may take for others, or bombs in them."""
    names = ("pyproject.toml", MANIFEST, "app.py", "../pyproject.toml", "/pyproject.toml", "PYPROJECT.TOML", "a/")
    other = FEDERATION.replace("invcoss_site.app:app", draw(st.sampled_from(("os:system", "invcoss_server.app:app"))))
    contents = (FEDERATION.encode(), other.encode(), FEDERATION.encode() + b"# x\n", b"", b"\xff", bytes(1 << 20))
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings(action="ignore"):  # of names that are twice
        for number in range(draw(st.integers(0, 3))):
            name = zipfile.ZipInfo(draw(st.sampled_from((names[min(number, 1)], *names))))  # whose date is fixed
            archive.writestr(name, draw(st.sampled_from(contents)), draw(st.sampled_from(methods)))
    data = file.getvalue()
    if draw(st.integers(0, 4)) == 0:
        data = bomb_bundle(draw(st.sampled_from((zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED))), draw(st.integers(1, 9999)))
    if draw(st.booleans()):  # a field of one of the headers says something else
        at = data.find(draw(st.sampled_from((b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")))) + draw(st.integers(4, 40))
        other = draw(st.binary(min_size=1, max_size=4))
        data = data[:at] + other + data[at + len(other) :]
    return data


def bomb_bundle(method: int, claimed: int) -> bytes:
    """A bundle whose configuration unpacks to far more than the `claimed` bytes that its directory names."""
    packed = bomb(bz2.BZ2Compressor) if method == zipfile.ZIP_BZIP2 else bomb(zlib.compressobj)[2 : 60 << 10]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml"), packed)
    data, code, size = file.getvalue(), method.to_bytes(2, "little"), len(packed).to_bytes(4, "little")
    local, directory = data.find(b"PK\x03\x04"), data.rfind(b"PK\x01\x02")
    data = data[: local + 8] + code + data[local + 10 : directory + 10] + code + data[directory + 12 :]
    return data.replace(size * 2, size + claimed.to_bytes(4, "little"))  # compressed size, size
