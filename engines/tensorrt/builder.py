"""Builds an engine from an ONNX graph.

TensorRT-RTX builds for any RTX architecture on any machine; `tensorrt` builds only for a GPU of its own machine.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from ttt_video_engine.engines.kernels.sizes import NoKernel
from ttt_video_engine.engines.tensorrt.engine import (
    BuildSettings,
    EngineEntry,
    EngineFile,
    Profile,
    engine_name,
    entry_path,
)
from ttt_video_engine.engines.tensorrt.package import TensorRT, load_package, package_for
from ttt_video_engine.runtime.callbacks import Progress
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.files import atomic_write, sha256_of
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.ttt_op import PROJECTIONS_VERSION, OpVersion


@dataclass(frozen=True)
class Scans:
    """The TTT nodes of a graph: `count` nodes of one kind, size and version of the operator."""

    op: TTTKind
    mini_batch_size: int
    head_dim: int
    count: int
    version: OpVersion = PROJECTIONS_VERSION


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    `profiles` have the shapes of the inputs with dynamic axes. The graph must have exactly `inputs` and `outputs`.
    `key` is copied into the engine's JSON, cubins are written into the folder `kernels`. `weights` is in bytes.
    `workspace` is the most scratch memory that the engine may need, in bytes, where `settings` do not say it; without
    either, TensorRT takes 64 GiB on a machine without a GPU.
    """

    graph: str
    onnx: Path
    gpu: str
    dtype: DType
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    settings: BuildSettings
    kernels: Path
    scans: Scans | None = None
    weights: int = 0
    workspace: int | None = None
    key: dict[str, str] = field(default_factory=dict)


def build_engine(request: BuildRequest, folder: Path, progress: Progress) -> EngineFile:
    """Writes an engine and its JSON into `folder`, and the cubins that its plugins launch.

    Where no kernel exists for the GPU, the TTT nodes are built from their function body, and the JSON gives the reason.
    Raises BackendError where TensorRT fails, or where the number of plugin layers differs from that of TTT nodes.
    """
    package = load_package(package_for(request.gpu))
    start = perf_counter()
    package.stated.clear()
    scan, kernels, fallback = _kernels(request)
    with nullcontext() if scan is None else _plugin_block(package, request):
        builder = package.api.Builder(package.logger)
        network, parser = _parsed(package, builder, request.onnx)
        _check_signature(package, network, request)
        plugins = _plugins(package, network, request, scan)
        config = _config(package, builder, request, progress)
        path = folder / engine_name(request.graph, request.dtype, package.name, package.version, request.gpu)
        entry_path(path).unlink(missing_ok=True)
        with atomic_write(path) as partial:
            _serialise(package, builder, network, config, partial, request)
        del parser, network, builder
    entry = EngineEntry(
        graph=request.graph,
        gpu=request.gpu,
        dtype=request.dtype,
        package=package.name,
        package_version=package.version,
        inputs=request.inputs,
        outputs=request.outputs,
        profiles=request.profiles,
        plugins=plugins,
        fallback=fallback,
        settings=request.settings,
        activations=_activations(package, request),
        size=path.stat().st_size,
        weights=max(request.weights, package.stated.weights),
        sha256=sha256_of(path),
        seconds=perf_counter() - start,
        key=request.key,
        kernels=kernels,
    )
    with atomic_write(entry_path(path)) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(entry), indent=2) + b"\n")
    return EngineFile(path, entry)


def _activations(package: TensorRT, request: BuildRequest) -> tuple[int, ...]:
    """Bytes of scratch memory of each profile, as the build's log gave them; empty where it did not."""
    found = tuple(package.stated.activations)
    return found if len(found) == max(1, len(request.profiles)) else ()


def _kernels(request: BuildRequest) -> tuple[str | None, tuple[str, ...], str]:
    """Names of the scan's cubin and of all cubins that it compiles for the TTT nodes, and "".

    Or None, none, and why the function bodies are used. The reason is empty where the graph has no TTT nodes.
    """
    scans = request.scans
    if scans is None:
        return None, (), ""
    if not request.settings.plugins:
        return None, (), "built with --no-plugin"
    from ttt_video_engine.engines.kernels.compile_chunk import KERNELS_OF_VERSION  # needs Triton

    try:
        cubins = KERNELS_OF_VERSION[scans.version](
            scans.op,
            gpu=request.gpu,
            dtype=request.dtype,
            mini_batch_size=scans.mini_batch_size,
            head_dim=scans.head_dim,
            folder=request.kernels,
        )
    except NoKernel as reason:
        return None, (), str(reason)
    (scan,) = (cubin for cubin in cubins if cubin.part in ("scan", "resume"))
    return Path(scan.file).stem, tuple(Path(cubin.file).stem for cubin in cubins), ""


