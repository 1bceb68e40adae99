"""Engines built for GPUs that are not here: nothing is mocked, TensorRT-RTX compiles every one of them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from messages import (
    BUILT_BEFORE,
    CHANGED,
    DROPPED,
    ENGINE_WRITTEN,
    NEW,
    NOTHING_CHANGED,
    REBUILD,
    UNCHANGED,
    WARNING,
    holds,
    last_refusal,
    names,
    refusal,
    refused_with,
    where,
)
from msgspec.structs import replace

from ttt_video_engine.engines.kernels.cubin import CARRIED_PARTS, read_cubin
from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import (
    FOLDER,
    KERNELS,
    BuildSettings,
    EngineEntry,
    EngineFile,
    ShapeRange,
    entry_path,
    find_engine,
    list_engines,
)
from ttt_video_engine.export import build as exporting
from ttt_video_engine.export import engines as exported_engines
from ttt_video_engine.export.build import GRAPH_BYTES, WEIGHTS_FILE, op_version
from ttt_video_engine.export.engines import EngineRequest, build_engines, profiles, workspace
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import component_graphs, text_encoder_graph, transformer_graph
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, write_module
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.planning.memory import gpu_activations
from ttt_video_engine.runtime.bundle import FileEntry, open_bundle
from ttt_video_engine.runtime.callbacks import Progress
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import preset, tiny
from ttt_video_engine.runtime.ttt_op import PART_VERSION, VERSION, num_scans

Run = Callable[..., tuple[int, str, str]]
WAYS = ("forward", "backward")
GPUS = ("sm_89", "sm_120")


def storyboard(folder: Path) -> Path:
    path = folder / "bear.json"
    path.write_text(json.dumps([{"text": "A bear bakes bread."}]))
    return path


def request(
    folder: Path, graph: Graph, dtype: DType, gpu: str, *, scans: Scans | None = None, plugins: bool = True
) -> BuildRequest:
    """To build a graph that is exported into `folder` when it is not there yet."""
    path = folder / graph.file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shared = path.with_name(WEIGHTS_FILE)
        weights = write_module(graph.module, shared)
        onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
    inputs, outputs = onnx_graph.read_signature(path)
    return BuildRequest(
        graph=graph.name,
        onnx=path,
        gpu=gpu,
        dtype=dtype,
        inputs=inputs,
        outputs=outputs,
        profiles=profiles(tiny("linear"), ["3s" if graph.length == "any" else graph.length], inputs, graph.name),
        settings=BuildSettings(plugins=plugins),
        kernels=folder / KERNELS,
        scans=scans,
    )


def built(request: BuildRequest, folder: Path) -> EngineEntry:
    """Builds an engine, reads what was written, and checks what holds for every engine."""
    phases: list[tuple[str, int, int]] = []
    engine = build_engine(request, folder / FOLDER, lambda *phase: phases.append(phase))
    engine.verify()
    assert engine == find_engine(folder, request.graph, request.gpu)
    entry = engine.entry
    assert (entry.inputs, entry.outputs, entry.dtype) == (request.inputs, request.outputs, request.dtype)
    assert engine.path.stat().st_size == entry.size > 10_000
    assert len(entry.activations) == max(1, len(entry.profiles)) and min(entry.activations) > 10_000
    assert 10_000 < entry.weights < 1.2 * entry.size
    free = {spec.name for spec in request.inputs if any(isinstance(axis, str) for axis in spec.shape)}
    assert {name for profile in entry.profiles for name in profile} == free
    assert phases and all(0 <= done <= total for _, done, total in phases)
    return entry


def tiny_transformer(ttt: TTTKind, dtype: DType, length: str) -> tuple[Graph, Scans]:
    model = tiny(ttt)
    config = model.transformer
    module = SeededSource(model, seed=0).transformer().load().to(TORCH_DTYPES[dtype])
    count = num_scans(config, model.clip_size(length), PART_VERSION)
    scans = Scans(ttt, config.mini_batch_size, config.head_dim, count, PART_VERSION)
    return transformer_graph(module, model, length), scans


@pytest.mark.parametrize(
    ("ttt", "dtype", "gpu", "length", "parts"),
    [
        ("linear", "float16", "sm_89", "3s", 1),
        ("linear", "bfloat16", "sm_120", "3s", 1),
        ("mlp", "float16", "sm_120", "3s", 1),
        ("mlp", "bfloat16", "sm_89", "9s", 3),
    ],
)
def test_a_transformer_with_plugins(
    tmp_path: Path, ttt: TTTKind, dtype: DType, gpu: str, length: str, parts: int
) -> None:
    """Any two of kind, dtype and GPU meet once."""
    graph, scans = tiny_transformer(ttt, dtype, length)
    assert scans.count == 4 * parts
    entry = built(request(tmp_path, graph, dtype, gpu, scans=scans), tmp_path)
    ways = [way + number for way in WAYS for number in ("", "2", "3")[:parts]]
    layers = [f"transformer.layers.{i}.seq_modeling_block.ssm.ttt.{way}" for i in (0, 1) for way in ways]
    assert sorted(entry.plugins) == sorted(layers) and entry.fallback == ""
    (name,) = set(entry.plugins.values())
    cubins = [read_cubin(tmp_path / KERNELS, name)[0] for name in entry.cubins]
    assert {cubin.part for cubin in cubins} == set(CARRIED_PARTS) and name in entry.cubins
    cubin, _ = read_cubin(tmp_path / KERNELS, name)
    assert (cubin.op, cubin.part, cubin.gpu, cubin.dtype) == (ttt, "resume", gpu, dtype)
    assert (cubin.mini_batch_size, cubin.head_dim) == (scans.mini_batch_size, scans.head_dim)
    frames = tiny(ttt).clip_size(length).num_frames
    shapes = [(batch, frames, 16, 8, 12) for batch in (1, 2)]
    assert [profile["latents"] for profile in entry.profiles] == [ShapeRange(shape, shape, shape) for shape in shapes]
    one, both = entry.activations
    assert one < both, "half, but for what a model of this size needs at any batch"


@pytest.mark.parametrize(("ttt", "dtype", "gpu"), [("linear", "bfloat16", "sm_89"), ("mlp", "float16", "sm_120")])
def test_a_transformer_without_plugins(tmp_path: Path, ttt: TTTKind, dtype: DType, gpu: str) -> None:
    graph, scans = tiny_transformer(ttt, dtype, "3s")
    first = dataclasses.replace(graph, op_version=VERSION)
    entry = built(request(tmp_path, first, dtype, gpu, scans=scans, plugins=False), tmp_path)
    assert entry.plugins == {} and holds(entry.fallback, "--no-plugin")


@pytest.mark.parametrize(("dtype", "gpu"), [("float16", "sm_89"), ("bfloat16", "sm_120")])
def test_the_components_around_it(tmp_path: Path, dtype: DType, gpu: str) -> None:
    model, source = tiny("linear"), SeededSource(tiny("linear"), seed=0)
    for component in (source.text_encoder(), source.vae_decoder()):
        graphs = component_graphs(component.load().to(TORCH_DTYPES[dtype]), model, ["3s"])
        for graph in graphs:
            entry = built(request(tmp_path, graph, dtype, gpu), tmp_path)
            assert entry.plugins == {} and entry.fallback == ""


def test_a_size_without_a_kernel_runs_the_body_and_says_so(tmp_path: Path) -> None:
    model = tiny("linear")
    transformer = replace(model.transformer, model_dim=96, num_heads=2, num_layers=1)  # heads of 48
    odd = replace(model, transformer=transformer)
    graph = transformer_graph(SeededSource(odd, seed=0).transformer().load().half(), odd, "3s")
    graph = dataclasses.replace(graph, op_version=VERSION)  # TensorRT-RTX 1.7 cannot build the body of version 2
    entry = built(request(tmp_path, graph, "float16", "sm_89", scans=Scans("linear", 16, 48, count=2)), tmp_path)
    assert entry.plugins == {}
    names(entry.fallback, 48, 16, 32, 64, 128)
    assert not (tmp_path / KERNELS).exists()


def test_an_export_writes_the_version_that_its_engines_can_be_built_from() -> None:
    """Version 1 where the function body takes the nodes' place, which TensorRT-RTX 1.7 cannot build of version 2."""
    model = tiny("linear").transformer
    odd = replace(model, model_dim=96, num_heads=2)  # heads of 48
    with_plugins = EngineRequest(("sm_89",))
    without = EngineRequest(("sm_89",), BuildSettings(plugins=False))
    cases = (with_plugins, without, EngineRequest())
    assert [op_version(model, engines, "bfloat16") for engines in cases] == [3, 1, 3]
    assert [op_version(model, engines, "float32") for engines in cases] == [2, 1, 2]
    assert [op_version(odd, engines, "float16") for engines in (with_plugins, EngineRequest())] == [1, 3]


