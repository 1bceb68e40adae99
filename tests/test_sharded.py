"""One transformer over several processes: the recordings, what they send, and processes that die."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
import pytest
import torch
from msgspec.structs import replace
from safetensors import safe_open

from ttt_video_engine.engines.sharded import ShardedGraphFile, ShardedRunner
from ttt_video_engine.export.graphs.components import sharded_graph, transformer_graph
from ttt_video_engine.export.graphs.graph import read_signature, save
from ttt_video_engine.export.graphs.graph import trace as trace_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity import onnx_graphs
from ttt_video_engine.export.parity.recordings import TOLERANCE, compare_recordings
from ttt_video_engine.planning.devices import bytes_sent
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import ClipSize, TTTChoice
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.runner import Array

GOLDEN = Path(__file__).parent / "golden"
Inputs = dict[str, Array]
Exported = tuple[DiffusionTransformer, ShardedGraphFile]


class Counted(ShardedRunner):
    """Keeps what its processes have sent."""

    sent: list[int]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Counted.sent = self.bytes_sent
        super().__exit__(kind, error, trace)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("dit_*.safetensors")))
def test_processes_match_the_recording_and_send_what_the_formula_says(
    name: str, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    monkeypatch.setattr(onnx_graphs, "ShardedRunner", Counted)
    (comparison,) = compare_recordings(tmp_path, devices=devices)
    assert comparison.engine_error < TOLERANCE / 10
    with safe_open(GOLDEN / name, framework="np") as file:
        (_, frames, _, height, width), (_, scenes, text_length, _) = (
            file.get_slice(f"input.{tensor}").get_shape() for tensor in ("video", "text")
        )
        kind: TTTChoice = "mlp" if "mlp" in name else "linear"
        config = replace(tiny(kind).transformer, model_dim=64, num_heads=4, num_layers=2, ttt=kind)
        assert file.get_slice("param.layers.1.seq_modeling_block.q.weight").get_shape() == [64, 64]
    size = ClipSize(num_scenes=scenes, num_frames=frames, height=height, width=width, text_length=text_length)
    assert Counted.sent == [bytes_sent(config, size, devices, "float32")] * devices


@pytest.fixture(scope="module")
def three_scenes(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported("linear", tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def runner(three_scenes: Exported) -> Iterator[ShardedRunner]:
    with ShardedRunner(three_scenes[1]) as opened:
        yield opened


def test_three_scenes_and_a_batch_are_the_reference(runner: ShardedRunner, three_scenes: Exported) -> None:
    inputs = _inputs(runner, 0)
    found = runner.run(inputs)["velocity"]
    assert _error(found, three_scenes[0], inputs) < 1e-5
    first, second = (runner.run({name: array[[row]] for name, array in inputs.items()})["velocity"] for row in (0, 1))
    assert np.array_equal(found, np.concatenate([first, second])) and not np.array_equal(first, second)


def test_a_model_without_ttt_layers_is_the_reference(tmp_path: Path) -> None:
    transformer, file = _exported("none", tmp_path)
    with ShardedRunner(file) as runner:
        inputs = _inputs(runner, 0)
        assert _error(runner.run(inputs)["velocity"], transformer, inputs) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("busy", [False, True])
def test_a_dead_process_is_an_error_at_once_and_is_replaced(busy: bool, rank: int, runner: ShardedRunner) -> None:
    inputs = _inputs(runner, 1)
    expected = runner.run(inputs)["velocity"]
    process = _processes()[rank]
    # Stopped, it is busy for ever: it dies while the others wait for its tokens.
    process.send_signal(signal.SIGSTOP if busy else signal.SIGKILL)
    killer = threading.Timer(1, process.kill if busy else process.is_running)
    killer.start()
    start = time.monotonic()
    with pytest.raises(BackendError, match=f"process {rank + 1} of 2"):
        runner.run(inputs)
    assert time.monotonic() - start < 10
    killer.join()
    assert np.array_equal(runner.run(inputs)["velocity"], expected)


def test_a_graph_that_does_not_load_is_an_error_and_leaves_no_process(three_scenes: Exported) -> None:
    before = _processes()
    with pytest.raises(BackendError, match=r"absent\.onnx"):
        absent = dataclasses.replace(three_scenes[1], path=Path("absent.onnx"))
        with ShardedRunner(absent) as opened:
            opened.run(_inputs(opened, 0))
    assert _processes() == before


def _exported(ttt: TTTChoice, folder: Path) -> Exported:
    """A transformer of random weights and three scenes, and its graph for two devices."""
    model = tiny(ttt)
    model = replace(model, transformer=replace(model.transformer, num_layers=3))
    torch.manual_seed(0)
    transformer = DiffusionTransformer(model.transformer).eval()
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    graph = sharded_graph(transformer_graph(transformer, model, "9s"), 2)
    path = folder / "model.onnx"
    save(trace_graph(graph), path, write_module(graph.module, folder / "model.onnx_data"), graph.ttt)
    return transformer, ShardedGraphFile(path, *read_signature(path), devices=2, num_threads=1)


def _error(found: Array, transformer: DiffusionTransformer, inputs: Inputs) -> float:
    """Largest difference from the reference, over its largest value."""
    with torch.no_grad():
        expected = transformer(*map(torch.from_numpy, inputs.values())).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _inputs(runner: ShardedRunner, seed: int) -> Inputs:
    """Of a batch of two."""
    random = np.random.default_rng(seed)
    shapes = {spec.name: [int(size) for size in spec.shape[1:]] for spec in runner.inputs}
    latents, text = (random.standard_normal((2, *shapes[name])).astype(np.float32) for name in ("latents", "text"))
    return {"latents": latents, "text": text, "timestep": np.array([979, 499])}


def _processes() -> list[psutil.Process]:
    """Those that were started for runners, oldest first."""
    spawned = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return sorted(spawned, key=lambda child: child.create_time())
