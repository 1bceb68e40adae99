"""How much GPU memory an engine needs, and whether it fits. `planning` decides by the same rules."""

from collections.abc import Sequence
from dataclasses import dataclass

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import read_cubin
from ttt_video_engine.engines.tensorrt.engine import KERNELS, EngineFile
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import BackendError, ConfigError

GRAPH_RESERVE = 256 << 20
"""Bytes of GPU memory that CUDA keeps for a captured graph of a transformer: a few thousand kernels, each with its
parameters, and what their capture allocates. Assumed, not measured."""


def profile_bytes(sizes: Sequence[int], *, low_memory: bool) -> int:
    """Scratch memory to have ready, of the `sizes` of an engine's profiles: with `low_memory` that of the least one."""
    return min(sizes, default=0) if low_memory else max(sizes, default=0)


def kernel_stacks(bundle: Bundle, engine: EngineFile, resident_threads: int) -> int:
    """Bytes that CUDA reserves for the stacks of an engine's TTT kernels: the largest one, for all resident threads.

    Raises BackendError where a kernel is missing or damaged.
    """
    folder = bundle.path(KERNELS)
    spills = [read_cubin(folder, name)[0].spills for name in engine.entry.cubins]
    return max(spills, default=0) * resident_threads


@dataclass(frozen=True)
class MemoryLimit:
    """GPU memory that an engine may use: `limit` in bytes, None for all free memory."""

    limit: int | None = None
    low_memory: bool = False

    def available(self, taken: int = 0, pending: int = 0) -> int:
        """Bytes that an engine may still allocate after it has allocated `taken` bytes. CUDA itself will allocate
        `pending` bytes more."""
        free = cuda.free_memory() - pending
        return free if self.limit is None else min(free, self.limit - taken - pending)


@dataclass(frozen=True)
class MemoryNeeds:
    """GPU memory that an engine needs, in bytes.

    `streamable` is the part of `weights` that may stay in host memory; None for an engine without weight streaming.
    """

    weights: int
    activations: int
    streamable: int | None = None


def weight_budget(graph: str, memory: MemoryNeeds, available: int, *, low_memory: bool = False) -> int | None:
    """Bytes of the streamable weights to keep on the GPU; None where all weights fit.

    Raises BackendError where the engine does not fit in `available` bytes even with weights streamed.
    """
    if memory.weights + memory.activations <= available:
        return None
    streamable = memory.streamable or 0
    fixed = memory.weights - streamable
    budget = available - memory.activations - fixed
    if streamable and budget >= 0:
        return min(budget, streamable)
    cures = [] if memory.streamable is not None else ["export with --weight-streaming"]
    cures += [] if low_memory else ["use --low-memory"]
    streamed = " even with weights streamed" if memory.streamable is not None else ""
    raise BackendError(
        f"{graph}: needs {fixed + memory.activations:,} bytes of GPU memory{streamed} ({fixed:,} for weights, "
        f"{memory.activations:,} for activations), {available:,} are available; "
        f"{', or '.join(cures) or 'use a larger GPU'}"
    )


def parse_memory(text: str) -> int:
    """Bytes of a size such as 20GB, 20GiB or 512MiB. Raises ConfigError for anything else."""
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if number != text and number.isascii() and number.replace(".", "", 1).isdigit():
            size = int(float(number) * factor)
            if size > 0:
                return size
    raise ConfigError(f"--gpu-memory is {text!r}: must be a number above 0 and one of {', '.join(units)}, such as 20GB")