def test_too_little_workspace_is_said_with_its_size(tmp_path: Path) -> None:
    model = tiny("linear")
    encoder = SeededSource(model, seed=0).text_encoder().load().half()
    graph = text_encoder_graph(encoder, vocab_size=model.text_encoder.vocab_size)
    whole = request(tmp_path, graph, "float16", "sm_89")
    with refused_with(BackendError, "text_encoder", 1 << 12, "--workspace"):
        built(dataclasses.replace(whole, settings=BuildSettings(workspace=1 << 12)), tmp_path)
    with refused_with(BackendError, "text_encoder", 1 << 12, "--workspace"):
        built(dataclasses.replace(whole, workspace=1 << 12), tmp_path)
    built(dataclasses.replace(whole, settings=BuildSettings(workspace=1 << 30), workspace=1 << 12), tmp_path)


@pytest.mark.parametrize("length", ["3s", "63s", "297s"])
def test_the_workspace_is_more_than_the_engine_is_estimated_to_need(length: str) -> None:
    model = preset("5B", "mlp").stating([length])
    needed = gpu_activations(model, length, "bfloat16", batch=2)
    for component, graph in (("transformer", f"transformer-{length}"), ("vae_decoder", "vae_decoder-next")):
        assert workspace(model, [length], "bfloat16", graph) > 1.2 * needed[component]
    assert workspace(model, ["3s", length], "bfloat16", "transformer-3s") < 8 << 30, "of its own length"