def _plugin_block(package: TensorRT, request: BuildRequest) -> AbstractContextManager[None]:
    from ttt_video_engine.engines.tensorrt.plugin import registered_plugins  # needs the kernels' packages

    return registered_plugins(package, request.kernels, request.gpu)


def _parsed(package: TensorRT, builder: Any, onnx: Path) -> tuple[Any, Any]:
    """The network and its parser, which owns the weights and must live as long as the network."""
    package.errors.clear()
    strongly_typed = 1 << int(package.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = package.api.OnnxParser(network, package.logger)
    if not parser.parse_from_file(str(onnx)):
        cause = parser.get_error(0).desc() if parser.num_errors else package.take_errors()
        raise BackendError(f"{onnx}: {package.name} cannot parse it ({' '.join(cause.split())[:300]})")
    return network, parser


def _check_signature(package: TensorRT, network: Any, request: BuildRequest) -> None:
    dtypes = package.dtypes
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for specs, tensors in ((request.inputs, inputs), (request.outputs, outputs)):
        found = {tensor.name: tensor for tensor in tensors}
        for spec in specs:
            tensor = found.pop(spec.name, None)
            shape = tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtypes[spec.dtype]:
                has = "no such tensor" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                raise BackendError(f"{request.onnx}: the bundle lists {spec}, TensorRT reads {has}")
        if found:
            raise BackendError(f"{request.onnx}: TensorRT reads {', '.join(found)}, which the bundle does not list")


def _plugins(package: TensorRT, network: Any, request: BuildRequest, cubin: str | None) -> dict[str, str]:
    """Name of each plugin layer → name of its cubin. Raises BackendError for an unexpected number of layers.

    The parser silently falls back to the function body of a node, so the layers are counted.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    names = [layer.name for layer in layers if layer.type == package.api.LayerType.PLUGIN_V3]
    expected = 0 if request.scans is None or cubin is None else request.scans.count
    if len(names) != expected or len(set(names)) != expected:
        raise BackendError(f"{request.onnx}: {package.name} made {len(names)} plugin layers of {expected} TTT nodes")
    return {} if cubin is None else dict.fromkeys(names, cubin)


def _config(package: TensorRT, builder: Any, request: BuildRequest, progress: Progress) -> Any:
    api, settings = package.api, request.settings
    config = builder.create_builder_config()
    if package.name == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(api.ComputeCapability, request.gpu.replace("_", "").upper()), 0)
    config.builder_optimization_level = settings.optimization_level
    config.max_aux_streams = 0  # steps that run side by side need the memory of both
    workspace = _workspace(request)
    if workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, workspace)
    if settings.weight_streaming:
        config.set_flag(api.BuilderFlag.WEIGHT_STREAMING)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(profile)
    config.progress_monitor = _monitor(api, progress)
    return config


def _workspace(request: BuildRequest) -> int | None:
    return request.workspace if request.settings.workspace is None else request.settings.workspace


def _build_error(package: TensorRT, request: BuildRequest) -> BackendError:
    """What TensorRT says of a failed build; where it wants more workspace, the limit and the option that raises it."""
    cause, workspace = package.take_errors(), _workspace(request)
    said = f"{request.graph}: {package.name} cannot build it for {request.gpu} ({cause})"
    if "workspace" not in cause or workspace is None:
        return BackendError(said)
    return BackendError(
        f"{request.graph}: {package.name} cannot build it for {request.gpu} within {workspace:,} bytes of workspace; "
        f"export with --workspace above {workspace >> 20}, in MiB ({cause})"
    )


def _serialise(package: TensorRT, builder: Any, network: Any, config: Any, target: Path, request: BuildRequest) -> None:
    """Serialises directly into a file, which needs a third less memory than a buffer in RAM."""
    with _writer(package.api, target) as (writer, failures):
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if failures:
        raise failures[0]
    if not done:
        raise _build_error(package, request)


@contextmanager
def _writer(api: Any, target: Path) -> Iterator[tuple[Any, list[OSError]]]:
    failures: list[OSError] = []
    with target.open("wb") as file:

        class Writer(api.IStreamWriter):  # type: ignore[misc]  # the base has no types
            def __init__(self) -> None:
                api.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # TensorRT would discard it
                    failures.append(error)
                    return 0

        yield Writer(), failures


def _monitor(api: Any, progress: Progress) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]  # the base has no types
        """Reports only the outermost phases; nested phases are too short to read."""

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            if not parent:
                self.totals[name] = num_steps
                progress(name, 0, num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.totals:
                progress(name, step + 1, self.totals[name])
            return True

        def phase_finish(self, name: str) -> None:
            self.totals.pop(name, None)

    return Monitor()
