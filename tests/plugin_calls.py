"""A plugin from registration to launch, through its C++ interface: run by test_plugin_calls.py in a process that finds
its fake driver, as `plugin_calls.py OP VERSION DTYPE KERNELS`. Writes found.json."""

import ctypes
import json
import sys
from ctypes import c_int32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, get_args

import plugin_abi as abi

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import CARRIED_PARTS, CHUNK_PARTS, KernelPart, cubin_name, read_cubin
from ttt_video_engine.engines.tensorrt import operators
from ttt_video_engine.engines.tensorrt import plugin as plugins
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import INPUTS, OP_TYPES, PROJECTIONS_INPUTS

GPU = "sm_89"
BATCH, HEADS, MINI_BATCHES, HEAD_DIM = 2, 3, 5, 16
MINI_BATCH: dict[TTTKind, int] = {"linear": 16, "mlp": 64}
LAYER = b"layers.0.ttt.forward"
MOST_ARGUMENTS = 32
CHUNK_MINI_BATCHES = 2
"""Of versions 2 and 3: three chunks, of which the last has one mini-batch."""
VERSIONS: dict[int, dict[TTTKind, tuple[str, ...]]] = {1: INPUTS, 2: PROJECTIONS_INPUTS, 3: PROJECTIONS_INPUTS}
PARTS: dict[int, tuple[KernelPart, ...]] = {1: ("scan",), 2: CHUNK_PARTS, 3: CARRIED_PARTS}
STATE = ("W1", "b1", "W2", "b2")
FLOAT32, INT32 = ("eta", "rate_scale", "cos", "sin"), ("tokens", "rate_tokens")


