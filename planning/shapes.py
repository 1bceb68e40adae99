"""Names and shapes of all weights, computed from the config, without a model.

Tests compare these tables with the modules of `reference/`, by name and order, for every preset.
"""

from math import prod

from ttt_video_engine.runtime.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, WEIGHT_ALIGNMENT, DType
from ttt_video_engine.runtime.quantization import Quantization, is_quantized

Shapes = dict[str, tuple[int, ...]]
"""Name of a weight → its shape, in the order of the module's state dict."""


def weight_shapes(model: ModelConfig) -> dict[str, Shapes]:
    """Component → its weights. A weight with two names, such as T5's embedding, is listed once."""
    return {
        "text_encoder": text_encoder_shapes(model.text_encoder),
        "transformer": transformer_shapes(model.transformer),
        "vae_decoder": vae_decoder_shapes(model.vae),
    }


MOST_SEEDED_TOKENS = 2018
"""The largest vocabulary of a tokenizer trained on `export/sources/prose.txt`."""


def can_be_seeded(model: ModelConfig) -> bool:
    """Whether a model can have random weights: a tokenizer of its size can be trained on the package's prose."""
    return model.text_encoder.vocab_size <= MOST_SEEDED_TOKENS


def num_parameters(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def file_bytes(shapes: Shapes, dtype: DType, quantize: Quantization = "none") -> int:
    """Bytes of the data file that an export writes: each tensor starts at a multiple of WEIGHT_ALIGNMENT.

    A quantised weight is two tensors: an int8 for each value, and a float32 for each output channel.
    """
    end = 0
    for name, shape in shapes.items():
        quantized = quantize == "int8" and is_quantized(name)
        for size in (prod(shape), 4 * shape[0]) if quantized else (prod(shape) * ITEM_BYTES[dtype],):
            end += -end % WEIGHT_ALIGNMENT + size
    return end


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    """The encoder of T5 v1.1. Only its first layer has the table of relative positions, 32 buckets."""
    d_model, inner, d_ff = config.d_model, config.num_heads * config.d_kv, config.d_ff
    shapes: Shapes = {"t5.shared.weight": (config.vocab_size, d_model)}
    for number in range(config.num_layers):
        attention, feed_forward = (f"t5.encoder.block.{number}.layer.{part}." for part in (0, 1))
        for name in "qkv":
            shapes[f"{attention}SelfAttention.{name}.weight"] = inner, d_model
        shapes[f"{attention}SelfAttention.o.weight"] = d_model, inner
        if number == 0:
            shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = 32, config.num_heads
        shapes[f"{attention}layer_norm.weight"] = (d_model,)
        shapes[f"{feed_forward}DenseReluDense.wi_0.weight"] = d_ff, d_model
        shapes[f"{feed_forward}DenseReluDense.wi_1.weight"] = d_ff, d_model
        shapes[f"{feed_forward}DenseReluDense.wo.weight"] = d_model, d_ff
        shapes[f"{feed_forward}layer_norm.weight"] = (d_model,)
    return shapes | {"t5.encoder.final_layer_norm.weight": (d_model,)}


def transformer_shapes(config: TransformerConfig) -> Shapes:
    dim, time_dim = config.model_dim, config.time_embed_dim
    patch = config.patch_size
    shapes = _affine("time_embed.0", time_dim, dim) | _affine("time_embed.2", time_dim, time_dim)
    shapes |= _affine("patch_embedding.vid_proj", dim, config.in_channels, patch, patch)
    shapes |= _affine("patch_embedding.text_proj", dim, config.text_dim)
    for number in range(config.num_layers):
        layer = f"layers.{number}."
        shapes |= _affine(f"{layer}pre_seq_layernorm", dim)
        shapes |= _affine(f"{layer}pre_seq_adaLN_modulation.1", 6 * dim, time_dim)
        shapes |= {f"{layer}seq_modeling_block.{name}": shape for name, shape in _sequence_shapes(config).items()}
        shapes |= _affine(f"{layer}pre_mlp_layernorm", dim)
        shapes |= _affine(f"{layer}pre_mlp_adaLN_modulation.1", 6 * dim, time_dim)
        shapes |= _affine(f"{layer}mlp.layer1", 4 * dim, dim) | _affine(f"{layer}mlp.layer2", dim, 4 * dim)
    shapes |= _affine("transformer_norm", dim) | _affine("final_layer.norm", dim)
    shapes |= _affine("final_layer.linear", patch**2 * config.out_channels, dim)
    return shapes | _affine("final_layer.adaLN_modulation.1", 2 * dim, time_dim)


def _sequence_shapes(config: TransformerConfig) -> Shapes:
    """Attention, and where there is TTT the layer that both directions share, and their gates."""
    dim, heads, head_dim = config.model_dim, config.num_heads, config.head_dim
    shapes: Shapes = {}
    for name in "qkvo":
        shapes |= _affine(name, dim, dim)
    shapes |= _affine("q_norm", head_dim) | _affine("k_norm", head_dim)
    if config.ttt_kind is None:
        return shapes
    hidden = {"linear": head_dim, "mlp": 4 * head_dim}[config.ttt_kind]
    shapes |= {
        "ssm.ttt.ttt_norm_weight": (heads, head_dim),
        "ssm.ttt.ttt_norm_bias": (heads, head_dim),
        "ssm.ttt.learnable_ttt_lr_weight": (heads, 1, dim),
        "ssm.ttt.learnable_ttt_lr_bias": (heads, 1),
        "ssm.ttt.W1": (heads, head_dim, hidden),
        "ssm.ttt.b1": (heads, 1, hidden),
    }
    if config.ttt == "mlp":
        shapes |= {"ssm.ttt.W2": (heads, hidden, head_dim), "ssm.ttt.b2": (heads, 1, head_dim)}
    for name in ("wq", "wk", "wv", "wo"):
        shapes |= _affine(f"ssm.ttt.{name}", dim, dim)
    shapes |= _affine("ssm.ttt.post_norm", dim)
    gates = (f"{direction}_ssm_gating_{part}" for direction in ("forward", "backward") for part in ("text", "video"))
    return shapes | {f"{gate}.gating_alpha": (dim,) for gate in gates}


def vae_decoder_shapes(config: VaeConfig) -> Shapes:
    deepest = len(config.ch_mult) - 1
    z, channels = config.z_channels, config.ch * config.ch_mult[deepest]
    shapes = _affine("conv_in.conv", channels, z, 3, 3, 3)
    for name in ("block_1", "block_2"):
        shapes |= _block_shapes(f"mid.{name}", channels, channels, z)
    levels: list[Shapes] = []
    for level in range(deepest, -1, -1):
        out = config.ch * config.ch_mult[level]
        own: Shapes = {}
        for number in range(config.num_res_blocks + 1):
            own |= _block_shapes(f"up.{level}.block.{number}", channels, out, z)
            channels = out
        if level > 0:
            own |= _affine(f"up.{level}.upsample.conv", out, out, 3, 3)
        levels.append(own)
    for own in reversed(levels):  # the module lists the shallowest level first
        shapes |= own
    return shapes | _norm_shapes("norm_out", channels, z) | _affine("conv_out.conv", config.out_ch, channels, 3, 3, 3)


def _block_shapes(name: str, channels: int, out: int, z: int) -> Shapes:
    shapes = _norm_shapes(f"{name}.norm1", channels, z) | _affine(f"{name}.conv1.conv", out, channels, 3, 3, 3)
    shapes |= _norm_shapes(f"{name}.norm2", out, z) | _affine(f"{name}.conv2.conv", out, out, 3, 3, 3)
    return shapes if channels == out else shapes | _affine(f"{name}.nin_shortcut", out, channels, 1, 1, 1)


def _norm_shapes(name: str, channels: int, z: int) -> Shapes:
    shapes = _affine(f"{name}.norm_layer", channels) | _affine(f"{name}.conv_y.conv", channels, z, 1, 1, 1)
    return shapes | _affine(f"{name}.conv_b.conv", channels, z, 1, 1, 1)


def _affine(name: str, out: int, *rest: int) -> Shapes:
    """A weight of shape [out, *rest] and its bias [out]: a linear layer, a convolution or a norm."""
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}
