"""Estimates the peak memory, in bytes, that each component needs to render and to build its TensorRT engines.

Only one component is in memory at a time. Estimates for ONNX Runtime on a CPU are compared with measurements by
`benchmarks/footprint.py`. TensorRT states the activations of an engine when it builds it, without a GPU: the estimate
for the transformer is compared with them by `benchmarks/full_width.py`. Nothing was measured on a GPU.
"""

import numpy as np
from msgspec import Struct

from ttt_video_engine.engines.tensorrt.memory import GRAPH_RESERVE
from ttt_video_engine.planning.flops import segment_tokens, vae_convolutions
from ttt_video_engine.runtime.config import ClipSize, ModelConfig, TTTKind
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, DType

FLOAT32 = 4

# ONNX Runtime 1.32 on a CPU, Python 3.11: `python benchmarks/footprint.py`.
CPU_PROCESS = 90 << 20
"""Python, the pipeline, ONNX Runtime, one session and the code that its first run loads."""
CPU_WEIGHTS = 1.2
"""Factor on the weights: they are transposed and packed for matrix products, and the freed gaps are not returned."""
CPU_VAE_ACTIVATIONS = 2.2
"""Factor on the activations of the decoder. ONNX Runtime's arena grows in doubling steps, and its free blocks do not
fit the next, larger layer."""
CPU_CHUNK_TOKENS, CPU_CHUNK_TENSORS = 512, 10
"""The function body of the TTT operator prepares so many tokens at a time, in so many tensors of the model's width."""
CPU_STATES = 8
"""Copies of the inner weights in a scan: as stored, expanded to the batch, carried in and out, and their updates."""

GPU_CONTEXT = 512 << 20
"""The CUDA context, and the code of TensorRT and of the kernels. Assumed, not measured."""
RESIDENT_THREADS = 132 * 2048
"""Threads that run at the same time on an H100 or H200; an RTX 5090 has 170 * 1536. CUDA reserves the stack of a kernel
for each of them."""
KERNEL_STACKS: dict[TTTKind, dict[DType, int]] = {
    "linear": {"float32": 136, "float16": 0, "bfloat16": 0},
    "mlp": {"float32": 7320, "float16": 3152, "bfloat16": 2480},
}
"""Bytes of stack per thread of the TTT kernels, for heads of 64: the most of all architectures, by the tensors' dtype.
`python benchmarks/cubins.py`, which has the kernels of version 1. Those of version 2 have 8 to 10 % more in bfloat16 on
sm_89 and sm_120, and were not compiled for other architectures and dtypes."""
GPU_HOST_PROCESS = 1 << 30
"""RAM of a process that runs TensorRT: its libraries and the CUDA driver. Assumed, not measured."""
BUILD_PROCESS = 512 << 20
GPU_WEIGHTS = {"text_encoder": 1.0, "transformer": 1.11, "vae_decoder": 1.0}
"""Factor on the weights: an engine with two profiles holds some in the layout of each. TensorRT-RTX 1.7:
an engine of six layers of 5B has 1.11 times their size. `python benchmarks/full_width.py --ttt mlp --num-layers 6`."""
BUILD_WEIGHTS = 2.0
"""Factor on the weights: the engine that TensorRT builds, and up to nine tenths of the weights once more. The file of
the weights is mapped, and its pages are evicted where memory is short. Measured with TensorRT-RTX 1.7:
`python benchmarks/full_width.py --ttt mlp --num-layers 6`."""
GPU_SCENES = (1, 3, 6, 10, 21)
GPU_STREAMS = {
    (1, 1): (10.95, 5.17, 4.72, 4.90, 4.44),
    (1, 2): (11.61, 5.51, 4.40, 4.69, 4.05),
    (2, 1): (10.95, 5.36, 5.38, 5.45, 4.55),
    (2, 2): (11.62, 5.85, 4.89, 5.69, 4.55),
}
"""Live tensors [L, D] of each clip in half precision, by layers (2: or more) and batch, for each of GPU_SCENES: what
TensorRT-RTX 1.7 states for widths of 5B, `python benchmarks/full_width.py --memory --ttt mlp`. They are the residual,
what a part of the layer reads, and the q, k and v of that part. Their number also depends on where TensorRT puts them,
so no formula of parts is near all of them."""
GPU_SHARDED_STREAMS = 12.5
"""Live tensors [tokens of a device, D] in half precision of a graph for several devices, whose layers are not in parts.
TensorRT-RTX 1.7 has 12.5 for one clip, and 11.4 for each of a batch of two:
`python benchmarks/full_width.py --ttt mlp --memory --length 9s --devices 2 --gpu sm_89`."""
GPU_STREAMS_FLOAT32 = 15
"""Those in float32, whose layers are not in parts. Not measured: as with version 1 of the operator in bfloat16."""
GPU_VAE_TENSORS = 5
"""Live activations in a residual block: the skip, scale and shift of the norm, the padded input, and the output."""


