"""The sizes that there are kernels for. Importing it does not need Triton."""

from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.errors import BackendError

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "sm_121": 99}
"""KiB of shared memory that one block may use, by architecture (CUDA C++ Programming Guide, Compute Capabilities)."""

MINI_BATCH_SIZES, HEAD_DIMS = (16, 64), (16, 32, 64, 128)


class NoKernel(BackendError):
    """No kernel of this size exists for this GPU. The function body of the operator runs on any GPU."""


def check_size(op: TTTKind, gpu: str, mini_batch_size: int, head_dim: int) -> None:
    """Raises NoKernel for a size that no kernel has."""
    if gpu not in SHARED_MEMORY:
        raise NoKernel(f"kernels are compiled for {', '.join(SHARED_MEMORY)}, not for {gpu}")
    if mini_batch_size not in MINI_BATCH_SIZES:
        allowed = " or ".join(map(str, MINI_BATCH_SIZES))
        raise NoKernel(f"kernels take mini-batches of {allowed} tokens, not {mini_batch_size}")
    if head_dim not in HEAD_DIMS:
        raise NoKernel(f"kernels take heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}")
    if op == "mlp" and head_dim == max(HEAD_DIMS):
        raise NoKernel(f"the weights of a TTT-MLP head of {head_dim} exceed the registers of a multiprocessor")
