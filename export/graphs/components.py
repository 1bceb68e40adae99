"""The components as flat graphs with named input and output tensors.

Latents, embeddings and frames are float32, whatever precision a component computes in, so the runtime needs no other
dtype. The VAE's caches, which only the VAE reads, have the component's own dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ttt_video_engine.export.graphs.graph import Graph, Input
from ttt_video_engine.export.graphs.quantize import quantize_weights
from ttt_video_engine.export.graphs.shard import ShardedTransformerGraph
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import CausalConv3d, ConvCache, VaeDecoder
from ttt_video_engine.runtime.bundle import (
    CACHE_IN,
    CACHE_OUT,
    RANK,
    TEXT_ENCODER,
    VAE_FIRST,
    VAE_NEXT,
    latent_shape,
    sharded_name,
    transformer_graph_name,
)
from ttt_video_engine.runtime.config import ClipSize, ModelConfig
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.ttt_op import PART_VERSION, PROJECTIONS_VERSION, OpVersion


def component_graphs(
    module: nn.Module,
    model: ModelConfig,
    lengths: Sequence[str],
    *,
    inline: bool = False,
    quantize: Quantization = "none",
    op_version: OpVersion | None = None,
    devices: Sequence[int] = (),
) -> list[Graph]:
    """All graphs of a component; the transformer has one for each of `lengths`, and one more for each of `devices`,
    which always has version 2 of the operator.

    The other keyword arguments are as in Graph. Without `op_version`, it is the one that suits the module's dtype.
    """
    if isinstance(module, TextEncoder):
        return [text_encoder_graph(module, vocab_size=model.text_encoder.vocab_size)]
    if isinstance(module, DiffusionTransformer):
        graphs = [transformer_graph(module, model, length) for length in lengths]
        graphs = [replace(graph, inline=inline, quantize=quantize) for graph in graphs]
        sharded = [sharded_graph(graph, number) for graph in graphs for number in devices]
        return [*(replace(graph, op_version=op_version or graph.op_version) for graph in graphs), *sharded]
    if isinstance(module, VaeDecoder):
        factor = model.vae.spatial_factor
        return [*vae_graphs(module, height=model.height // factor, width=model.width // factor)]
    raise TypeError(f"{type(module).__name__} is not a component")


def graph_weights(
    build: Callable[[], nn.Module], weights: LazyStateDict, model: ModelConfig, quantize: Quantization = "none"
) -> LazyStateDict:
    """Weights of a component by the names that its graphs have for them: those of a wrapper around its module."""
    module = on_meta_device(build)
    graph = component_graphs(module, model, list(model.text_lengths)[:1], quantize=quantize)[0]
    named = {name: weights[name.partition(".")[2]] for name in graph.module.state_dict()}
    return named if graph.quantize == "none" else quantize_weights(named)


def text_encoder_graph(encoder: TextEncoder, *, vocab_size: int) -> Graph:
    """ids [batch, tokens] int64 → embeddings [batch, tokens, d_model]."""
    ids = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    return Graph(
        name=TEXT_ENCODER,
        file="text_encoder/model.onnx",
        module=TextEncoderGraph(encoder),
        inputs=(Input("ids", ids, {0: "batch", 1: "tokens"}),),
        outputs=("embeddings",),
    )


def transformer_graph(transformer: DiffusionTransformer, model: ModelConfig, length: str) -> Graph:
    """latents [batch, T, C, H, W], text [batch, S, N, text_dim], timestep [batch] int64 → velocity like latents."""
    size = model.clip_size(length)
    return Graph(
        name=transformer_graph_name(length),
        file=f"transformer/model-{length}.onnx",
        module=TransformerGraph(transformer),
        inputs=transformer_inputs(size, latent_shape(model, size)[1], model.transformer.text_dim),
        outputs=("velocity",),
        ttt=model.transformer.ttt_kind,
        length=length,
        layers="transformer.layers",
        op_version=PROJECTIONS_VERSION if _dtype(transformer) == torch.float32 else PART_VERSION,
    )


def sharded_graph(graph: Graph, devices: int) -> Graph:
    """The graph that each of `devices` runs in place of `graph`, the transformer's."""
    return replace(
        graph,
        name=sharded_name(graph.name, devices),
        file=f"{graph.file.removesuffix('.onnx')}-{devices}devices.onnx",
        module=ShardedTransformerGraph(graph.module.transformer, devices),  # type: ignore[arg-type]  # it is one
        inputs=(*graph.inputs, Input(RANK, torch.zeros(1, dtype=torch.int64), {})),
        devices=devices,
        op_version=PROJECTIONS_VERSION,
    )


def transformer_inputs(size: ClipSize, channels: int, text_dim: int) -> tuple[Input, ...]:
    """Inputs of the transformer; only the batch axis is free."""
    examples = {
        "latents": torch.empty(2, size.num_frames, channels, size.height, size.width),
        "text": torch.empty(2, size.num_scenes, size.text_length, text_dim),
        "timestep": torch.tensor([979, 499]),
    }
    return tuple(Input(name, example, {0: "batch"}) for name, example in examples.items())


def vae_graphs(decoder: VaeDecoder, *, height: int, width: int) -> tuple[Graph, Graph]:
    """Graphs of the first window and of every later one.

    latents [1, T, C, H, W] and, but for the first window, caches → frames [1, 3, T', 8H, 8W] and caches.
    """
    config = decoder.config
    caches = [name for name, module in decoder.named_modules() if isinstance(module, CausalConv3d)]
    outputs = ("frames", *(CACHE_OUT + name for name in caches))
    first, following = (
        torch.empty(1, frames, config.z_channels, height, width)
        for frames in (1 + config.temporal_window, config.temporal_window)
    )
    first_module, next_module = (VaeGraph(decoder, caches, first=is_first) for is_first in (True, False))
    shapeless = {name: weight.to("meta") for name, weight in first_module.state_dict().items()}
    _, *cache = functional_call(first_module, shapeless, (first.to("meta"),))
    inputs = [Input("latents", following, {})]
    inputs += [
        Input(CACHE_IN + name, torch.empty_like(c, device="cpu"), {}) for name, c in zip(caches, cache, strict=True)
    ]
    return (
        Graph(VAE_FIRST, "vae_decoder/first.onnx", first_module, (Input("latents", first, {}),), outputs),
        Graph(VAE_NEXT, "vae_decoder/next.onnx", next_module, tuple(inputs), outputs),
    )


def _dtype(transformer: DiffusionTransformer) -> torch.dtype:
    return transformer.transformer_norm.weight.dtype


class TextEncoderGraph(nn.Module):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids).float()


class TransformerGraph(nn.Module):
    def __init__(self, transformer: DiffusionTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        dtype = _dtype(self.transformer)
        return self.transformer(latents.to(dtype), text.to(dtype), timestep).float()


class VaeGraph(nn.Module):
    """Decodes one window; cache tensors are inputs and outputs in the order of `caches`."""

    def __init__(self, decoder: VaeDecoder, caches: Sequence[str], *, first: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.caches = tuple(caches)
        self.first = first

    def forward(self, latents: Tensor, *cache_in: Tensor) -> tuple[Tensor, ...]:
        cache = ConvCache({} if self.first else dict(zip(self.caches, cache_in, strict=True)))
        dtype = self.decoder.conv_in.conv.weight.dtype
        z = latents.transpose(1, 2).to(dtype) / self.decoder.config.scale_factor
        frames = self.decoder(z, cache)
        return frames.float(), *(cache.frames[name] for name in self.caches)
