"""How parts of artefacts are made smaller for the wire, without losing a bit, and made whole again within a bound.

The bytes of a float differ in kind: its exponent repeats, its mantissa looks random. `shuffle4-deflate` puts bytes 0,
4, 8, ... first, then 1, 5, 9, ... and so on, which gathers the exponents of float32 and bfloat16 alike, and codes bytes
by how frequent they are; `deflate` also looks for repeated stretches, which images have and weights do not.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from invcoss_common.errors import ProtocolError


class _Encoding(NamedTuple):
    stride: int
    strategy: int


FOR_IMAGES, FOR_WEIGHTS = "deflate", "shuffle4-deflate"
_ENCODINGS = {FOR_IMAGES: _Encoding(1, zlib.Z_DEFAULT_STRATEGY), FOR_WEIGHTS: _Encoding(4, zlib.Z_HUFFMAN_ONLY)}


def encode(part: bytes, encoding: str) -> tuple[str, bytes]:
    """`part` in `encoding` and that encoding's name, or both plain ("") where that is no longer.

    Raises ProtocolError on an unknown encoding.
    """
    if not encoding:
        return "", part
    stride, strategy = _find(encoding)
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    encoded = deflate.compress(_shuffle(part, stride)) + deflate.flush()
    return (encoding, encoded) if len(encoded) < len(part) else ("", part)


def decode(part: bytes, encoding: str, limit: int) -> bytes:
    """The plain bytes of an encoded `part`, at most `limit` of them.

    Raises ProtocolError on an unknown encoding, on more bytes than `limit` (before they are made), on a part that is
    damaged or cut short, and on anything behind its end.
    """
    if not encoding:
        if len(part) > limit:
            raise ProtocolError(f"part of {len(part)} bytes where at most {limit} are expected")
        return part
    stride, _ = _find(encoding)
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(part, max(limit, 0) + 1)  # the one more shows that there would be more
    except zlib.error:
        raise ProtocolError("part that its encoding can't be undone for; transfer it again") from None
    if not 0 < len(plain) <= limit or not inflate.eof or inflate.unused_data:
        raise ProtocolError(f"part that does not hold 1 to {limit} bytes, or does not end where it should")
    return _unshuffle(plain, stride)


def _find(encoding: str) -> _Encoding:
    if encoding not in _ENCODINGS:
        raise ProtocolError(f"part in an unknown encoding; known are {', '.join(_ENCODINGS)}")
    return _ENCODINGS[encoding]


def _shuffle(data: bytes, stride: int) -> bytes:
    """Every `stride`-th byte from the first on, then from the second on, and so on; what is over stays at the end."""
    whole = len(data) - len(data) % stride
    return np.frombuffer(data, np.uint8, whole).reshape(-1, stride).T.tobytes() + data[whole:]


def _unshuffle(data: bytes, stride: int) -> bytes:
    whole = len(data) - len(data) % stride
    return np.frombuffer(data, np.uint8, whole).reshape(stride, -1).T.tobytes() + data[whole:]
