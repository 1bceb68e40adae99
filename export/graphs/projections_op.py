"""Version 2 of the TTT operator takes the projections as the matrix products leave them, in the model's token order.

Norm, rotary embedding, reconstruction target, learning rates and the order of the scan are inside. The function body
brings the tokens into that order one chunk of mini-batches at a time, so only the projections and the output are whole
in memory. It computes what `TTTLayer.forward` computes between the projections and the norm of the output.

`runtime/ttt_op.py` has the shapes. They are here: B batch, L tokens, D model dimension, H heads, F head dimension, NC
mini-batches of C tokens; in the body also G mini-batches of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.export.graphs.order import after
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.ttt_layer import TTTLayer
from ttt_video_engine.runtime.config import TransformerConfig, TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, PROJECTIONS_VERSION


@dataclass(frozen=True)
class ScanOrder:
    """What the scan reads at each of its places, in mini-batches: tables [NC, C] of a clip, int32, and angles.

    `tokens` are tokens of the model's order, `rate_tokens` those whose learning rates are used. `cos` and `sin`
    [NC, C, F/2] are the rotary embedding of each place.
    """

    tokens: Tensor
    rate_tokens: Tensor
    cos: Tensor
    sin: Tensor


def scan_order(layout: TokenLayout, mini_batch_size: int, *, backward: bool) -> ScanOrder:
    """The order that `TTTLayer.forward` reads a clip in; with `backward`, a clip that is in `reversed_order` then.

    Positions of rotary embedding count in the order in which the layer gets the clip. So do the mini-batches of
    learning rates: each mini-batch of the scan has all rates of the one that its last token came from.
    """
    places = layout.interleaved_order if layout.num_scenes > 1 else torch.arange(layout.num_tokens)
    places = places.unflatten(0, (-1, mini_batch_size))
    last = places[:, -1:]
    rate_places = last - last % mini_batch_size + torch.arange(mini_batch_size)
    tokens, rate_tokens = places, rate_places
    if backward:
        tokens, rate_tokens = (
            layout.reversed_order.index_select(0, table.flatten()).unflatten(0, (-1, mini_batch_size))
            for table in (places, rate_places)
        )
    cos, sin = (
        table.index_select(0, places.flatten()).unflatten(0, (-1, mini_batch_size)) for table in layout.clip_rotation
    )
    return ScanOrder(tokens.int(), rate_tokens.int(), cos, sin)


@contextmanager
def layers_as_nodes(module: nn.Module, kind: TTTKind, traced: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """Within the block, everything in each TTT layer of `module` between its projections and its norm is one node, or
    what `traced` makes of it: (block, kind, attended, layout) → as `SeqModelingBlock._test_time_training`."""
    blocks = [block for block in module.modules() if isinstance(block, SeqModelingBlock)]
    for block in blocks:
        block._test_time_training = partial(traced or _test_time_training, block, kind)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block._test_time_training  # restores the method of the class


def _test_time_training(block: SeqModelingBlock, kind: TTTKind, attended: Tensor, layout: TokenLayout) -> Tensor:
    """As `SeqModelingBlock._test_time_training`. Only the scan reads the clip in another order."""
    out = attended
    for backward in (False, True):
        order = scan_order(layout, block.config.mini_batch_size, backward=backward)
        text, video = block._split(_node(block.ssm.ttt, kind, out, order), layout)
        gate_text = block.backward_ssm_gating_text if backward else block.forward_ssm_gating_text
        gate_video = block.backward_ssm_gating_video if backward else block.forward_ssm_gating_video
        out = out + torch.cat([gate_text(text), gate_video(video)], dim=1)
    return out


def projections(layer: TTTLayer, x_BLD: Tensor) -> list[Tensor]:
    """q, k, v and the logits of the learning rates.

    In half precision one after the other: TensorRT would make one product of them, and then copy its parts.
    """
    rates = (layer.learnable_ttt_lr_weight.squeeze(1), layer.learnable_ttt_lr_bias.squeeze(1))
    outputs: list[Tensor] = []
    for weight, bias in (*((part.weight, part.bias) for part in (layer.wq, layer.wk, layer.wv)), rates):
        before = outputs[-1] if outputs and x_BLD.dtype != torch.float32 else None
        outputs.append(functional.linear(x_BLD, after(weight, before), bias))
    return outputs


def _node(layer: TTTLayer, kind: TTTKind, x_BLD: Tensor, order: ScanOrder) -> Tensor:
    weights = (*layer.norms(), *layer.inner_weights())
    out_BLD = scan_node(kind, layer.config, projections(layer, x_BLD), order, weights)
    result: Tensor = layer.wo(layer.post_norm(out_BLD))
    return result


def scan_node(
    kind: TTTKind, config: TransformerConfig, projected: Sequence[Tensor], order: ScanOrder, weights: Sequence[Tensor]
) -> Tensor:
    """The node of version 2 with what `projections` gives, and the norm and the inner weights of the same heads."""
    q = projected[0]
    scale = torch.tensor(config.ttt_base_lr / config.head_dim / config.mini_batch_size)
    # TensorRT's parser uses a plugin only if the node has the plugin's namespace as an attribute.
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP_TYPES[kind]}",
        (*projected, scale, order.cos, order.sin, order.tokens, order.rate_tokens, *weights),
        {"plugin_namespace": DOMAIN, "plugin_version": str(PROJECTIONS_VERSION)},
        dtype=q.dtype,
        shape=q.shape,
        version=PROJECTIONS_VERSION,
    )
    return result
