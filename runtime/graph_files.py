"""Finds the external data of an ONNX graph: which bytes of which files it reads. Decodes its protobuf without onnx.

Only messages that can contain tensors are decoded, as onnx.proto defines them. A graph that cannot be decoded is
refused, so that no tensor is missed. The encoding: https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BundleError

_TENSOR = "TensorProto"
CHILDREN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
"""Message → field number → message, for every path to a tensor."""
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14
"""Fields of a TensorProto. An entry of external_data has its key in field 1 and its value in field 2."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types. Groups, which onnx.proto does not use, are refused."""


def check_external_data(graph: Path, weights: Path, size: int) -> None:
    """Raises BundleError unless all external data of `graph` is in `weights`, in the same folder, of `size` bytes.

    The message names the graph, the tensor and the wrong location.
    """
    try:
        for name, entries in external_data(graph.read_bytes()):
            fault = _fault(entries, weights.name if weights.parent == graph.parent else None, size)
            if fault:
                raise BundleError(f"{graph}: {name}: {fault}; {EXPORT_AGAIN}")
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{graph}: is not an ONNX graph; {EXPORT_AGAIN}") from error


def external_data(model: bytes) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields (tensor name, its external_data entries in order) for every tensor of a ModelProto that is in a file.

    Raises IndexError or ValueError, such as UnicodeDecodeError, where `model` is not an encoded ModelProto.
    """
    pending = [("ModelProto", 0, len(model))]
    while pending:
        kind, start, end = pending.pop()
        if kind == _TENSOR:
            yield from _external(model, start, end)
            continue
        children = CHILDREN[kind]
        for field, wire, first, last in _fields(model, start, end):
            if field in children:
                if wire != _BYTES:
                    raise ValueError(f"{kind}: field {field} is not a message")
                pending.append((children[field], first, last))


def _external(model: bytes, start: int, end: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    name, entries, is_external = "", list[tuple[str, str]](), False
    for field, wire, first, last in _fields(model, start, end):
        if field == _NAME and wire == _BYTES:
            name = model[first:last].decode()
        elif field == _EXTERNAL_DATA and wire == _BYTES:
            pair = {key: model[a:b].decode() for key, _, a, b in _fields(model, first, last)}
            entries.append((pair.get(1, ""), pair.get(2, "")))
        elif field == _DATA_LOCATION:
            is_external = is_external or model[first:last] != b"\0"
    if is_external or entries:
        yield name, entries


def _fields(model: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (number, wire type, start and end of the content) of each field of the message at [at, end)."""
    while at < end:
        tag = model[at]
        tag, at = (tag, at + 1) if tag < 0x80 else _varint(model, at)  # most tags have one byte
        if tag >= 1 << 32:  # readers truncate it to 32 bits, which gives another field
            raise ValueError(f"a tag of {tag} before byte {at}")
        wire = tag & 7
        if wire == _BYTES:
            length = model[at]
            length, at = (length, at + 1) if length < 0x80 else _varint(model, at)
            last = at + length
        elif wire == _VARINT:
            _, last = _varint(model, at)
        elif wire in (_FIXED64, _FIXED32):
            last = at + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if last > end:
            raise ValueError(f"a field ends at byte {last}, its message at {end}")
        yield tag >> 3, wire, at, last
        at = last


def _varint(model: bytes, at: int) -> tuple[int, int]:
    """A number, encoded in at most ten bytes of seven bits each, and the index of the byte after it."""
    value = model[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = model[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise ValueError(f"a number of more than ten bytes at byte {at}")


def _fault(entries: list[tuple[str, str]], file: str | None, size: int) -> str:
    """What is wrong with the location of a tensor; empty where it is in the first `size` bytes of `file`."""
    place = dict(entries)
    if len(place) != len(entries):
        return "has an external_data key twice"
    if file is None or place.get("location") != file:
        return f"is in {place.get('location')!r}, which is not the weight file of its graph"
    if not all(place.get(key, "").isdecimal() and place[key].isascii() for key in ("offset", "length")):
        return f"has the offset {place.get('offset')!r} and length {place.get('length')!r}, which must be numbers"
    if len(place["offset"] + place["length"]) > 40 or int(place["offset"]) + int(place["length"]) > size:
        return f"is at {place['offset']} + {place['length']}; its file has {size} bytes"
    return ""
