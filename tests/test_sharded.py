"""One transformer over several processes: the recordings, what they send, and processes that die."""

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
from ttt_video_engine.export.graphs.graph import read_signature, save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity import onnx_graphs
from ttt_video_engine.export.parity.recordings import TOLERANCE, compare_recordings
from ttt_video_engine.planning.devices import bytes_sent
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import ClipSize, ModelConfig, TTTChoice
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.runner import Array

GOLDEN = Path(__file__).parent / "golden"
Inputs = dict[str, Array]


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