def shapes(op: TTTKind, version: int, batch: int) -> list[tuple[int, ...]]:
    clip: tuple[int, ...] = (batch, HEADS, MINI_BATCHES, MINI_BATCH[op], HEAD_DIM)
    hidden = 4 * HEAD_DIM
    inner: dict[TTTKind, list[tuple[int, ...]]] = {
        "linear": [(HEADS, HEAD_DIM, HEAD_DIM), (HEADS, 1, HEAD_DIM)],
        "mlp": [(HEADS, HEAD_DIM, hidden), (HEADS, 1, hidden), (HEADS, hidden, HEAD_DIM), (HEADS, 1, HEAD_DIM)],
    }
    weights = [(HEADS, HEAD_DIM), (HEADS, HEAD_DIM), *inner[op]]
    if version == 1:
        return [clip, clip, clip, clip[:4], *weights]
    if version == 3:
        weights = [*weights[:2], *((batch, *shape) for shape in inner[op])]
    table, tokens = (MINI_BATCHES, MINI_BATCH[op]), MINI_BATCHES * MINI_BATCH[op]
    clip, angles = (batch, tokens, HEADS * HEAD_DIM), (*table, HEAD_DIM // 2)
    return [clip, clip, clip, (batch, tokens, HEADS), (), angles, angles, table, table, *weights]


class Calls:
    """Calls of one plugin. `types` are TensorRT's numbers of the activations' dtype, of float32 and of int32."""

    def __init__(self, op: TTTKind, version: int, types: tuple[int, int, int]) -> None:
        self.op, self.version, (self.type, self.float32, self.int32) = op, version, types
        self.names = VERSIONS[version][op]
        self.count = len(self.names)
        own = dict.fromkeys(FLOAT32, self.float32) | dict.fromkeys(INT32, self.int32)
        self.state = [name for name in self.names if name in STATE] if version == 3 else []
        own |= dict.fromkeys(self.state, self.float32)
        self.dtypes = [own.get(name, self.type) for name in self.names]
        self.outputs = 1 + len(self.state)

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        return shapes(self.op, self.version, batch)

    def descs(self, batch: int, **changed: tuple[int, ...]) -> Any:
        """Inputs, or those of another shape by name."""
        tensors = zip(self.names, self.shapes(batch), self.dtypes, strict=True)
        return array(abi.TensorDesc, [abi.tensor_desc(changed.get(name, shape), kind) for name, shape, kind in tensors])

    def output(self, batch: int) -> Any:
        return array(abi.TensorDesc, [abi.tensor_desc(shape, kind) for _, shape, kind in self.given(batch)])

    def given(self, batch: int) -> list[tuple[str, tuple[int, ...], int]]:
        """The output, then the states that version 3 gives: name, shape, dtype."""
        states = [(name, self.shapes(batch)[self.names.index(name)], self.float32) for name in self.state]
        return [("XQW", self.shapes(batch)[0], self.type), *states]

    def dynamic(self, **changed: tuple[int, ...]) -> Any:
        """Inputs, then outputs, with a batch of 1 to 2."""
        tensors = [*zip(self.names, self.shapes(-1), self.dtypes, strict=True), *self.given(-1)]
        return array(
            abi.DynamicTensorDesc, [abi.dynamic_desc(changed.get(name, shape), kind) for name, shape, kind in tensors]
        )

    def build(self, capability: abi.Interface) -> dict[str, object]:
        found: dict[str, object] = {}
        count, both = self.count, self.dynamic()
        found["outputs"] = capability.call("getNbOutputs")
        found["tactics"] = capability.call("getNbTactics")
        found["valid tactics"] = capability.call("getValidTactics", (c_int32 * 1)(), 0)
        outputs = ctypes.pointer(both[count]), self.outputs
        found["workspace"] = capability.call("getWorkspaceSize", both, count, *outputs)
        found["combinations"] = capability.call("getFormatCombinationLimit")
        found["texts"] = [capability.call(name) for name in ("getTimingCacheID", "getMetadataString")]
        types = (c_int32 * self.outputs)(*[-1] * self.outputs)
        status = capability.call("getOutputDataTypes", types, self.outputs, (c_int32 * count)(*self.dtypes), count)
        found["output types"] = [status, list(types)]
        found["output shape"] = self.output_shape(capability)
        found["other shape"] = self.output_shape(capability, XV=(*self.shapes(-1)[2][:-1], 1))[0]
        found["configured"] = capability.call("configurePlugin", both, count, *outputs)
        other = self.dynamic(W1=(HEADS, 1, 1))
        outputs = ctypes.pointer(other[count]), self.outputs
        found["not configured"] = capability.call("configurePlugin", other, count, *outputs)
        found["formats"] = self.formats(capability)
        return found

    def output_shape(self, capability: abi.Interface, **changed: tuple[int, ...]) -> list[object]:
        """Status; and for each output its rank, and which expression of the input that it is like each axis is."""
        expressions = abi.Expressions()
        whole = zip(self.names, self.shapes(-1), strict=True)
        inputs = array(abi.DimsExprs, [expressions.exprs(changed.get(name, shape)) for name, shape in whole])
        outputs = (abi.DimsExprs * self.outputs)()
        none = (abi.DimsExprs * 1)()
        arguments = (inputs, self.count, none, 0, outputs, self.outputs, expressions.builder)
        status = capability.call("getOutputShapes", *arguments)
        axes = []
        for place, output in zip([0, *map(self.names.index, self.state)], outputs, strict=True):
            like, found = list(inputs[place].expressions), list(output.expressions)
            axes.append([output.count, [like.index(found[axis]) for axis in range(output.count)]])
        return [status, axes]

    def formats(self, capability: abi.Interface) -> dict[str, list[bool]]:
        """By what is changed of it, whether each tensor is accepted after those before it."""

        def ask(position: int, kind: int | None = None, layout: int = 0) -> bool:
            tensors = self.dynamic()
            tensors[position].desc.format = layout
            if kind is not None:
                tensors[position].desc.type = kind
            return bool(capability.call("supportsFormatCombination", position, tensors, self.count, self.outputs))

        positions = range(self.count + self.outputs)
        return {
            "same": [ask(position) for position in positions],
            "float32": [ask(position, self.float32) for position in positions],
            "int32": [ask(position, self.int32) for position in positions],
            "another layout": [ask(position, layout=1) for position in positions],
        }

    def run(self, capability: abi.Interface, folder: Path, dtype: DType, workspace: int) -> dict[str, object]:
        cubins = {}
        for part in PARTS[self.version]:
            cubin, _ = read_cubin(folder, cubin_name(self.op, GPU, dtype, MINI_BATCH[self.op], HEAD_DIM, part))
            sizes = [4 if parameter.startswith("num_") else 8 for parameter in cubin.parameters]
            driver().fake_expect(cubin.entry.encode(), (c_int32 * len(sizes))(*sizes), len(sizes))
            cubins[cubin.entry] = cubin
        stream = cuda.Stream()
        tensors = [cuda.DeviceBuffer(64, stream) for _ in range(self.count + self.outputs)]
        addresses = [tensor.pointer for tensor in tensors]
        room = cuda.DeviceBuffer(max(workspace, 64), stream)
        found: dict[str, object] = {"tactic": capability.call("setTactic", 0), "room": room.pointer}
        descs, output = self.descs(BATCH), self.output(BATCH)
        found["shape"] = capability.call("onShapeChange", descs, self.count, output, self.outputs)
        other = self.descs(BATCH, norm_bias=(HEADS, 1))
        found["other shape"] = capability.call("onShapeChange", other, self.count, output, self.outputs)

        def enqueue(pointers: list[int], batch: int = BATCH) -> int:
            inputs = (c_void_p * self.count)(*pointers[: self.count])
            outputs = (c_void_p * self.outputs)(*pointers[self.count :])
            arguments = (self.descs(batch), self.output(batch), inputs, outputs, room.pointer, stream.handle)
            return int(capability.call("enqueue", *arguments))

        runs = []
        for batch in (BATCH, 1):
            driver().fake_forget()
            status = enqueue(addresses, batch)
            launches, last = recorded(), launched()
            runs.append({"status": status, "launches": launches, "last": last})
        found["runs"] = runs
        found["addresses"], found["stream"] = addresses, stream.handle
        driver().fake_forget()
        found["misaligned"] = [enqueue([addresses[0] + 2, *addresses[1:]]), names_of(recorded())]
        found["cubins"] = {
            entry: {"threads": 32 * cubin.num_warps, "shared": cubin.shared_memory} for entry, cubin in cubins.items()
        }
        fields = capability.call("getFieldsToSerialize")
        found["fields"] = fields.contents.count if fields else None
        return found

    def without_cubin(self, capability: abi.Interface) -> list[object]:
        """Statuses of onShapeChange and enqueue, and the launches."""
        driver().fake_forget()
        descs, output = self.descs(BATCH), self.output(BATCH)
        shape = capability.call("onShapeChange", descs, self.count, output, self.outputs)
        inputs, outputs = (c_void_p * self.count)(*[64] * self.count), (c_void_p * self.outputs)(*[64] * self.outputs)
        status = capability.call("enqueue", descs, output, inputs, outputs, None, cuda.Stream().handle)
        return [shape, status, recorded()]


def array(kind: Any, items: list[Any]) -> Any:
    return (kind * len(items))(*items)


def driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def launched() -> dict[str, int]:
    """The settings of the last launch that the fake driver was asked for."""
    names = ("blocks", "threads", "shared", "stream")
    values = (c_uint64 * 9)()
    driver().fake_report(values)
    return dict(zip(names, values, strict=False))


def recorded() -> list[tuple[str, int, list[int]]]:
    """Entry point, blocks and all arguments of each launch."""
    library, found = driver(), []
    library.fake_launch.restype = ctypes.c_char_p
    for index in range(library.fake_launches()):
        blocks, arguments, count = c_uint64(), (c_uint64 * MOST_ARGUMENTS)(), c_int32()
        name = library.fake_launch(index, ctypes.byref(blocks), arguments, ctypes.byref(count))
        found.append((name.decode(), blocks.value, list(arguments[: count.value])))
    return found


def names_of(launches: list[tuple[str, int, list[int]]]) -> list[str]:
    return [name for name, _, _ in launches]


def main(op: TTTKind, version: int, dtype: DType, folder: Path) -> None:
    operators.CHUNK_TOKENS = CHUNK_MINI_BATCHES * MINI_BATCH[op]
    cuda.device()
    package = load_package("tensorrt_rtx")
    types = int(package.dtypes[dtype]), int(package.dtypes["float32"]), int(package.api.DataType.INT32)
    found: dict[str, Any] = {"type": types[0], "float32": types[1]}
    with plugins.registered_plugins(package, folder, GPU):
        registry = package.api.get_plugin_registry()
        made = registry.get_creator(OP_TYPES[op], str(version), plugins.NAMESPACE)
        creator = abi.creator(made)
        names = ("getPluginName", "getPluginVersion", "getPluginNamespace")
        found["creator"] = [creator.call(name).decode() for name in names]
        found["creator's fields"] = creator.call("getFieldNames").contents.count
        calls = Calls(op, version, types)
        for phase in ("BUILD", "RUNTIME"):
            number = int(getattr(package.api.TensorRTPhase, phase))
            layer = abi.plugin(creator.call("createPlugin", LAYER, ctypes.pointer(abi.FieldCollection()), number))
            core, build, runtime = abi.capabilities(layer)
            _, twin, _ = abi.capabilities(abi.plugin(layer.call("clone")))
            found[phase] = {
                "core": [core.call(name).decode() for name in names],
                "build": calls.build(build),
                "clone": [twin.address != build.address, calls.build(twin)],
            }
        _, _, attached = abi.capabilities(abi.plugin(runtime.call("attachToContext", None)))
        found["run"] = calls.run(attached, folder, dtype, found["RUNTIME"]["build"]["workspace"])
        found["attached"] = attached.address != runtime.address
    with plugins.registered_plugins(package, folder / "empty", GPU):
        made = registry.get_creator(OP_TYPES[op], str(version), plugins.NAMESPACE)
        layer = abi.plugin(abi.creator(made).call("createPlugin", LAYER, ctypes.pointer(abi.FieldCollection()), 1))
        found["no cubin"] = calls.without_cubin(abi.capabilities(layer)[2])
    Path("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    kind, number, precision, kernels = sys.argv[1:]
    assert kind in get_args(TTTKind) and precision in get_args(DType)
    main(kind, int(number), precision, Path(kernels))  # type: ignore[arg-type]  # checked above
