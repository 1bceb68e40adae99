"""`--engine torch`: the components of a bundle in PyTorch give what ONNX Runtime gives, in every precision."""

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from messages import names, refusal, refused_with
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from stand_in import storyboard_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.engines.kernels.sizes import NoKernel
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.torch import scan as torch_scan
from ttt_video_engine.engines.torch.components import component_of
from ttt_video_engine.engines.torch.runner import TorchArray, TorchLoader, TorchRunner
from ttt_video_engine.engines.torch.scan import KernelScan, use_scan
from ttt_video_engine.engines.torch.weights import WeightSource, named_by_graph, with_stored_weights
from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import tolerance as gate_tolerance
from ttt_video_engine.reference.initialise import on_meta_device, seeded
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt import ttt_linear
from ttt_video_engine.runtime.bundle import CACHE_IN, CACHE_OUT, open_bundle
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError, BundleError
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.runner import Runner, TensorSpec

Run = Callable[..., tuple[int, str, str]]
Arrays = dict[str, NDArray[Any]]

GRAPHS = ("text_encoder", "transformer-3s", "vae_decoder-first", "vae_decoder-next")
TOLERANCE = 1e-4
"""Of the largest value."""
CPU = torch.device("cpu")
DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def random_inputs(specs: tuple[TensorSpec, ...], seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    sizes = {"batch": 2, "tokens": 24}
    inputs: Arrays = {}
    for spec in specs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        whole = spec.dtype == "int64"
        values = random.integers(0, 100, shape) if whole else random.standard_normal(shape).astype(spec.dtype)
        values.flags.writeable = False  # of a cache, for one
        inputs[spec.name] = values
    return inputs


def error(found: Any, expected: Any) -> float:
    """The largest difference over the largest value."""
    wanted = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_gives_what_onnx_runtime_gives(shared_bundle: Path, graph: str) -> None:
    opened = open_bundle(shared_bundle)
    inputs = random_inputs(opened.graph(graph).inputs)
    with TorchLoader(opened)(graph) as runner, OnnxRuntimeLoader(opened, provider="cpu")(graph) as onnx_runtime:
        found, expected = runner.run(inputs), onnx_runtime.run(inputs)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
            assert error(found[name], value) <= TOLERANCE
        with refused_with(BackendError, graph):
            runner.run({})
    with refused_with(BackendError, graph):
        runner.run(inputs)


def test_caches_pass_from_window_to_window(shared_bundle: Path) -> None:
    """As they are, or by way of NumPy."""
    opened = open_bundle(shared_bundle)
    first, following = (opened.graph(graph).inputs for graph in GRAPHS[2:])
    latents = random_inputs(following)["latents"]

    def windows(load: Callable[[str], Runner], *ways: Callable[[Any], Any]) -> list[Any]:
        """The second window, once for each way that the caches take to it."""
        with load(GRAPHS[2]) as runner:
            outputs = runner.run(random_inputs(first))
        caches = {CACHE_IN + name.removeprefix(CACHE_OUT): outputs[name] for name in outputs if name != "frames"}
        with load(GRAPHS[3]) as runner:
            return [
                runner.run({"latents": latents, **{name: way(cache) for name, cache in caches.items()}})["frames"]
                for way in ways
            ]

    (expected,) = windows(OnnxRuntimeLoader(opened, provider="cpu"), np.asarray)
    for found in windows(TorchLoader(opened), lambda cache: cache, np.asarray):
        assert error(found, expected) <= TOLERANCE


def test_a_bfloat16_array_has_the_bits_of_its_tensor() -> None:
    array = TorchArray(torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16))
    assert (array.shape, array.ndim, array.dtype) == ((1, 2), 2, np.dtype(np.uint16))
    assert np.asarray(array).tolist() == [[0x3F80, 0xC020]]
    assert np.asarray(TorchArray(torch.ones(2)), np.float64).dtype == np.float64


# Weights


