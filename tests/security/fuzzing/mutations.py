"""How a hostile hand alters what a side receives: bytes at random, and JSON and TOML by who knows their form.

Everything here is a function of the original and of what is drawn, so a mutation is known by its seed and number.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Json = Any
Strategy = st.SearchStrategy[bytes]

LARGE = 2 << 20  # beyond every limit on a record

TOKENS = (
    b"", b"\0", b"\n", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800", b"\\u0000", b",",
    b"{}", b"[" * 4000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"-0", b"NaN", b"Infinity", b"true", b"null", b"nan",
    b"inf", b"1979-05-27T07:32:00Z", b"../../etc/passwd", b"\x1b[2J", b"\xe2\x80\xae", b"\xff" * 8,
    b"\x7f" + b"\xff" * 7, b"PK\x05\x06", b"PK\x01\x02",
)  # fmt: skip


def altered_bytes(originals: Sequence[bytes], random: Random) -> bytes:
    """One of `originals` after 1 to 4 changes that know nothing of its form."""
    data = bytearray(random.choice(originals))
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        at, length = random.randrange(len(data) + 1), min(random.randint(1, 16), len(data))
        match random.randrange(10):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 2 if data:
                data[at % len(data)] = random.randrange(256)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = random.randbytes(length)
            case 5:
                data[at:at] = data[at : at + 8 * length]
            case 6:
                del data[at:]
            case 7:
                data[at : at + random.randint(0, 8)] = random.choice(TOKENS)
            case 8:
                other = random.choice(originals)
                data[at:] = other[random.randrange(len(other) + 1) :]
            case _:
                if random.randrange(20) == 0:
                    data[at:at] = bytes([random.randrange(256)]) * LARGE
                else:
                    data += data[at : at + length]
    return bytes(data)


def examples(strategy: Strategy, seed: int, count: int) -> list[bytes]:
    """`count` examples of a strategy, or all if it has fewer; the same for the same seed."""
    found: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=HealthCheck
    )
    @given(strategy)
    def collect(example: bytes) -> None:
        found.append(example)

    collect()
    return found[:count]


# JSON and TOML

WORDS = st.sampled_from(
    ("", "a", "north", "s00-train", "s00-train\n", "../x", "0" * 64, "f" * 64, "1", "NaN", "é", "\x1b[31m\nx", "\u202e")
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from((2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**4000))
    | st.floats()
    | WORDS
    | st.text(max_size=12)
    | st.sampled_from(("x" * 5000, "\ud800"))
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
) | st.builds(lambda count: [0] * count, st.just(500))


@st.composite
def altered_value(draw: st.DrawFn, originals: Sequence[Json]) -> Json:
    """One of `originals` with 1 to 3 of its parts replaced, removed, added, repeated or exchanged."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        part = holder[key]
        match draw(st.integers(0, 9)):
            case 0:
                del holder[key]
            case 1 | 7 | 8 | 9 if isinstance(part, bool):
                holder[key] = not part
            case 1 | 7 | 8 | 9 if isinstance(part, int | float) and abs(part) < 2**64:
                holder[key] = draw(st.sampled_from((part + 1, -part, float(part), int(part), str(part), part / 3)))
            case 1 | 7 | 8 | 9 if isinstance(part, str):
                holder[key] = draw(st.sampled_from((part + "0", part[1:], part.upper(), part[::-1], [part])))
            case 1 | 7 | 8 | 9 if isinstance(part, list):
                holder[key] = draw(st.sampled_from((part * 2, part[::-1], part[1:], dict.fromkeys("ab", part))))
            case 2 if isinstance(holder, dict):
                holder[draw(WORDS)] = draw(VALUES)
            case 3 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(part))
            case 4:
                other, at = draw(st.sampled_from(places))
                if at in other if isinstance(other, dict) else at < len(other):
                    holder[key] = copy.deepcopy(other[at])
            case _:
                holder[key] = draw(VALUES)
    return value


def _places(value: Json) -> Iterator[tuple[Json, Json]]:
    """Every part of a JSON value, as what holds it and its key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield value, key
        yield from _places(value[key])


FORMS: tuple[Callable[[Json], str], ...] = (
    lambda value: json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
    lambda value: json.dumps(value, sort_keys=True, indent=2) + "\n",
    lambda value: json.dumps(value),
    lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).replace("{", '{"a":1,', 1),
    lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).replace("{", '{"run":"a","site":"a",', 1),
    lambda value: "\ufeff" + json.dumps(value, sort_keys=True, separators=(",", ":")),
    lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")) + " ",
)


@st.composite
def altered_json(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """JSON documents with altered values, a third of them in another form than they were written in."""
    value = draw(altered_value([json.loads(data) for data in originals]))
    form = draw(st.sampled_from((*[FORMS[0]] * 12, *FORMS[1:])))
    return form(value).encode(errors="surrogatepass")


def altered_toml(originals: Sequence[Json]) -> Strategy:
    """TOML documents of altered tables."""
    tables = altered_value(originals).map(lambda value: value if isinstance(value, dict) else {"a": value})
    return tables.map(lambda table: to_toml(table).encode(errors="surrogatepass"))


def to_toml(table: dict[str, Json]) -> str:
    """A table as TOML, what is inside it in line; null, which TOML has not, is left out."""
    return "".join(f"{_toml(str(key))} = {_toml(value)}\n" for key, value in table.items() if value is not None)


def _toml(value: Json) -> str:
    if isinstance(value, dict):
        pairs = (f"{_toml(str(key))} = {_toml(part)}" for key, part in value.items() if part is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(part) for part in value if part is not None) + "]"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf"
    return json.dumps(value, ensure_ascii=False)
