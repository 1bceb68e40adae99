"""Cubins on a GPU."""

from collections.abc import Sequence

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Stream, launch

from ttt_video_engine.engines.cuda import reported
from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.runtime.errors import BackendError

ALIGNMENT = 16
"""Bytes: the alignment that the kernels' widest loads need of every tensor."""

_WARP = 32
_STATIC_LIMIT = 48 << 10
"""Bytes of shared memory that a kernel has without asking."""


class LoadedKernel:
    """A kernel in the current CUDA context. Raises BackendError where the driver refuses it."""

    def __init__(self, cubin: Cubin, code: bytes) -> None:
        self.cubin = cubin
        with reported(cubin.file):
            gpu = Device()  # first, as it raises where there is no driver
            self._kernel: Kernel | None = ObjectCode.from_cubin(code, name=cubin.entry).get_kernel(cubin.entry)
            if cubin.shared_memory > _STATIC_LIMIT:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = driver.cuKernelSetAttribute(
                    attribute, cubin.shared_memory, self._kernel.handle, gpu.device_id
                )
                if status != driver.CUresult.CUDA_SUCCESS:
                    raise BackendError(
                        f"{cubin.file}: {cubin.shared_memory:,} bytes of shared memory were refused ({status.name})"
                    )

    def launch(self, stream: int, blocks: int, pointers: Sequence[int], integers: Sequence[int]) -> None:
        """Queues `blocks` blocks on the stream at that address. The kernel's parameters are device addresses, then
        int32.

        For a TTT scan: one block per batch and head; the operator's inputs and its output; heads and mini-batches.
        Raises BackendError that names the missing or misaligned parameter, or the driver's error.
        """
        if self._kernel is None:
            raise BackendError(f"{self.cubin.file}: is closed")
        scratch = (0, 0)  # for Triton's own use; these kernels use none
        names = self.cubin.parameters
        if len(pointers) + len(integers) + len(scratch) != len(names):
            raise BackendError(f"{self.cubin.file}: {len(pointers)} tensors; must be {', '.join(names)}")
        for name, pointer in zip(names, pointers, strict=False):
            if pointer % ALIGNMENT:
                raise BackendError(f"{self.cubin.file}: {name} is not aligned to {ALIGNMENT} bytes")
        arguments = (*map(np.uint64, pointers), *map(np.int32, integers), *map(np.uint64, scratch))
        config = LaunchConfig(grid=blocks, block=self.cubin.num_warps * _WARP, shmem_size=self.cubin.shared_memory)
        with reported(self.cubin.file):
            launch(Stream.from_handle(stream), config, self._kernel, *arguments)

    def close(self) -> None:
        """Lets cuda-core unload the kernel; it must not be running."""
        self._kernel = None