MODEL = tiny("mlp")


def written(
    folder: Path, dtype: torch.dtype, quantize: Quantization = "none"
) -> tuple[DiffusionTransformer, WeightSource]:
    """A transformer of TTT-MLP with random weights, in a weight file, and a graph that names them, as in a bundle."""
    module = seeded(lambda: DiffusionTransformer(MODEL.transformer), 0).to(dtype)
    (graph,) = component_graphs(module, MODEL, ["3s"], quantize=quantize)
    file = write_module(graph.module, folder / "model.onnx_data", quantize=quantize)
    tensors = []
    for name, (offset, length) in file.ranges.items():
        tensor = onnx.TensorProto(name=name, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", file.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=tensors))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return module, named_by_graph(folder / "model.onnx", file.path, "transformer.", DTYPES[dtype])


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, "none"), (torch.float16, "none"), (torch.bfloat16, "none"), (torch.float32, "int8")],
)
def test_weights_and_velocity_in_every_precision(tmp_path: Path, dtype: torch.dtype, quantize: Quantization) -> None:
    module, source = written(tmp_path, dtype, quantize)
    component = component_of("transformer-3s", MODEL)
    loaded = with_stored_weights(component.build, source, CPU)
    assert not loaded.training
    for name, weight in module.state_dict().items():
        found = loaded.state_dict()[name]
        assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
        # int8: half of a step, which is 1/64 of the largest of a row.
        assert quantize == "int8" or torch.equal(found, weight), name
        assert (found - weight).abs().max() <= weight.abs().max() / 128 * 1.001, name
    (graph,) = component_graphs(module, MODEL, ["3s"])
    inputs = {spec.name: spec.example for spec in graph.inputs}
    generator = torch.Generator().manual_seed(0)
    inputs |= {name: torch.randn(inputs[name].shape, generator=generator) for name in ("latents", "text")}
    specs = tuple(
        TensorSpec(name, "int64" if name == "timestep" else "float32", tuple(value.shape))
        for name, value in inputs.items()
    )
    output = TensorSpec("velocity", "float32", tuple(inputs["latents"].shape))
    with TorchRunner("transformer-3s", loaded, component, (specs, (output,)), CPU) as runner:
        velocity = runner.run({name: value.numpy() for name, value in inputs.items()})["velocity"]
    with torch.no_grad():
        expected = module.float()(inputs["latents"], inputs["text"], inputs["timestep"])
    assert output.fits(velocity)
    assert error(velocity, expected) <= gate_tolerance(source.dtype, quantize)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    _, source = written(tmp_path, torch.float32)
    build = component_of("transformer-3s", MODEL).build
    with refused_with(BundleError, source.path):  # W1 has another shape
        with_stored_weights(component_of("transformer-3s", tiny("linear")).build, source, CPU)
    with refused_with(BundleError, source.path):  # half as long
        with_stored_weights(build, replace(source, dtype="bfloat16"), CPU)
    with refused_with(BundleError, source.path):
        with_stored_weights(lambda: nn.Linear(2, 2), source, CPU)
    graph = tmp_path / "model.onnx"
    source.path.write_bytes(b"short")
    with refused_with(BundleError, graph):
        named_by_graph(graph, source.path, source.prefix, source.dtype)
    source.path.unlink()
    with refused_with(BundleError, source.path):
        named_by_graph(graph, source.path, source.prefix, source.dtype)


# A GPU, in what can be seen without one


