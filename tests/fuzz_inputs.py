"""Inputs that are nearly right: mutations of the bytes of a file, and of the values of a JSON document.

Both are lists of small numbers, so that hypothesis draws them fast and shrinks a failing one.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

HUGE = 1 << 33
"""Bytes that a sparse file is extended by: a reader that allocates what a file claims to be runs out of memory."""

TOKENS = [
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0.5",
        b"9" * 400,
        b"9" * 5000,
        b"18446744073709551616",
        b"null",
        b"true",
    ),
    *(b"[" * 3000, b'{"a":' * 3000, b"]", b"}", b'"', b",", b":", b"\\", b"\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"\xc0\xaf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"../../x", b'"text":', b'"F64"', b'"BF16"', b'"I64"'),
]
"""Bytes that a parser may stumble over, to insert anywhere."""

ODD = [
    *("NaN", "-Infinity", "1e400", "-1e400", "1e308", "-1", "0", "1", "2", "4", "0.5", "1.0", "-0.0", "1e3", "true"),
    *("null", "false", '""', "[]", "{}", "[[]]", '"a"', '"3s"', '"0s"', '"999999s"', '"1"', '"\\ud800"', '"\\u0000"'),
    *('"../../x"', '"/etc/passwd"', '"\\u2028\\u202e\\n"', f'"{"x" * 30_000}"', f'"{"9" * 5000}"', '{"a":1,"a":2}'),
    *(str(2**31), str(2**63), str(2**64), str(2**128), str(-(2**63) - 1), "9" * 400, "9" * 5000),
    *("[" * 3000, "[" * 900 + "]" * 900, '{"a":' * 3000, f"[{','.join(['{}'] * 300)}]", "[1,[2],{}]", '["a"]'),
]
"""JSON values, and what looks like them, to put in the place of any value."""

Numbers = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Content:
    """The bytes of a file, by how many more, all zero, it is extended, and which valid example it was made from."""

    data: bytes
    tail: int = 0
    which: int = 0


class Object(list[tuple[str, Any]]):
    """A JSON object, in which a key may occur twice."""


@dataclass(frozen=True)
class Raw:
    """What is written as it is."""

    text: str


def numbers(most: int = 4) -> st.SearchStrategy[Numbers]:
    """What `mutated_bytes` and `mutated_json` are told to do: (what, where, with what) a few times."""
    return st.lists(st.tuples(st.integers(0, 15), st.integers(0, 1 << 16), st.integers(0, 255)), max_size=most)


def tails() -> st.SearchStrategy[int]:
    return st.integers(0, 99).map(lambda number: HUGE if number == 99 else 0)


def mutated_bytes(data: bytes, orders: Numbers) -> bytes:
    """Flips, deletions, insertions, copies, cuts and other lengths, one after the other."""
    for what, where, value in orders:
        place = where % (len(data) + 1)
        before, after = data[:place], data[place:]
        match what:
            case 0 | 1 | 2 | 3:
                data = before + bytes(byte ^ (1 << value % 8) for byte in after[:1]) + after[1:]
            case 4 | 5:
                data = before + bytes([value]) + after[1:]
            case 6:
                data = before + after[1 + value % 40 :]
            case 7 | 8 | 9:
                data = before + TOKENS[value % len(TOKENS)] + after
            case 10:
                data = before + after[:value] * 2 + after[value:]
            case 11:
                data = before
            case 12:  # the length of a safetensors header
                data = (_LENGTHS[value % len(_LENGTHS)] + where % 3).to_bytes(8, "little", signed=True) + data[8:]
            case 13:
                data = before + after[value % 9 :] + before[: value % 9]
            case 14:
                data = after + before
            case _:
                data = before + bytes(value) + after[value:]
    return data


_LENGTHS = [-1, 0, 1, 100, 1 << 16, 100_000_000, 1 << 40, (1 << 63) - 4, -(1 << 63)]


def mutated_json(value: object, orders: Numbers) -> str:
    """Odd values, values and keys left out, repeated, renamed, nested or exchanged, one after the other."""
    top = [_editable(value)]
    for what, where, number in orders:
        places = list(_places(top))
        if len(places) > _MOST_PLACES:  # copies of copies would take all memory
            break
        holder, index = places[where % len(places)]
        item = holder[index]
        found = item[1] if isinstance(holder, Object) else item

        def put(new: Any, holder: list[Any] = holder, index: int = index, item: Any = item) -> None:
            holder[index] = (item[0], new) if isinstance(holder, Object) else new

        match what:
            case 0 | 1 | 2 | 3 | 4 | 5 | 6:
                put(Raw(ODD[number % len(ODD)]))
            case 7 if holder is not top:
                del holder[index]
            case 8 | 9:
                holder[index:index] = [item] * (number if number > 250 else 1 + number % 3)
            case 10 if isinstance(holder, Object):
                holder[index] = (_KEYS[number % len(_KEYS)], found)
            case 11:
                put([found])
            case 12:
                put(Raw("[" * number + _spelled(found) + "]" * number))
            case 13:
                put(Object([(_KEYS[number % len(_KEYS)], found)]))
            case 14 if len(places) > 1:
                other, at = places[number % len(places)]
                # As text: a list that contained itself would never end.
                put(Raw(_spelled(other[at][1] if isinstance(other, Object) else other[at])))
            case _:
                if isinstance(found, str):
                    put(found + _TEXTS[number % len(_TEXTS)])
    # A mutation of the whole document may have left several, or none.
    return "".join(_spelled(one) for one in top)


_MOST_PLACES = 2000
_KEYS = ["text", "neg_text", "sha256", "latents", "state", "", "\0", "\ud800", "a" * 3000, "../x", "Text", "__proto__"]
_TEXTS = [
    "é",
    "\0",
    "\ud800",
    "\n",
    " ",
    "\u202e",
    "\U0001f43b",
    "</s>",
    "<extra_id_0>",
    "x" * 25_000,
    "‿" * 600,
    "\x1b[2J",
]


def _editable(value: object) -> Any:
    if isinstance(value, dict):
        return Object((key, _editable(one)) for key, one in value.items())
    return [_editable(one) for one in value] if isinstance(value, list) else value


def _places(holder: list[Any], depth: int = 0) -> Iterator[tuple[list[Any], int]]:
    for index, item in enumerate(holder[:300]):
        yield holder, index
        inner = item[1] if isinstance(holder, Object) else item
        if isinstance(inner, list) and depth < 20:
            yield from _places(inner, depth + 1)


def _spelled(value: Any) -> str:
    match value:
        case Raw():
            return value.text
        case Object():
            return "{" + ",".join(f"{json.dumps(key)}:{_spelled(one)}" for key, one in value) + "}"
        case list():
            return "[" + ",".join(_spelled(one) for one in value) + "]"
    return json.dumps(value)


def of_bytes(valid: list[bytes]) -> st.SearchStrategy[Content]:
    """One of the files, with its bytes mutated."""
    return st.builds(
        lambda which, orders, tail: Content(mutated_bytes(valid[which], orders), tail, which),
        st.integers(0, len(valid) - 1),
        numbers(),
        tails(),
    )


def of_json(valid: list[object], write: Callable[[str], bytes] | None = None) -> st.SearchStrategy[Content]:
    """One of the documents with its values mutated, and now and then the bytes of that."""

    def content(which: int, values: Numbers, raw: Numbers, tail: int) -> Content:
        text = mutated_json(valid[which], values)
        data = write(text) if write else text.encode("utf-8", "surrogatepass")
        return Content(mutated_bytes(data, raw), tail, which)

    return st.builds(
        content, st.integers(0, len(valid) - 1), numbers(), st.one_of(st.just([]), st.just([]), numbers(2)), tails()
    )
