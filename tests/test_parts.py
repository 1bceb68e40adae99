"""Layers in parts compute what the reference computes; those in float32 are traced as the reference has them."""

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from ttt_video_engine.export.graphs.parts import layers_in_parts
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TransformerConfig
from ttt_video_engine.runtime.presets import tiny

CONFIG = replace(tiny("linear").transformer, model_dim=32, num_heads=2, num_layers=2, mini_batch_size=1)


def inputs(config: TransformerConfig, num_scenes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    frames = config.attn_length * num_scenes + config.prefix_temporal_length
    generator = torch.Generator().manual_seed(num_scenes)
    latents = torch.randn(2, frames, config.in_channels, 4, 6, generator=generator)
    text = torch.randn(2, num_scenes, 5, config.text_dim, generator=generator)
    return latents.to(dtype), text.to(dtype), torch.tensor([979, 499])


@pytest.mark.parametrize("ttt", ["none", "linear"])
@pytest.mark.parametrize("num_scenes", [1, 2, 3, 5, 7])
def test_layers_in_parts_are_the_layers(ttt: str, num_scenes: int) -> None:
    """In float64, which shows any difference; the last group of 5 and 7 scenes is smaller."""
    config = replace(CONFIG, ttt=ttt)
    torch.manual_seed(0)
    transformer = DiffusionTransformer(config).double().eval()
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    values = inputs(config, num_scenes, torch.float64)
    with torch.no_grad():
        expected = transformer(*values)
        with layers_in_parts(transformer):
            assert "forward" in vars(transformer.layers[0])
            found = transformer(*values)
        assert "forward" not in vars(transformer.layers[0])
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_float32_is_left_as_it_is() -> None:
    transformer = DiffusionTransformer(replace(CONFIG, ttt="none"))
    with layers_in_parts(transformer):
        assert "forward" not in vars(transformer.layers[0])
