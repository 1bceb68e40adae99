"""Version 3 of the TTT operator: the scan of a clip in parts, so that q, k and v of one part are in memory at a time.

A part has some mini-batches of the scan, which are a few runs of tokens in the model's order: text, and video. It takes
the state that the part before left. Each part is made to depend on the one before (`order.py`), from its projections to
its gated output, so that TensorRT computes one after the other.

Shape suffixes: B batch, L tokens, D model dimension, H heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.export.graphs.order import after
from ttt_video_engine.export.graphs.projections_op import ScanOrder, layers_as_nodes, scan_order
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.ttt_layer import TTTLayer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, PART_VERSION, num_scan_parts

Run = tuple[int, int]
"""First token of a run, and the one behind its last. All are text, or all video."""


@dataclass(frozen=True)
class ScanPart:
    """The mini-batches from `first` to before `end` of a scan, and their tokens, in ascending order."""

    first: int
    end: int
    runs: tuple[Run, ...]


def scan_parts(layout: TokenLayout, mini_batch_size: int, *, backward: bool) -> list[ScanPart]:
    """The parts of a scan in `scan_order`."""
    mini_batches = layout.num_tokens // mini_batch_size
    count = num_scan_parts(layout.num_scenes, mini_batches)
    ends = [mini_batches * number // count for number in range(count + 1)]
    return [
        ScanPart(first, end, _runs(layout, first * mini_batch_size, end * mini_batch_size, backward=backward))
        for first, end in pairwise(ends)
    ]


def _runs(layout: TokenLayout, first: int, end: int, *, backward: bool) -> tuple[Run, ...]:
    """The tokens at the places from `first` to before `end` of the scan."""
    found, place, text_end = [], 0, layout.num_text_tokens
    for start, stop in _pieces(layout):
        length = stop - start
        low, high = max(first - place, 0), min(end - place, length)
        place += length
        if low >= high:
            continue
        run = start + low, start + high
        if backward and start >= text_end:  # video tokens are in reverse order
            run = text_end + layout.num_tokens - run[1], text_end + layout.num_tokens - run[0]
        elif backward:  # the scenes of the text are
            scene = start // layout.text_length
            shift = (layout.num_scenes - 1 - 2 * scene) * layout.text_length
            run = run[0] + shift, run[1] + shift
        found.append(run)
    runs: list[Run] = []
    for start, stop in sorted(found):
        if runs and runs[-1][1] == start != text_end:
            start = runs.pop()[0]
        runs.append((start, stop))
    return tuple(runs)


def _pieces(layout: TokenLayout) -> Iterator[Run]:
    """The clip as its scan reads it: text and video of each scene, as `TokenLayout.interleaved_order`."""
    config, video = layout.config, layout.num_text_tokens
    for scene in range(layout.num_scenes):
        yield scene * layout.text_length, (scene + 1) * layout.text_length
        frames = config.attn_length + (0 if scene else config.prefix_temporal_length)
        yield video, video + frames * layout.tokens_per_frame
        video += frames * layout.tokens_per_frame


def scans_in_parts(module: nn.Module, kind: TTTKind) -> AbstractContextManager[None]:
    """Within the block, each part of a scan in `module` is one node, from its projections to before the norm."""
    return layers_as_nodes(module, kind, _test_time_training)


def _test_time_training(block: SeqModelingBlock, kind: TTTKind, attended: Tensor, layout: TokenLayout) -> Tensor:
    """As `SeqModelingBlock._test_time_training`."""
    out = attended
    for backward in (False, True):
        out = _pass(block, kind, out, layout, backward=backward)
    return out


def _pass(block: SeqModelingBlock, kind: TTTKind, x_BLD: Tensor, layout: TokenLayout, *, backward: bool) -> Tensor:
    """x + gate · TTT(x), in one direction."""
    layer, text_end = block.ssm.ttt, layout.num_text_tokens
    gate_text = block.backward_ssm_gating_text if backward else block.forward_ssm_gating_text
    gate_video = block.backward_ssm_gating_video if backward else block.forward_ssm_gating_video
    order = scan_order(layout, block.config.mini_batch_size, backward=backward)
    parts = scan_parts(layout, block.config.mini_batch_size, backward=backward)
    logits_BLH = _logits(layer, x_BLD, [run for part in parts for run in part.runs])
    state: Sequence[Tensor] = [weight.float().expand(x_BLD.shape[0], *weight.shape) for weight in layer.inner_weights()]
    finished: dict[int, Tensor] = {}
    before = None
    for part in parts:
        tokens = torch.cat([x_BLD[:, start:end] for start, end in part.runs], dim=1)
        q, k, v = _projections(layer, after(tokens, before))
        own = _order_of(order, part)
        own_logits = logits_BLH.index_select(1, order.rate_tokens[part.first : part.end].flatten())
        scanned, *state = _node(layer, kind, (q, k, v, own_logits), own, state)
        normed = layer.post_norm(scanned).split([end - start for start, end in part.runs], dim=1)
        for (start, end), run in zip(part.runs, normed, strict=True):
            # Each run by itself: TensorRT adds gate and residual in the product, and does not put them off.
            gate = gate_text if end <= text_end else gate_video
            before = finished[start] = x_BLD[:, start:end] + gate(layer.wo(run))
    return torch.cat([finished[start] for start in sorted(finished)], dim=1)


def _logits(layer: TTTLayer, x_BLD: Tensor, runs: Sequence[Run]) -> Tensor:
    """Of the learning rates, [B, L, H], run by run: the parts need no copy of all tokens besides their own then."""
    weight, bias = layer.learnable_ttt_lr_weight.squeeze(1), layer.learnable_ttt_lr_bias.squeeze(1)
    return torch.cat([functional.linear(x_BLD[:, start:end], weight, bias) for start, end in sorted(runs)], dim=1)


def _projections(layer: TTTLayer, x_BLD: Tensor) -> list[Tensor]:
    """q, k and v, one after the other: TensorRT would make one product of them, and then copy its parts."""
    outputs: list[Tensor] = []
    for projection in (layer.wq, layer.wk, layer.wv):
        weight = after(projection.weight, outputs[-1] if outputs else None)
        outputs.append(functional.linear(x_BLD, weight, projection.bias))
    return outputs


def _order_of(order: ScanOrder, part: ScanPart) -> ScanOrder:
    """The part's order, of its own tokens. Its learning rates are in the order of its places."""
    cos, sin, tokens = (table[part.first : part.end] for table in (order.cos, order.sin, order.tokens))
    own, end = tokens, 0
    for start, stop in part.runs:
        own = own - (start - end) * (tokens >= start).int()
        end = stop
    return ScanOrder(own, torch.arange(own.numel(), dtype=torch.int32).view(own.shape), cos, sin)


def _node(
    layer: TTTLayer, kind: TTTKind, inputs: Sequence[Tensor], order: ScanOrder, state: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The output of a part, [B, tokens of the part, D], and the state that it leaves."""
    config, q = layer.config, inputs[0]
    scale = torch.tensor(config.ttt_base_lr / config.head_dim / config.mini_batch_size)
    tables = (order.cos, order.sin, order.tokens, order.rate_tokens)
    # TensorRT's parser uses a plugin only if the node has the plugin's namespace as an attribute.
    outputs: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OP_TYPES[kind]}",
        (*inputs, scale, *tables, layer.ttt_norm_weight, layer.ttt_norm_bias, *state),
        {"plugin_namespace": DOMAIN, "plugin_version": str(PART_VERSION)},
        dtypes=[q.dtype, *(tensor.dtype for tensor in state)],
        shapes=[q.shape, *(tensor.shape for tensor in state)],
        version=PART_VERSION,
    )
    return outputs
