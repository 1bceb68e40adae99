"""The scan of TTT layers as our compiled kernels, on an NVIDIA GPU."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import Cubin, cubin_name, read_cubin
from ttt_video_engine.engines.kernels.sizes import NoKernel
from ttt_video_engine.reference.ttt_layer import Scan, TTTLayer
from ttt_video_engine.runtime.config import TransformerConfig
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.user_cache import cache_folder

REFERENCE = "reference"
"""The name of the scan that runs where there is no kernel."""


class KernelScan:
    """A kernel in place of `reference/ttt.py`'s scan: same inputs, same output. Runs on torch's current stream."""

    def __init__(self, cubin: Cubin, code: bytes) -> None:
        from ttt_video_engine.engines.kernels.launch import LoadedKernel  # needs cuda-core

        self._kernel = LoadedKernel(cubin, code)

    def __call__(self, queries: Tensor, *rest: Tensor) -> Tensor:
        batch, heads, num_mini_batches, _, _ = queries.shape
        inputs = [tensor.contiguous() for tensor in (queries, *rest)]
        out = torch.empty_like(inputs[0])
        pointers = [tensor.data_ptr() for tensor in (*inputs, out)]
        self._kernel.launch(current_stream(queries.device), batch * heads, pointers, (heads, num_mini_batches))
        return out


def current_stream(device: torch.device) -> int:
    """The address of the CUDA stream that torch queues work on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def find_scan(config: TransformerConfig, dtype: DType, folder: Path) -> tuple[Scan | None, str]:
    """The scan of a model's TTT layers on the current GPU, and its name for the sidecar.

    The cubin is read from `folder`, else compiled with Triton into the user's cache. Where there is none, the scan is
    None, and the name says why the reference's scan runs, which is many times slower.
    """
    op = config.ttt_kind
    if op is None:
        return None, "none"
    try:
        gpu = cuda.device(torch.cuda.current_device()).gpu
        name = cubin_name(op, gpu, dtype, config.mini_batch_size, config.head_dim)
        if not (folder / f"{name}.json").is_file():
            folder = _compiled(config, dtype, gpu, name)
        return KernelScan(*read_cubin(folder, name)), name
    except (BackendError, ImportError) as error:
        return None, f"{REFERENCE} ({error})"


def _compiled(config: TransformerConfig, dtype: DType, gpu: str, name: str) -> Path:
    """The folder of a kernel that is compiled unless it was before. Raises NoKernel or ImportError."""
    from ttt_video_engine.engines.kernels.compile import compile_kernel, source_digest  # needs Triton

    op, cache = config.ttt_kind, cache_folder("kernels")
    if op is None or cache is None:
        raise NoKernel("there is no folder for compiled kernels")
    folder = cache / source_digest(op)[:16]
    if not (folder / f"{name}.json").is_file():
        sizes = {"mini_batch_size": config.mini_batch_size, "head_dim": config.head_dim}
        folder.mkdir(parents=True, exist_ok=True)
        compile_kernel(op, gpu=gpu, dtype=dtype, folder=folder, **sizes)
    return folder


def use_scan(module: nn.Module, scan: Scan | None) -> None:
    """Makes every TTT layer of `module` use `scan`; None leaves the reference's."""
    if scan is None:
        return
    for layer in module.modules():
        if isinstance(layer, TTTLayer):
            layer.scan = scan