class ComponentMemory(Struct, frozen=True):
    """Peak memory of one component.

    `io` are its inputs and outputs; `process` is needed without any model. `reserve` is what CUDA sets aside for
    kernels and for a graph. `measured` says that `activations` are TensorRT's own figure for an engine.
    """

    process: int
    weights: int
    activations: int
    io: int
    reserve: int = 0
    measured: bool = False

    @property
    def total(self) -> int:
        return self.process + self.weights + self.activations + self.io + self.reserve


def cpu_memory(
    model: ModelConfig, length: str, weights: dict[str, int], *, low_memory: bool
) -> dict[str, ComponentMemory]:
    """RAM of each component in ONNX Runtime on a CPU. `weights` are bytes in float32, in which it always computes."""
    size = model.clip_size(length)
    batch = 1 if low_memory else 2
    activations = {
        "text_encoder": _text_encoder_activations(model, size, FLOAT32),
        "transformer": _cpu_transformer_activations(model, size, batch),
        "vae_decoder": int(CPU_VAE_ACTIVATIONS * _cpu_vae_activations(model, size)),
    }
    io = _io(model, size, batch, FLOAT32)
    return {
        name: ComponentMemory(CPU_PROCESS, int(CPU_WEIGHTS * weights[name]), live, io[name])
        for name, live in activations.items()
    }


def gpu_memory(
    model: ModelConfig,
    length: str,
    dtype: DType,
    weights: dict[str, int],
    *,
    low_memory: bool,
    measured: dict[str, int] | None = None,
) -> dict[str, ComponentMemory]:
    """GPU memory of each component in TensorRT, with all weights on the GPU. `weights` are bytes of the weight files.

    `measured` are the activations of components that have an engine, in place of an estimate.
    """
    batch, found = 1 if low_memory else 2, measured or {}
    activations = gpu_activations(model, length, dtype, batch) | found
    io = _io(model, model.clip_size(length), batch, ITEM_BYTES[dtype])
    reserve = dict.fromkeys(activations, 0)
    kind = model.transformer.ttt_kind
    reserve["transformer"] = 0 if kind is None else KERNEL_STACKS[kind][dtype] * RESIDENT_THREADS
    reserve["transformer"] += 0 if low_memory else GRAPH_RESERVE
    return {
        name: ComponentMemory(
            GPU_CONTEXT, int(GPU_WEIGHTS[name] * weights[name]), live, io[name], reserve[name], name in found
        )
        for name, live in activations.items()
    }


def gpu_activations(model: ModelConfig, length: str, dtype: DType, batch: int) -> dict[str, int]:
    """The estimated scratch memory of each component's engine, in bytes."""
    size, item = model.clip_size(length), ITEM_BYTES[dtype]
    return {
        "text_encoder": _text_encoder_activations(model, size, item),
        "transformer": _gpu_transformer_activations(model, size, batch, item),
        "vae_decoder": _gpu_vae_activations(model, size, item),
    }


def sharded_gpu_activations(model: ModelConfig, length: str, dtype: DType, batch: int, devices: int) -> int:
    """The estimated scratch memory of a transformer's engine on each of several devices, in bytes."""
    tokens = model.clip_size(length).num_tokens(model.transformer.patch_size) // devices
    return int(batch * ITEM_BYTES[dtype] * GPU_SHARDED_STREAMS * tokens * model.transformer.model_dim)


def host_memory(model: ModelConfig, length: str) -> dict[str, int]:
    """RAM of each component in TensorRT: the process, inputs and outputs. Streamed weights are not included."""
    size = model.clip_size(length)
    return {name: GPU_HOST_PROCESS + arrays for name, arrays in _arrays(model, size, 2).items()}


def build_memory(weights: int) -> int:
    """RAM that TensorRT needs to build an engine with this many bytes of weights."""
    return BUILD_PROCESS + int(BUILD_WEIGHTS * weights)


def _text_encoder_activations(model: ModelConfig, size: ClipSize, item: int) -> int:
    """One scene: attention scores, their softmax and the position bias; the two halves of the gated MLP and their
    product; and eight tensors [N, d_model], such as the residual, q, k and v."""
    config, tokens = model.text_encoder, size.text_length
    attention = 3 * config.num_heads * tokens**2
    return item * (attention + 3 * tokens * config.d_ff + 8 * tokens * config.d_model)