class OneDevice(TorchDispatchMode):
    """Fails on the first operator that reads a tensor on another device than "meta", which stands for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                raise AssertionError(f"{func} reads {list(leaf.shape)} on {leaf.device}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph", ["text_encoder", "transformer-9s", "vae_decoder-first", "vae_decoder-next"])
def test_every_tensor_of_a_component_is_on_its_device(shared_bundle: Path, graph: str) -> None:
    opened = open_bundle(shared_bundle)
    component = component_of(graph, opened.manifest.model)
    module = on_meta_device(component.build)
    entry = opened.graph(graph)
    inputs = {name: torch.from_numpy(value.copy()).to("meta") for name, value in random_inputs(entry.inputs).items()}
    runner = TorchRunner(graph, module, component, (entry.inputs, entry.outputs), torch.device("meta"))
    with runner._running(), OneDevice():  # type: ignore[no-untyped-call]
        outputs = component.run(module, inputs)
    assert {spec.name for spec in entry.outputs} == set(outputs)
    assert {value.device.type for value in outputs.values()} == {"meta"}


class HostKernel:
    """A kernel that reads and writes host memory at the addresses that it is launched with."""

    def __init__(self, cubin: Any, code: bytes) -> None:
        self.launches: list[tuple[int, int, tuple[int, ...]]] = []

    def launch(self, stream: int, blocks: int, pointers: list[int], integers: tuple[int, ...]) -> None:
        self.launches.append((stream, blocks, integers))
        heads, num = integers
        size, dim = 16, 16
        batch = blocks // heads
        clip = (batch, heads, num, size, dim)
        shapes = [clip, clip, clip, clip[:4], (heads, dim), (heads, dim), (heads, dim, dim), (heads, 1, dim), clip]
        *inputs, out = (self._tensor(pointer, shape) for pointer, shape in zip(pointers, shapes, strict=True))
        out.copy_(ttt_linear(*inputs))

    @staticmethod
    def _tensor(pointer: int, shape: tuple[int, ...]) -> Tensor:
        count = int(np.prod(shape))
        return torch.frombuffer((ctypes.c_float * count).from_address(pointer), dtype=torch.float32).view(shape)


@pytest.fixture
def host_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelScan]:
    launch = pytest.importorskip("ttt_video_engine.engines.kernels.launch")
    monkeypatch.setattr(launch, "LoadedKernel", HostKernel)
    monkeypatch.setattr(torch_scan, "current_stream", lambda device: 7)
    yield KernelScan(None, b"")  # type: ignore[arg-type]  # HostKernel reads no description


@pytest.mark.parametrize("length", ["3s", "9s"])
def test_the_scan_of_every_layer_is_launched_as_the_kernel_takes_it(host_kernel: KernelScan, length: str) -> None:
    """Both passes of every layer; of one scene, the tensors are views that are not contiguous."""
    model = tiny("linear")
    module = seeded(lambda: DiffusionTransformer(model.transformer), 0)
    size = model.clip_size(length)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, size.num_frames, 16, size.height, size.width, generator=generator)
    text = torch.randn(2, size.num_scenes, size.text_length, model.transformer.text_dim, generator=generator)
    expected = module(latents, text, torch.tensor([979, 499]))
    use_scan(module, host_kernel)
    found = module(latents, text, torch.tensor([979, 499]))
    assert error(found, expected) <= 1e-6
    config = model.transformer
    launches = host_kernel._kernel.launches  # type: ignore[attr-defined]
    assert len(launches) == 2 * config.num_layers
    num = size.num_tokens(config.patch_size) // config.mini_batch_size
    assert set(launches) == {(7, 2 * config.num_heads, (config.num_heads, num))}


@pytest.fixture
def gpu_without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "device", lambda index: type("Gpu", (), {"gpu": "sm_90"}))


@pytest.mark.usefixtures("gpu_without_driver", "host_kernel")
def test_where_the_kernel_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle's, else one that is compiled once; else the reference's scan, with the reason."""
    compile_module = pytest.importorskip("ttt_video_engine.engines.kernels.compile")
    config, name = tiny("linear").transformer, "ttt_linear-c16-f16-bfloat16-sm_90"
    read: list[Path] = []

    def read_cubin(folder: Path, name: str) -> tuple[Cubin | None, bytes]:
        read.append(folder)
        return None, b""

    def compile_kernel(op: str, *, gpu: str, dtype: str, mini_batch_size: int, head_dim: int, folder: Path) -> None:
        (folder / f"ttt_{op}-c{mini_batch_size}-f{head_dim}-{dtype}-{gpu}.json").touch(exist_ok=False)

    monkeypatch.setattr(torch_scan, "read_cubin", read_cubin)
    monkeypatch.setattr(compile_module, "compile_kernel", compile_kernel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        scan, found = torch_scan.find_scan(config, "bfloat16", tmp_path)
        assert isinstance(scan, KernelScan) and found == name
    assert len(set(read)) == 1 and read[0].is_relative_to(tmp_path / "cache")
    (tmp_path / f"{name}.json").touch()
    assert torch_scan.find_scan(config, "bfloat16", tmp_path)[1] == name and read[-1] == tmp_path

    def no_kernel(*_: object, **sizes: object) -> None:
        raise NoKernel("heads of 1")

    monkeypatch.setattr(compile_module, "compile_kernel", no_kernel)
    scan, found = torch_scan.find_scan(config, "float16", tmp_path)
    assert scan is None
    names(found, "reference", "heads of 1")


# The command line


def options(folder: Path, bundle: Path, output: str) -> list[str]:
    board = storyboard_file(folder / "bear.jsonl", [{"text": "A bear bakes bread."}])
    return [
        str(board),
        "--bundle",
        str(bundle),
        "--output-dir",
        str(folder / output),
        "--num-steps",
        "2",
        "--seed",
        "1",
    ]


def test_a_video_is_that_of_onnx_runtime(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    for engine in ("onnxruntime", "torch"):
        code, _, err = run("sample", *options(tmp_path, shared_bundle, engine), "--engine", engine)
        assert code == 0, err
    expected, found = (load_file(tmp_path / engine / "bear/latents.safetensors") for engine in ("onnxruntime", "torch"))
    assert set(found) == set(expected)
    for name, latents in expected.items():
        assert error(found[name], latents) <= TOLERANCE
    sidecar = json.loads((tmp_path / "torch/bear/video.json").read_bytes())
    assert sidecar["environment"] == {
        "engine": "torch",
        "torch": torch.__version__,
        "provider": "cpu",
        "scan": "reference",
        "layers": "eager (no GPU)",
    }
    # Decoded by torch, from the latents of the other.
    frames = {}
    for engine in ("onnxruntime", "torch"):
        folder = tmp_path / f"frames-{engine}"
        code, _, err = run(
            *("decode", tmp_path / "onnxruntime/bear", "--bundle", shared_bundle, "--frames", "1:3"),
            *("--png-sequence", folder, "--engine", engine),
        )
        assert code == 0, err
        frames[engine] = pixels(folder)
    assert frames["torch"].shape == frames["onnxruntime"].shape
    assert np.abs(frames["torch"].astype(int) - frames["onnxruntime"]).max() <= 1


def pixels(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--provider", "tensorrt"), ("--provider", "--engine onnxruntime")),
        (("--gpu-memory", "2GB"), ("--gpu-memory", "--engine tensorrt")),
        pytest.param(
            ("--provider", "cuda"),
            ("--provider cuda", torch.__version__),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="says what is wrong where no GPU is"),
        ),
    ],
)
def test_options_of_another_engine(
    run: Run, shared_bundle: Path, tmp_path: Path, wrong: tuple[str, ...], named: tuple[str, ...]
) -> None:
    message = refusal(run("sample", *options(tmp_path, shared_bundle, "out"), "--engine", "torch", *wrong))
    names(message, *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package(
    run: Run, shared_bundle: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("ttt_video_engine.engines.torch.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "ttt_video_engine.reference.text_encoder")
    monkeypatch.setitem(sys.modules, missing, None)
    message = refusal(run("sample", *options(tmp_path, shared_bundle, "out"), "--engine", "torch"))
    names(message, missing, "pip install 'ttt-video-engine[torch]'")
    assert not (tmp_path / "out").exists()
