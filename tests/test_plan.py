"""What `plan` says, held to what is measured: weights, operations, memory; and that its advice can be followed."""

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from messages import FITS, FITS_NOT, SWAP, UNMEASURED, holds, names, refusal, where
from msgspec.structs import replace
from test_runner import add_engine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttt_video_engine.commands.group import load_command
from ttt_video_engine.engines.tensorrt.engine import ShapeRange
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.planning.flops import text_encoder_flops, transformer_flops, vae_window_flops
from ttt_video_engine.planning.memory import gpu_activations
from ttt_video_engine.planning.shapes import file_bytes, num_parameters, weight_shapes
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import ConvCache, VaeDecoder
from ttt_video_engine.runtime.bundle import GraphEntry, Manifest, encode_manifest, open_bundle
from ttt_video_engine.runtime.config import ModelConfig, TTTChoice, TTTKind
from ttt_video_engine.runtime.dtypes import WEIGHT_ALIGNMENT
from ttt_video_engine.runtime.presets import PRESETS, preset

Run = Callable[..., tuple[int, str, str]]
KINDS: tuple[TTTKind, ...] = ("linear", "mlp")
MUST_SHOW = ["plan", "--preset", "5B", "--ttt", "mlp", "--length", "63s", "--precision", "bf16", "--gpu-memory"]
IN_3S = ["plan", "--preset", "5B", "--length", "3s"]


def modules(model: ModelConfig) -> dict[str, nn.Module]:
    """The components of the reference, without memory for their weights."""
    with torch.device("meta"):
        return {
            "text_encoder": TextEncoder(model.text_encoder),
            "transformer": DiffusionTransformer(model.transformer),
            "vae_decoder": VaeDecoder(model.vae),
        }


# Weights


