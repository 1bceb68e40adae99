"""Loads cubins onto a GPU and launches them."""

from collections.abc import Sequence

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Stream, launch

from ttt_video_engine.engines.cuda import cuda_errors
from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.runtime.errors import BackendError

ALIGNMENT = 16
"""Bytes: the tensor alignment that the widest loads of the kernels require."""

_WARP = 32
_STATIC_LIMIT = 48 << 10
"""Bytes of shared memory that a kernel may use without setting an attribute."""


class LoadedKernel:
    """A kernel in the current CUDA context. Raises BackendError where the driver refuses it."""

    def __init__(self, cubin: Cubin, code: bytes) -> None:
        self.cubin = cubin
        with cuda_errors(cubin.file):
            gpu = Device()  # first: raises where there is no driver
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
        """Queues the kernel with `blocks` blocks on a stream, given by its address.

        The parameters are device addresses, then int32. A TTT scan has one block per batch and head; its parameters are
        the operator's inputs and its output, then the numbers of heads and of mini-batches.
        Raises BackendError that names the missing or misaligned parameter, or the driver's error.
        """
        if self._kernel is None:
            raise BackendError(f"{self.cubin.file}: is closed")
        scratch = (0, 0)  # of Triton; not used by these kernels
        names = self.cubin.parameters
        if len(pointers) + len(integers) + len(scratch) != len(names):
            raise BackendError(f"{self.cubin.file}: {len(pointers)} tensors; must be {', '.join(names)}")
        for name, pointer in zip(names, pointers, strict=False):
            if pointer % ALIGNMENT:
                raise BackendError(f"{self.cubin.file}: {name} is not aligned to {ALIGNMENT} bytes")
        arguments = (*map(np.uint64, pointers), *map(np.int32, integers), *map(np.uint64, scratch))
        config = LaunchConfig(grid=blocks, block=self.cubin.num_warps * _WARP, shmem_size=self.cubin.shared_memory)
        with cuda_errors(self.cubin.file):
            launch(Stream.from_handle(stream), config, self._kernel, *arguments)

    def close(self) -> None:
        """Unloads the kernel, which must not be running."""
        self._kernel = None