def _cpu_transformer_activations(model: ModelConfig, size: ClipSize, batch: int) -> int:
    """Live tensors in the softmax of the last layers, and what ONNX Runtime keeps from other layers.

    It uses a buffer again for the next tensor of the same shape and frees it after the last. Shapes [B, …] recur in
    every layer, so their buffers stay, as does the arena's room for the operator's chunks. Live are the scores
    [B·S, h, M, M] before and after softmax, the MLP's hidden layer before and after GELU, a chunk of the TTT operator,
    and tensors of the size of the clip: their number is fitted to `python benchmarks/footprint.py`.
    """
    config = model.transformer
    tokens, segment = size.num_tokens(config.patch_size), segment_tokens(config, size)
    stream = max(tokens, size.num_scenes * segment) * config.model_dim
    scores = size.num_scenes * config.num_heads * segment**2
    hidden = 4 * tokens * config.model_dim
    streams, chunk = 23, 0
    if config.ttt_kind:
        streams, chunk = 25, CPU_CHUNK_TENSORS * min(CPU_CHUNK_TOKENS, tokens) * config.model_dim
    live = 2 * scores + 2 * hidden + streams * stream + chunk + CPU_STATES * _ttt_state(model)
    return FLOAT32 * batch * live


def _gpu_transformer_activations(model: ModelConfig, size: ClipSize, batch: int, item: int) -> int:
    """The most that is live in a layer. TensorRT fuses attention in half precision; in float32, the scores are live
    twice. The state of the TTT layers is in their kernels' registers."""
    config = model.transformer
    stream = size.num_tokens(config.patch_size) * config.model_dim
    if item == FLOAT32:
        scores = 2 * size.num_scenes * config.num_heads * segment_tokens(config, size) ** 2
        return batch * item * (GPU_STREAMS_FLOAT32 * stream + scores)
    measured = GPU_STREAMS[min(config.num_layers, 2), batch]
    streams = float(np.interp(size.num_scenes, GPU_SCENES, measured))
    return int(batch * item * stream * streams)


def _ttt_state(model: ModelConfig) -> int:
    """Number of inner weights that one scan carries."""
    config = model.transformer
    return {"linear": 1, "mlp": 8, "none": 0}[config.ttt] * config.model_dim * config.head_dim


def _cpu_vae_activations(model: ModelConfig, size: ClipSize) -> int:
    """Live tensors in the last residual block of a window.

    ONNX Runtime slices the caches from the padded inputs of the causal convolutions at the very end, so all of these
    are live. Five more: the skip, scale and shift, and the two parts from which the padded input is concatenated.
    """
    window = model.vae.temporal_window
    causal = [layer for layer in vae_convolutions(model.vae, window, size.height, size.width) if layer.causal]
    *before, last = causal
    padded = sum(layer.in_channels * (layer.frames + 2) * layer.height * layer.width for layer in before)
    return FLOAT32 * (padded + 5 * last.in_channels * last.frames * last.height * last.width)


def _gpu_vae_activations(model: ModelConfig, size: ClipSize, item: int) -> int:
    window = model.vae.temporal_window
    layers = vae_convolutions(model.vae, window, size.height, size.width)
    sizes = [layer.in_channels * (layer.frames + 2) * layer.height * layer.width for layer in layers if layer.causal]
    return item * GPU_VAE_TENSORS * max(sizes)


def _io(model: ModelConfig, size: ClipSize, batch: int, item: int) -> dict[str, int]:
    """Inputs and outputs, with the VAE's caches: two frames per causal convolution, as input and as output."""
    vae, arrays = model.vae, _arrays(model, size, batch)
    layers = vae_convolutions(vae, vae.temporal_window, size.height, size.width)
    caches = sum(2 * layer.in_channels * layer.height * layer.width for layer in layers if layer.causal)
    return arrays | {"vae_decoder": arrays["vae_decoder"] + 2 * item * caches}


def _arrays(model: ModelConfig, size: ClipSize, batch: int) -> dict[str, int]:
    """Inputs and outputs of the pipeline, in float32: embeddings, latents and frames."""
    config, vae = model.transformer, model.vae
    latents = config.in_channels * size.num_frames * size.height * size.width
    text = size.num_scenes * size.text_length * config.text_dim
    frames = vae.out_ch * vae.temporal_window * vae.temporal_factor * model.height * model.width
    values = {
        "text_encoder": text // size.num_scenes,
        "transformer": batch * (2 * latents + text),
        "vae_decoder": 2 * frames,  # as floats, and a copy while they are converted to bytes
    }
    return {name: FLOAT32 * count for name, count in values.items()}