@pytest.mark.parametrize("ttt", [*KINDS, "none"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_tables_of_weights_are_those_of_the_modules(name: str, ttt: TTTChoice) -> None:
    model = preset(name, ttt)
    for component, module in modules(model).items():
        # Without the second name of T5's embedding, whose bytes are stored once.
        found = [(name, tuple(weight.shape)) for name, weight in module.named_parameters()]
        assert list(weight_shapes(model)[component].items()) == found, component


def test_bytes_are_those_of_the_exported_files(shared_bundle: Path) -> None:
    manifest = open_bundle(shared_bundle).manifest
    for component, table in weight_shapes(manifest.model).items():
        name = f"{component}/model.onnx_data"
        expected = file_bytes(table, manifest.dtype)
        assert expected == (shared_bundle / name).stat().st_size == manifest.files[name].size


def test_half_precision_is_half_but_for_the_padding() -> None:
    table = weight_shapes(preset("5B", "mlp"))["transformer"]
    assert 0 <= file_bytes(table, "bfloat16") - 2 * num_parameters(table) < WEIGHT_ALIGNMENT * len(table)
    assert file_bytes(table, "float16") == file_bytes(table, "bfloat16")


# Operations


def counted(module: nn.Module, *inputs: Tensor | ConvCache) -> int:
    """What PyTorch counts; it does not know the fused attention of CPUs, so attention is made of products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize(("ttt", "length"), [("linear", "3s"), ("linear", "9s"), ("mlp", "3s"), ("none", "6s")])
def test_operations_of_the_transformer(ttt: TTTChoice, length: str) -> None:
    model = preset("tiny", ttt)
    size = model.clip_size(length)
    latents = torch.zeros(1, size.num_frames, 16, size.height, size.width)
    text = torch.zeros(1, size.num_scenes, size.text_length, model.transformer.text_dim)
    found = counted(DiffusionTransformer(model.transformer), latents, text, torch.zeros(1))
    assert transformer_flops(model.transformer, size) == found


def test_operations_of_the_text_encoder() -> None:
    config = preset("debug").text_encoder
    found = counted(TextEncoder(config), torch.zeros(1, 136, dtype=torch.long))
    assert text_encoder_flops(config, 136) == found


def test_operations_of_both_windows_of_the_vae() -> None:
    config, cache = preset("tiny").vae, ConvCache()
    decoder = VaeDecoder(config)
    for frames in (config.temporal_window + 1, config.temporal_window):
        found = counted(decoder, torch.zeros(1, config.z_channels, frames, 4, 6), cache)
        assert vae_window_flops(config, frames, 4, 6) == found


# Memory


@pytest.fixture(scope="module")
def footprint() -> ModuleType:
    """`benchmarks/footprint.py`, which is in no package."""
    path = Path(__file__).parents[1] / "benchmarks" / "footprint.py"
    spec = importlib.util.spec_from_file_location("footprint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process alone is known on Linux only")


@on_linux
@pytest.mark.parametrize(
    ("component", "batch"), [("text_encoder", 1), ("transformer", 1), ("transformer", 2), ("vae_decoder", 1)]
)
def test_memory_of_tiny(footprint: ModuleType, shared_bundle: Path, component: str, batch: int) -> None:
    model = open_bundle(shared_bundle).manifest.model
    measured, estimated = footprint.compare(model, shared_bundle, component, "9s", batch)
    assert estimated == pytest.approx(measured, rel=0.15)


@on_linux
def test_memory_of_debug(footprint: ModuleType, tmp_path: Path) -> None:
    model = preset("debug", "mlp")
    one_graph(model, "3s", tmp_path)
    for batch in (1, 2):
        measured, estimated = footprint.compare(model, tmp_path, "transformer", "3s", batch)
        assert estimated == pytest.approx(measured, rel=0.15)


def one_graph(model: ModelConfig, length: str, folder: Path) -> None:
    """A folder with the transformer of a bundle, and a manifest that knows of nothing else. Exporting and gating the
    other components would take longer than all tests here."""
    graph = transformer_graph(SeededSource(model, seed=0).transformer().load(), model, length)
    path = folder / graph.file
    path.parent.mkdir()
    weights = write_module(graph.module, path.with_name("model.onnx_data"))
    onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
    entry = GraphEntry(graph.file, "transformer/model.onnx_data", *onnx_graph.read_signature(path), (), {})
    manifest = Manifest(
        model=model,
        dtype="float32",
        opset=onnx_graph.OPSET,
        lengths=(length,),
        graphs={graph.name: entry},
        tokenizer_key={},
        weight_keys={},
        files={},
    )
    (folder / "bundle.json").write_bytes(encode_manifest(manifest))


# The command


def planned(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    fits = found["available"] is None or found["chosen"] is not None
    assert code == (0 if fits else 1)
    return found


def test_a_verdict_and_commands(run: Run) -> None:
    code, out, err = run(*MUST_SHOW, "80GB")
    assert (code, err) == (0, "")
    (verdict,) = where(out.splitlines(), "74.51 GiB")
    assert holds(verdict, FITS) and holds(out, UNMEASURED)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([*MUST_SHOW, "90GB"], {}),
        ([*MUST_SHOW, "32GB"], {"low_memory": True}),
        ([*MUST_SHOW, "24GB"], {"weight_streaming": True}),
        ([*MUST_SHOW, "16GB"], {"low_memory": True, "weight_streaming": True}),
        ([*IN_3S, "--dtype", "bf16", "--gpu-memory", "14.5GiB"], {"weight_streaming": True}),
        ([*IN_3S, "--gpu-memory", "80GB"], {"dtype": "bfloat16"}),
        (["plan", "--preset", "tiny", "--gpu-memory", "4GB", "--width", "160"], {}),
    ],
)
def test_the_advice_is_the_cheapest_and_can_be_typed(
    run: Run, arguments: list[str], settings: dict[str, object]
) -> None:
    found = planned(run, *arguments)
    assert found["chosen"]["settings"] == {**found["asked"], **settings}
    refused = [candidate for candidate in found["candidates"][: found["candidates"].index(found["chosen"])]]
    assert not any(candidate["fits"] for candidate in refused)
    export, sample = found["commands"]
    assert ("--weight-streaming" in export) == ("--gpu-memory" in sample) == ("weight_streaming" in settings)
    for command in (export, sample):
        program, name, *options = shlex.split(command)
        assert program == "ttt-video"
        load_command(name).make_context(name, options)  # raises for what is no option


@pytest.mark.parametrize(
    ("free", "values", "cure"),
    [(32 << 30, ["32.00 GiB"], False), (22 << 30, ["22.00 GiB"], True), (None, [], False)],
)
def test_whether_engines_can_be_built_here(
    run: Run, monkeypatch: pytest.MonkeyPatch, free: int | None, values: list[str], cure: bool
) -> None:
    monkeypatch.setattr("ttt_video_engine.commands.plan.available_ram", lambda: free)
    _, out, _ = run(*MUST_SHOW, "80GB")
    # The line is wrapped: it goes on up to the next empty one.
    (block,) = [" ".join(part.split()) for part in out.split("\n\n") if "27.44 GiB" in part]
    said = block[block.index("27.44 GiB") :]
    names(said, "transformer", "RAM", *values)
    assert said.count("GiB") == 1 + len(values) and holds(said, SWAP) == cure
    assert max(map(len, out.splitlines())) <= 100


def test_what_fits_nowhere_ends_with_1(run: Run) -> None:
    found = planned(run, *MUST_SHOW, "8GB")
    assert found["chosen"] is None and found["commands"] == []
    names(found["verdict"], FITS_NOT, "7.45 GiB")
    assert {candidate["settings"]["length"] for candidate in found["candidates"]} == {"3s", "9s", "18s", "30s", "63s"}


def test_without_a_gpus_memory_there_is_no_verdict_on_it(run: Run) -> None:
    found = planned(run, "plan", "--preset", "debug", "--precision", "bf16")
    assert (found["engine"], found["available"], found["chosen"]) == ("tensorrt", None, None)
    assert {candidate["fits"] for candidate in found["candidates"]} == {None}
    names(found["verdict"], "--gpu-memory")


def test_streaming_needs_the_memory_of_the_host(run: Run) -> None:
    plain, _, streaming, _ = planned(run, *MUST_SHOW, "80GB")["candidates"]
    weights = planned(run, *MUST_SHOW, "80GB")["components"]["transformer"]["gpu"]["weights"]
    assert streaming["ram"] - plain["ram"] == plain["needed"] - streaming["needed"] == weights


# Bytes that TensorRT-RTX 1.7 states in bfloat16 for sm_120, by layers, length and batch: `python
# benchmarks/full_width.py --memory --ttt mlp`, 2026-11-27.
STATED = {
    (1, "3s", 1): 1_214_656_512,
    (1, "3s", 2): 2_574_203_904,
    (1, "9s", 1): 1_633_804_288,
    (1, "9s", 2): 3_483_262_464,
    (1, "18s", 1): 2_936_728_064,
    (1, "18s", 2): 5_478_249_984,
    (1, "30s", 1): 5_070_740_480,
    (1, "30s", 2): 9_706_048_000,
    (1, "63s", 1): 9_573_695_488,
    (1, "63s", 2): 17_470_385_664,
    (2, "3s", 1): 1_214_656_512,
    (2, "3s", 2): 2_576_613_888,
    (2, "9s", 1): 1_694_269_952,
    (2, "9s", 2): 3_698_629_120,
    (2, "18s", 1): 3_348_880_384,
    (2, "18s", 2): 6_093_780_480,
    (2, "30s", 1): 5_635_633_152,
    (2, "30s", 2): 11_773_998_592,
    (2, "63s", 1): 9_809_616_896,
    (2, "63s", 2): 19_653_367_296,
}


@pytest.mark.parametrize("ttt", KINDS)
@pytest.mark.parametrize(("num_layers", "length", "batch"), STATED)
def test_activations_are_those_that_tensorrt_states(num_layers: int, length: str, batch: int, ttt: TTTKind) -> None:
    model = preset("5B", ttt)
    model = replace(model, transformer=replace(model.transformer, num_layers=num_layers))
    estimate = gpu_activations(model, length, "bfloat16", batch)["transformer"]
    assert estimate == pytest.approx(STATED[num_layers, length, batch], rel=0.05)


def test_what_cuda_keeps_is_part_of_the_plan(run: Run) -> None:
    plain = planned(run, *MUST_SHOW, "80GB")["components"]
    low = planned(run, *MUST_SHOW, "80GB", "--ttt", "linear")["components"]
    stacks = 2480 * 132 * 2048
    assert plain["transformer"]["gpu"]["reserve"] - low["transformer"]["gpu"]["reserve"] == stacks
    assert low["transformer"]["gpu"]["reserve"] > 0, "a CUDA graph"
    for part in plain.values():
        parts = part["gpu"]
        assert [parts["reserve"] > 0] == [part is plain["transformer"]]


def test_engines_of_a_bundle_say_what_they_need(run: Run, bundle: Path) -> None:
    def settings_and_activations(*options: str) -> tuple[list[int], dict[str, tuple[int, bool]]]:
        found = planned(run, "plan", "--bundle", bundle, "--length", "3s", "--engine", "tensorrt", *options)
        parts = {name: part["gpu"] for name, part in found["components"].items()}
        return [candidate["needed"] for candidate in found["candidates"]], {
            name: (gpu["activations"], gpu["measured"]) for name, gpu in parts.items()
        }

    estimated, before = settings_and_activations()
    profiles = tuple({"latents": ShapeRange(*[(batch, 13, 16, 8, 12)] * 3)} for batch in (1, 2))
    add_engine(bundle, "1.0", profiles=profiles, activations=(3 << 30, 7 << 30))
    add_engine(bundle, "1.0", profiles=profiles, activations=(4 << 30, 6 << 30), gpu="sm_120")
    add_engine(bundle, "1.0", graph="vae_decoder-first", activations=(5 << 30,))  # without the other windows
    add_engine(bundle, "1.0", graph="text_encoder", activations=())
    needed, after = settings_and_activations()
    assert after == {**before, "transformer": (7 << 30, True)} and not any(stated for _, stated in before.values())
    assert needed[0] - estimated[0] == (7 << 30) - before["transformer"][0]
    assert (4 << 30) < needed[1] < (5 << 30), "the most of both GPUs, for one branch"
    assert needed[2] == estimated[2], "no engine streams its weights"
    add_engine(bundle, "1.0", graph="vae_decoder-next", activations=(8 << 30,))
    _, after = settings_and_activations()
    assert after["vae_decoder"] == (8 << 30, True)


def test_a_bundle_is_planned_from_its_manifest(run: Run, shared_bundle: Path) -> None:
    found = planned(run, "plan", "--bundle", shared_bundle)
    manifest = open_bundle(shared_bundle).manifest
    settings = {"low_memory": False, "weight_streaming": False, "quantize": "none"}
    assert found["asked"] == {"length": "9s", "dtype": "float32", **settings}
    assert found["commands"] == [f"ttt-video sample STORYBOARD --bundle {shared_bundle}"]
    for component, part in found["components"].items():
        sizes = [entry.size for name, entry in manifest.files.items() if name.startswith(component)]
        assert part["disk"] == sum(sizes)


def test_what_a_checkpoint_holds(run: Run, tmp_path: Path) -> None:
    model = preset("tiny")
    folders = {"text_encoder": "text_encoder", "transformer": "transformer", "vae_decoder": "vae"}
    for component, module in modules(model).items():
        (tmp_path / folders[component]).mkdir()
        halves = {name: torch.zeros(weight.shape).half() for name, weight in module.named_parameters()}
        torch.save(halves, tmp_path / folders[component] / "weights.pt")
    found = planned(run, "plan", "--checkpoint", tmp_path)
    for component, table in weight_shapes(model).items():
        parameters = num_parameters(table)
        assert found["checkpoint"][component] == {"parameters": parameters, "size": 2 * parameters}
    assert f"--checkpoint {tmp_path}" in found["commands"][0]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (["--engine", "onnxruntime", "--gpu-memory", "8GB"], ("--gpu-memory", "--engine tensorrt")),
        (["--engine", "onnxruntime", "--precision", "bf16"], ("--precision bfloat16", "--engine tensorrt")),
        (["--gpu-memory", "much"], ("--gpu-memory", "much")),
        (["--length", "5s"], ("length", "5s")),
        (["--preset", "huge"], ("preset", "huge")),
        (["--width", "100"], ("width", 100)),
        (["--bundle", "nowhere"], ("nowhere", "bundle.json")),
        (["--bundle", "nowhere", "--preset", "tiny"], ("--bundle", "--length", "--engine")),
        (["--checkpoint", "nowhere"], ("nowhere/text_encoder",)),
        (["--num-steps", "0"], ("--num-steps",)),
    ],
)
def test_bad_input_is_one_line(run: Run, options: list[str], values: tuple[object, ...]) -> None:
    names(refusal(run("plan", *options)), *values)
