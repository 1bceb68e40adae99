"""What one video over several devices needs: bytes between them, memory of each, time of a step.

The exchanges are those of `export/graphs/shard.py`; tests compare their bytes with those that processes count.
"""

from collections.abc import Iterator

from msgspec import Struct

from ttt_video_engine.engines.exchange import ROOM
from ttt_video_engine.planning.fit import Fit
from ttt_video_engine.planning.flops import GUIDANCE_BRANCHES
from ttt_video_engine.planning.memory import cpu_memory, gpu_memory, sharded_gpu_activations
from ttt_video_engine.planning.report import gib, tera
from ttt_video_engine.planning.shapes import file_bytes, weight_shapes
from ttt_video_engine.runtime.config import ClipSize, TransformerConfig
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, DType
from ttt_video_engine.runtime.errors import ConfigError

FLOAT32 = 4
TFLOPS = 400
"""What a GPU computes in a second, sustained: an assumption, the same as that of `benchmarks/fleet.py`."""


class DeviceNeeds(Struct, frozen=True, kw_only=True):
    """What each of `devices` needs of a video, with one branch of guidance after the other.

    `memory`, in bytes, is that of the transformer, its `weights` whole. The rest is per denoising step: `bytes_sent` to
    the others, in `exchange_seconds` at the stated speed, FLOPs, and the mini-batches that each scan takes one after
    the other. `step_seconds` and `speedup` are for GPUs of `TFLOPS`; None in ONNX Runtime, or where no speed is stated.
    """

    devices: int
    memory: int
    weights: int
    bytes_sent: int
    flops: int
    serial_mini_batches: int
    exchange_seconds: float | None
    step_seconds: float | None
    speedup: float | None


def device_needs(found: Fit, devices: int, interconnect: float | None) -> DeviceNeeds:
    """What a plan comes to over several devices. `interconnect` is what each sends in a second, in bytes.

    Time is that of the FLOPs and that of the bytes, one after the other. Raises ConfigError for a speed that is not
    above zero, and for a number of devices that heads or tokens do not divide among.
    """
    model, asked, tensorrt = found.model, found.asked, found.engine == "tensorrt"
    size, config = model.clip_size(asked.length), model.transformer
    check_devices(config, size, devices)
    if interconnect is not None and not interconnect > 0:
        raise ConfigError(f"--interconnect is {interconnect / 1e9:g}: must be above 0, in GB/s")
    dtype: DType = asked.dtype if tensorrt else "float32"
    weights = {name: file_bytes(shapes, dtype) for name, shapes in weight_shapes(model).items()}
    if tensorrt:
        measured = {"transformer": sharded_gpu_activations(model, asked.length, dtype, 1, devices)}
        memory = gpu_memory(model, asked.length, dtype, weights, low_memory=True, measured=measured)["transformer"]
        total = memory.total
    else:
        memory = cpu_memory(model, asked.length, weights, low_memory=True)["transformer"]
        total = memory.total - memory.activations + memory.activations // devices + ROOM // devices
    sent = GUIDANCE_BRANCHES * bytes_sent(config, size, devices, dtype)
    tokens = size.num_tokens(config.patch_size)
    scans = 0 if config.ttt_kind is None else GUIDANCE_BRANCHES * 2 * config.num_layers
    exchange = None if interconnect is None else sent / interconnect
    alone = found.flops_per_step / (TFLOPS * 1e12)
    seconds = None if exchange is None or not tensorrt else alone / devices + exchange
    return DeviceNeeds(
        devices=devices,
        memory=total,
        weights=memory.weights,
        bytes_sent=sent,
        flops=found.flops_per_step // devices,
        serial_mini_batches=scans * tokens // config.mini_batch_size,
        exchange_seconds=exchange,
        step_seconds=seconds,
        speedup=None if seconds is None else alone / seconds,
    )


def device_report(needs: DeviceNeeds, engine: str) -> Iterator[str]:
    """Lines of at most 100 columns."""
    kind = "GPU memory" if engine == "tensorrt" else "RAM"
    yield f"over {needs.devices} devices, each:"
    yield f"  memory:    {gib(needs.memory)} of {kind} for the transformer, {gib(needs.weights)} of it weights"
    sent = f"  sends:     {needs.bytes_sent / 1e9:,.3g} GB a step, both branches of guidance"
    yield sent if needs.exchange_seconds is None else f"{sent}: {needs.exchange_seconds:,.3g} s"
    scans = f", {needs.serial_mini_batches:,} mini-batches one after the other" if needs.serial_mini_batches else ""
    yield f"  computes:  {tera(needs.flops)} TFLOP a step{scans}"
    if needs.step_seconds is not None and needs.speedup is not None:
        yield f"  a step:    {needs.step_seconds:,.3g} s, {needs.speedup:.2f} times as fast as one device"
        yield f"This assumes {TFLOPS} TFLOP/s of each, and scans that take no longer than their FLOPs say."
    elif needs.exchange_seconds is None:
        yield "Give --interconnect for the time of the exchanges."


def check_devices(config: TransformerConfig, size: ClipSize, devices: int) -> None:
    """Raises ConfigError unless the heads of the model and the tokens of a clip divide among so many devices."""
    tokens = size.num_tokens(config.patch_size)
    if devices < 1 or config.num_heads % devices or tokens % devices:
        raise ConfigError(
            f"--devices is {devices}: must divide {config.num_heads} heads and {tokens:,} tokens; give another number"
        )


def bytes_sent(config: TransformerConfig, size: ClipSize, devices: int, dtype: DType) -> int:
    """What each device sends to the others in one pass of one clip.

    Per layer and token of its own: q, k and v of attention and its output; in each direction of TTT, q, k, v, the
    logits of the learning rates, and the output. Of these, (N − 1)/N are for others. At last, all get the velocity of
    its tokens, in float32.
    """
    tokens = size.num_tokens(config.patch_size) // devices
    values = 4 * config.model_dim
    if config.ttt_kind is not None:
        values += 2 * (4 * config.model_dim + config.num_heads)
    layers = tokens * config.num_layers * values * ITEM_BYTES[dtype] // devices
    velocity = tokens * config.out_channels * config.patch_size**2 * FLOAT32
    return (devices - 1) * (layers + velocity)
