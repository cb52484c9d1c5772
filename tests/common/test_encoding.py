"""Encodings of parts: exact there and back, never longer, and a hostile part is refused before it takes memory."""

import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invcoss_common.encoding import FOR_IMAGES, FOR_WEIGHTS, decode, encode
from invcoss_common.errors import ProtocolError
from invcoss_common.modality import SIZES, Geometry
from invcoss_common.model import build_model
from invcoss_common.weights import model_to_bytes

ENCODINGS = ("", FOR_IMAGES, FOR_WEIGHTS)


@pytest.mark.parametrize("asked", ENCODINGS)
@given(data=st.binary(min_size=1, max_size=200) | st.builds(lambda n: bytes(n), st.integers(1, 5000)))
def test_there_and_back_and_never_longer(asked, data):
    encoding, part = encode(data, asked)
    assert encoding in ("", asked) and 0 < len(part) <= len(data)
    assert decode(part, encoding, len(data)) == data


def test_weights_gain_most_from_their_own_encoding():
    model = build_model(SIZES["nano"].model, [Geometry(channels=1, size=(64, 64), patch=(8, 8))], 0)
    for dtype, most in (("float32", 0.85), ("bfloat16", 0.70)):
        data = model_to_bytes(model, dtype)
        shares = {name: len(encode(data, name)[1]) / len(data) for name in ENCODINGS}
        assert shares[FOR_WEIGHTS] < shares[FOR_IMAGES] < 1
        assert shares[FOR_WEIGHTS] < most


def test_random_bytes_go_plain():
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes()
    assert encode(data, FOR_WEIGHTS) == ("", data)


def test_a_part_that_grows_without_end_is_refused_within_its_bound():
    bomb = zlib.compress(bytes(64 << 20), 9)
    tracemalloc.start()
    for encoding in (FOR_IMAGES, FOR_WEIGHTS):
        for limit in (1 << 20, 1, 0, -1):
            with pytest.raises(ProtocolError):
                decode(bomb, encoding, limit)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


DATA = b"0123456789" * 100
WHOLE = zlib.compress(DATA)
BROKEN = {
    "garbage behind its end": WHOLE + b"x",
    "twice": WHOLE * 2,
    "cut short": WHOLE[:-1],
    "a bit flipped": WHOLE[:-3] + bytes([WHOLE[-3] ^ 1]) + WHOLE[-2:],
    "no deflate": DATA,
    "empty": b"",
    "nothing inside": zlib.compress(b""),
    "raw deflate": zlib.compress(DATA, wbits=-15),
    "gzip": zlib.compress(DATA, wbits=31),
}


@pytest.mark.parametrize("encoding", [FOR_IMAGES, FOR_WEIGHTS])
@pytest.mark.parametrize("case", BROKEN)
def test_a_part_that_is_not_whole_is_refused(case, encoding):
    with pytest.raises(ProtocolError):
        decode(BROKEN[case], encoding, 2000)
    assert len(decode(WHOLE, encoding, len(DATA))) == len(DATA)
    with pytest.raises(ProtocolError):
        decode(WHOLE, encoding, len(DATA) - 1)


def test_an_unknown_encoding_is_refused():
    for call in (lambda: encode(DATA, "gzip"), lambda: decode(DATA, "gzip", 2000)):
        with pytest.raises(ProtocolError, match="known are deflate, shuffle4-deflate"):
            call()
