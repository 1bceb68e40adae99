"""The TTT operators as TensorRT plugins that launch our cubins.

TensorRT's parser replaces an `ai.ttt` node by a plugin if its creator is registered, else by the node's function body.
This module fits the versions of the operator (`operators.py`) into TensorRT's interfaces; `engines/kernels` has the
computation.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ttt_video_engine.engines.kernels.cubin import cubin_name, read_cubin
from ttt_video_engine.engines.kernels.launch import LoadedKernel
from ttt_video_engine.engines.tensorrt.operators import Call, Operator, PartOperator, ProjectionsOperator, ScanOperator
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.runtime import ttt_op
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, DType
from ttt_video_engine.runtime.errors import BackendError

NAMESPACE = ttt_op.DOMAIN
OPERATORS: tuple[Operator, ...] = tuple(
    version(op) for op in ttt_op.OP_TYPES for version in (ScanOperator, ProjectionsOperator, PartOperator)
)


@contextmanager
def registered_plugins(package: TensorRT, kernels: Path, gpu: str) -> Iterator[None]:
    """Registers the plugins for the block, with the cubins for `gpu` in the folder `kernels`.

    Engines with plugins must be built, loaded and run within such a block. Raises BackendError where TensorRT refuses
    a plugin.
    """
    registry = package.api.get_plugin_registry()
    loaded = _Kernels(kernels, gpu)
    with ExitStack() as stack:
        stack.callback(loaded.close)
        for operator in OPERATORS:
            creator = _creator(package, operator, loaded)
            if not registry.register_creator(creator, NAMESPACE):
                raise BackendError(f"{package.name} refuses the plugin {creator.name}: {package.take_errors()}")
            stack.callback(registry.deregister_creator, creator)
        yield


class _Kernels:
    """Cubins of one folder and GPU, each loaded on its first launch."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.folder, self.gpu = folder, gpu
        self._loaded: dict[str, LoadedKernel] = {}

    def get(self, name: str) -> LoadedKernel:
        if name not in self._loaded:
            self._loaded[name] = LoadedKernel(*read_cubin(self.folder, name))
        return self._loaded[name]

    def close(self) -> None:
        for kernel in self._loaded.values():
            kernel.close()
        self._loaded.clear()


def _creator(package: TensorRT, operator: Operator, kernels: _Kernels) -> Any:
    api: Any = package.api
    op_type, version = ttt_op.OP_TYPES[operator.op], str(operator.version)

    class Creator(api.IPluginCreatorV3One):  # type: ignore[misc]  # the bases have no types
        def __init__(self) -> None:
            api.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op_type, version, NAMESPACE
            self.field_names = api.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return plugin(name)

    plugin = _plugin_class(package, operator, kernels)
    return Creator()


def _plugin_class(package: TensorRT, operator: Operator, kernels: _Kernels) -> Any:
    api: Any = package.api
    op_type, version = ttt_op.OP_TYPES[operator.op], str(operator.version)
    activations: dict[Any, DType] = {package.dtypes[name]: name for name in ITEM_BYTES}
    own_types = {None: None, "float32": api.DataType.FLOAT, "int32": api.DataType.INT32}
    inputs_own, carried = [own_types[name] for name in operator.dtypes()], operator.carried()
    types = [*inputs_own, None, *(inputs_own[place] for place in carried)]  # None: that of the first input

    class Plugin(api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, layer: str) -> None:
            for base in (api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op_type, version, NAMESPACE
            self.num_outputs = 1 + len(carried)
            self.layer = layer
            # None: sizes follow from the shapes, and the cubin is in the bundle. In the type of C++: another would be
            # converted to a temporary object, which the binding refuses where TensorRT calls outside of a Python call.
            self.fields = api.PluginFieldCollection_(api.PluginFieldCollection([]))

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.layer)

        def get_output_data_types(self, inputs: list[Any]) -> list[Any]:
            return [inputs[0], *(inputs[place] for place in carried)]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], expressions: Any) -> list[Any]:
            sizes = [
                [dim.get_constant_value() if dim.is_constant() else -1 for dim in (dims[i] for i in range(len(dims)))]
                for dims in inputs
            ]
            operator.check(self.layer, sizes)
            return [api.DimsExprs(inputs[place]) for place in (0, *carried)]

        def supports_format_combination(self, position: int, tensors: list[Any], num_inputs: int) -> bool:
            tensor = tensors[position].desc
            return bool(
                tensor.format == api.TensorFormat.LINEAR
                and tensor.type == (types[position] or tensors[0].desc.type)
                and tensors[0].desc.type in activations
            )

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            operator.check(self.layer, [tuple(tensor.desc.dims) for tensor in inputs])

        def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
            return operator.workspace(activations[inputs[0].desc.type], [tuple(tensor.max) for tensor in inputs])

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            operator.check(self.layer, [tuple(tensor.dims) for tensor in inputs])

        def set_tactic(self, tactic: int) -> None:
            """There is only one tactic. Without this method TensorRT reads a status of −1, which is an error."""

        def get_fields_to_serialize(self) -> Any:
            return self.fields

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self,
            inputs_desc: list[Any],
            outputs_desc: list[Any],
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            shapes = [tuple(tensor.dims) for tensor in inputs_desc]
            call = Call(activations[inputs_desc[0].type], shapes, inputs, outputs[0], workspace, outputs[1:])
            size = operator.scan_size(shapes)
            for launch in operator.launches(call):
                name = cubin_name(operator.op, kernels.gpu, call.dtype, *size, launch.part)
                kernels.get(name).launch(stream, launch.blocks, launch.pointers, launch.integers)

    return Plugin
