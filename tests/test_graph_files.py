"""What a graph reads from files: found as onnx finds it, and nothing but the bundle's own weights."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.graph_files import CHILDREN, check_external_data, external_data

Run = Callable[..., tuple[int, str, str]]
GOOD = {"location": "model.onnx_data", "offset": "0", "length": "16"}


def external(**place: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*tensors: TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph([], "g", [], [], initializer=tensors)
    return helper.make_model(graph)


def check(folder: Path, content: bytes, size: int = 4096) -> None:
    (folder / "model.onnx").write_bytes(content)
    check_external_data(folder / "model.onnx", folder / "model.onnx_data", size)


def test_every_way_to_a_tensor_is_known() -> None:
    """The table against onnx's own description of its messages."""
    known: dict[str, Any] = {}
    left: list[Any] = [onnx.ModelProto.DESCRIPTOR]
    while left:
        message = left.pop()
        if message.name not in known:
            known[message.name] = message
            left += [field.message_type for field in message.fields if field.message_type]
    leading, before = {"TensorProto"}, set[str]()
    while leading != before:
        before = set(leading)
        for name, message in known.items():
            if any(field.message_type and field.message_type.name in leading for field in message.fields):
                leading.add(name)
    expected = {
        name: {
            field.number: field.message_type.name
            for field in known[name].fields
            if field.message_type and field.message_type.name in leading
        }
        for name in leading - {"TensorProto"}
    }
    assert {name: dict(fields) for name, fields in CHILDREN.items()} == expected
    fields = TensorProto.DESCRIPTOR.fields_by_name
    assert [fields[name].number for name in ("name", "external_data", "data_location")] == [8, 13, 14]


def test_the_graphs_of_a_bundle_as_onnx_reads_them(shared_bundle: Path) -> None:
    graphs = open_bundle(shared_bundle).manifest.graphs.values()
    for graph in graphs:
        content = (shared_bundle / graph.file).read_bytes()
        expected = {
            tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]
            for tensor in onnx.load_from_string(content).graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }
        assert len(expected) > 10 and dict(external_data(content)) == expected


def test_tensors_are_found_wherever_they_hide() -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[external(location="a")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    node.attribute.append(helper.make_attribute("value", external(location="b")))
    node.attribute.append(helper.make_attribute("values", [external(location="c")]))
    outer = helper.make_graph([node], "outer", [], [], initializer=[external(location="d")])
    hidden = helper.make_model(outer)
    sparse = hidden.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external(location="e"))
    function = hidden.functions.add(name="f", domain="d")
    function.node.append(helper.make_node("Constant", [], ["y"], value=external(location="f")))
    hidden.training_info.add().algorithm.initializer.append(external(location="g"))
    found = {dict(entries)["location"] for _, entries in external_data(hidden.SerializeToString())}
    assert found == set("abcdefg")


@pytest.mark.parametrize(
    "change",
    [
        {"location": "../other/model.onnx_data"},
        {"location": "/etc/passwd"},
        {"location": "./model.onnx_data"},
        {"location": "bundle.json"},
        {"location": ""},
        {"offset": "4090"},
        {"offset": "-1"},
        {"offset": "zero"},
        {"length": "4097"},
        {"length": ""},
        {"length": "9" * 5000},
    ],
)
def test_what_lies_elsewhere_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    check(tmp_path, model(external(**GOOD)).SerializeToString())
    with pytest.raises(BundleError, match=r"model\.onnx: w: .*; export the bundle again"):
        check(tmp_path, model(external(**GOOD), external(**{**GOOD, **change})).SerializeToString())


def test_a_second_place_does_not_hide_behind_the_first(tmp_path: Path) -> None:
    tensor = external(**GOOD)
    tensor.external_data.add(key="location", value="model.onnx_data")
    with pytest.raises(BundleError, match="w: has an external_data key twice"):
        check(tmp_path, model(tensor).SerializeToString())
    unmarked = external(**{**GOOD, "location": "other"})
    unmarked.data_location = TensorProto.DEFAULT
    with pytest.raises(BundleError, match="w: is in 'other'"):
        check(tmp_path, model(unmarked).SerializeToString())


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    content = model(external(**GOOD)).SerializeToString()
    broken = [content[:-1], b"\xff" * 20, b"\x3b", b"\x38\x01", content + b"\x0a"]
    aliased = bytes([0xBA, 0x80, 0x80, 0x80, 0x10, 0])  # the tag of the graph, and a bit that readers cut off
    for other in (*broken, aliased):
        with pytest.raises(BundleError, match=r"model\.onnx: is not an ONNX graph"):
            check(tmp_path, other)


def test_no_depth_is_too_deep(tmp_path: Path) -> None:
    content = external(**{**GOOD, "location": "other"}).SerializeToString()
    content = b"\x2a" + bytes(varint(len(content))) + content  # an initializer
    for _ in range(5000):
        for tag in (0x32, 0x2A, 0x0A):  # a graph in an attribute in a node
            content = bytes([tag, *varint(len(content))]) + content
    with pytest.raises(BundleError, match="w: is in 'other'"):
        check(tmp_path, bytes([0x3A, *varint(len(content))]) + content)


def varint(value: int) -> list[int]:
    return [value] if value < 0x80 else [value & 0x7F | 0x80, *varint(value >> 7)]


def test_a_graph_of_full_size_takes_no_time() -> None:
    """As many nodes and weights as the transformer of 5B has; a second is ten times what it takes."""
    weights = [external(**GOOD) for _ in range(1500)]
    nodes = [
        helper.make_node("Transpose", [f"transformer.layers.{i}.x"], [f"transformer.layers.{i}.y"], perm=[0, 2, 1, 3])
        for i in range(15_000)
    ]
    content = helper.make_model(helper.make_graph(nodes, "g", [], [], initializer=weights)).SerializeToString()
    start = time.process_time()
    assert sum(1 for _ in external_data(content)) == 1500
    assert time.process_time() - start < 5


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_a_bundle_whose_graph_reads_another_file_is_refused(
    run: Run, bundle: Path, tmp_path: Path, command: str
) -> None:
    """Its digest is right: whoever makes such a bundle writes the manifest too."""
    path = bundle / "text_encoder/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.graph.initializer.append(external(location="../bundle.json", offset="0", length="16"))
    path.write_bytes(graph.SerializeToString())
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    manifest["files"]["text_encoder/model.onnx"] = {"sha256": sha256_of(path), "size": path.stat().st_size}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    (tmp_path / "bear.json").write_text('[{"text": "A bear bakes bread."}]')
    options = ("sample", tmp_path / "bear.json", "--bundle", bundle, "--output-dir", tmp_path / "out")
    code, out, err = run(*(options if command == "sample" else ("inspect", bundle)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "text_encoder/model.onnx: w: is in '../bundle.json'" in err
