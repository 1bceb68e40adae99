"""What an exported transformer computes of the timestep: every token of every layer reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.graphs.graph import Graph, Input, read_signature, save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.reference.transformer import DiffusionTransformer, timestep_embedding
from ttt_video_engine.runtime.presets import tiny


class TimestepOnly(nn.Module):
    """timestep [B] → what the adaLN of a layer reads of it [B, time_embed_dim]."""

    def __init__(self, transformer: DiffusionTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.width = transformer.config.model_dim

    def forward(self, timestep: Tensor) -> Tensor:
        transformer = self.transformer
        activate = next(iter(transformer.final_layer.adaLN_modulation))
        activated: Tensor = activate(transformer.time_embed(timestep_embedding(timestep, self.width).to(self.dtype())))
        return activated

    def dtype(self) -> torch.dtype:
        return self.transformer.transformer_norm.weight.dtype


@pytest.mark.parametrize("bias", [0.0, -14.0], ids=["open", "nearly all closed"])
def test_a_timestep_is_rounded_about_as_little_as_in_the_reference(bias: float, tmp_path: Path) -> None:
    """Trained weights take SiLU to -18, where it is 3e-7."""
    transformer = SeededSource(tiny("linear"), seed=0).transformer().load()
    module = TimestepOnly(transformer)
    timesteps = torch.arange(1000)
    with torch.no_grad():
        layers = [part for part in transformer.time_embed if isinstance(part, nn.Linear)]
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) / 4)
        layers[0].bias.fill_(bias)
        graph = Graph("timestep", "model.onnx", module, (Input("timestep", timesteps[:2], {0: "batch"}),), ("out",))
        save(trace(graph), tmp_path / "model.onnx", write_module(module, tmp_path / "model.onnx_data"))
        float32 = module(timesteps).double()
        exact = module.double()(timesteps)
    with OnnxRuntimeRunner(tmp_path / "model.onnx", *read_signature(tmp_path / "model.onnx")) as runner:
        rows = [runner.run({"timestep": timesteps[i : i + 1].numpy()})["out"] for i in range(0, 1000, 37)]
    found, float32, exact = torch.from_numpy(np.concatenate(rows)).double(), float32[::37], exact[::37]

    def error(values: Tensor) -> float:
        return float(((values - exact).norm(dim=-1) / exact.norm(dim=-1)).median())

    assert error(found) < 2 * error(float32)