def test_more_or_fewer_plugins_than_scans_is_an_error(tmp_path: Path) -> None:
    model = tiny("linear")
    encoder = SeededSource(model, seed=0).text_encoder().load().half()
    graph = text_encoder_graph(encoder, vocab_size=model.text_encoder.vocab_size)
    with refused_with(BackendError, 0, 4, "TTT"):
        built(request(tmp_path, graph, "float16", "sm_89", scans=Scans("linear", 16, 16, count=4)), tmp_path)
    whole = request(tmp_path, graph, "float16", "sm_89")
    whole.onnx.write_bytes(whole.onnx.read_bytes()[:1000])
    with refused_with(BackendError, whole.onnx, "tensorrt_rtx"):
        built(whole, tmp_path)
    assert not list(tmp_path.rglob("*.engine*"))


def test_a_bundle_with_engines(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"

    def export(*options: object) -> list[str]:
        code, _, err = run("export", "--preset", "tiny", "--length", "3s", "--output", bundle, *options)
        assert code == 0, err
        return [line for line in err.splitlines() if " for sm_" in line or holds(line, NOTHING_CHANGED)]

    options = ("--precision", "bf16", "--engine", "tensorrt", "--gpu", "sm_89", "--gpu", "sm_120")
    assert len(where(export(*options), NEW)) == 8
    manifest = open_bundle(bundle).manifest
    built_engines = list_engines(bundle)
    found = {(engine.entry.graph, engine.entry.gpu) for engine in built_engines}
    assert found == {(graph, gpu) for graph in manifest.graphs for gpu in GPUS}
    assert {f"{FOLDER}/{engine.path.name}" for engine in built_engines} < set(manifest.files)

    before = {path.name: path.stat().st_ino for path in (bundle / FOLDER).glob("*.engine")}
    (said,) = export("--precision", "bf16")
    assert holds(said, NOTHING_CHANGED)
    needs: list[dict[str, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "check_space", lambda target, needed: needs.append(needed))
        assert holds(export(*options)[-1], NOTHING_CHANGED)
    assert needs == [{"text_encoder": GRAPH_BYTES, "transformer": GRAPH_BYTES, "vae_decoder": 2 * GRAPH_BYTES}]
    lines = export(*options, "--no-plugin")
    assert len(where(lines, UNCHANGED)) == 6
    assert [line.split()[0] for line in where(where(lines, CHANGED), "settings")] == ["transformer-3s"] * 2
    kept = [name for name, inode in before.items() if (bundle / FOLDER / name).stat().st_ino == inode]
    assert len(kept) == 6 and not any(name.startswith("transformer") for name in kept)

    code, out, err = run("inspect", bundle)
    assert (code, err) == (0, "")
    fallback = find_engine(bundle, "transformer-3s", "sm_89").entry.fallback
    assert "transformer-3s.bfloat16.tensorrt_rtx-" in out and fallback and fallback in out
    assert "latents [1, 13, 16, 8, 12]" in out and "latents [2, 13, 16, 8, 12]" in out and not holds(out, CHANGED)
    other = built_engines[0]
    stale = msgspec.structs.replace(other.entry, key={**other.entry.key, "package version": "1.0"})
    entry_path(other.path).write_bytes(msgspec.json.encode(stale))
    code, out, _ = run("inspect", bundle)
    (reason,) = where(where(out.splitlines(), REBUILD), CHANGED)
    assert code == 0
    names(reason, "package version", 1.0, other.entry.package_version)

    code, out, err = run("sample", storyboard(tmp_path), "--bundle", bundle, "--output-dir", tmp_path / "out")
    assert (code, out) == (2, "")
    names(last_refusal(err), bundle, "bfloat16")

    lines = []
    files = {**manifest.files, "transformer/model-3s.onnx": FileEntry("0" * 64, 1)}
    (tmp_path / "stage").mkdir()
    assert build_engines(
        replace(manifest, files=files), tmp_path / "stage", bundle, EngineRequest(), lines.append, lambda *_: None
    )
    for said, gpu in zip(lines, ("sm_120", "sm_89"), strict=True):
        names(said, "transformer-3s", gpu, DROPPED, f"--gpu {gpu}")
    assert len(list_engines(tmp_path / "stage")) == 6


@pytest.mark.parametrize("damaged", [False, True])
def test_engines_of_a_stopped_export_are_not_built_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    whole = open_bundle(bundle).manifest
    graphs = ("text_encoder", "vae_decoder-first", "vae_decoder-next")
    manifest = replace(whole, graphs={name: whole.graphs[name] for name in graphs})
    folder = bundle / FOLDER

    def build() -> list[str]:
        lines: list[str] = []
        assert build_engines(manifest, bundle, None, EngineRequest(("sm_89",)), lines.append, lambda *_: None)
        return [line for line in lines if not holds(line, ENGINE_WRITTEN)]

    def one_then_stop(request: BuildRequest, folder: Path, progress: Progress) -> EngineFile:
        if list(folder.glob("*.engine")):
            raise KeyboardInterrupt
        return build_engine(request, folder, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exported_engines, "build_engine", one_then_stop)
        build()
    (engine,) = folder.glob("*.engine")
    (folder / ".half.1.partial.engine").write_bytes(b"what a kill leaves")
    if damaged:
        engine.write_bytes(engine.read_bytes()[:-1])
    time = engine.stat().st_mtime_ns
    lines = build()
    for said, name, marker in zip(lines, graphs, (NEW if damaged else BUILT_BEFORE, NEW, NEW), strict=True):
        names(said, name, "sm_89", marker)
    assert (engine.stat().st_mtime_ns == time) == (not damaged)
    assert len(list_engines(bundle)) == 3 and len(list(folder.iterdir())) == 6


def test_too_little_memory_to_build_is_said_before(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    lines: list[str] = []
    monkeypatch.setattr(exported_engines, "build_engine", stop)
    monkeypatch.setattr(exported_engines, "available_ram", lambda: 500 << 20)
    manifest = open_bundle(shared_bundle).manifest
    with pytest.raises(KeyboardInterrupt):
        build_engines(manifest, shared_bundle, None, EngineRequest(("sm_89",)), lines.append, lambda *_: None)
    said, warning = lines
    names(said, "text_encoder", "sm_89", NEW)
    assert warning.startswith(WARNING)
    names(warning, "text_encoder", "513.6 MiB", "500.0 MiB")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--engine", "tensorrt"), ("--engine tensorrt", "--gpu")),
        (("--gpu", "sm_89"), ("--engine tensorrt", "--gpu")),
        (("--engine", "tensorrt", "--gpu", "89"), ("--gpu", "89", "sm_80")),
        (("--engine", "tensorrt", "--gpu", "sm_90"), ("tensorrt", "pip install tensorrt")),
    ],
)
def test_an_architecture_that_cannot_be_built_for(
    run: Run, tmp_path: Path, options: tuple[str, ...], values: tuple[object, ...]
) -> None:
    names(refusal(run("export", "--output", tmp_path / "bundle", *options)), *values)
    assert list(tmp_path.iterdir()) == []
