"""Cubins on a GPU, through the driver's API alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.runtime.errors import BackendError

ALIGNMENT = 16
"""Bytes: what the kernels' widest loads ask of every tensor."""

_WARP = 32
_STATIC_LIMIT = 48 << 10
"""Shared memory in bytes that a kernel has without asking."""


class LoadedKernel:
    """A kernel in the current CUDA context."""

    def __init__(self, cubin: Cubin, code: bytes) -> None:
        self.cubin = cubin
        self._module = _call("cuModuleLoadData", code)
        self._function = _call("cuModuleGetFunction", self._module, cubin.entry.encode())
        if cubin.shared_memory > _STATIC_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call("cuFuncSetAttribute", self._function, attribute, cubin.shared_memory)

    def launch(self, stream: int, blocks: int, pointers: Sequence[int], integers: Sequence[int]) -> None:
        """Queues `blocks` blocks on `stream`, with device addresses and then int32 as the kernel's parameters.

        For a TTT scan: one block per batch and head; the operator's inputs and its output; heads and mini-batches.
        Raises BackendError naming the parameter that is missing or not aligned, or the driver's error.
        """
        scratch = (0, 0)  # Triton's own, which these kernels do not use
        names = self.cubin.parameters
        if len(pointers) + len(integers) + len(scratch) != len(names):
            raise BackendError(f"{self.cubin.file}: {len(pointers)} tensors; must be {', '.join(names)}")
        for name, pointer in zip(names, pointers, strict=False):
            if pointer % ALIGNMENT:
                raise BackendError(f"{self.cubin.file}: {name} is not aligned to {ALIGNMENT} bytes")
        values: list[NDArray[np.generic]] = [
            *(np.array([pointer], np.uint64) for pointer in pointers),
            *(np.array([integer], np.int32) for integer in integers),
            *(np.array([pointer], np.uint64) for pointer in scratch),
        ]
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        grid, block = (blocks, 1, 1), (self.cubin.num_warps * _WARP, 1, 1)
        _call(
            "cuLaunchKernel", self._function, *grid, *block, self.cubin.shared_memory, stream, addresses.ctypes.data, 0
        )

    def close(self) -> None:
        """Unloads the kernel; it must not be running."""
        if self._module is not None:
            _call("cuModuleUnload", self._module)
            self._module = None


def _call(name: str, *arguments: Any) -> Any:
    """A function of the driver: its result, or an BackendError with the name of the error."""
    try:
        error, *results = getattr(driver, name)(*arguments)
    except RuntimeError as missing:  # the bindings look for the driver when it is first called
        raise BackendError(f"no NVIDIA driver was found ({missing}); run on a machine with an NVIDIA GPU") from missing
    if error != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"{name} failed: {error.name}")
    return results[0] if results else None
