"""Deserialises an engine file on the GPU, and prepares it to run."""

from typing import Any

import numpy as np

from ttt_video_engine.engines.tensorrt.engine import EngineFile
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.runtime_cache import RuntimeCache
from ttt_video_engine.runtime.errors import BackendError, export_for_gpu


def deserialise_engine(package: TensorRT, runtime: Any, engine_file: EngineFile) -> Any:
    """TensorRT's engine object. Raises BackendError with TensorRT's reason for a damaged file or another GPU."""
    cure = export_for_gpu(engine_file.entry.gpu)
    package.errors.clear()
    content = np.memmap(engine_file.path, np.uint8, mode="r")  # an engine may exceed the RAM
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(f"{engine_file.path}: {package.name} cannot load it ({package.take_errors()}); {cure}")
    return engine


def check_tensors(package: TensorRT, engine: Any, engine_file: EngineFile) -> None:
    """Raises BackendError unless the engine has exactly the inputs and outputs that its JSON lists."""
    dtypes, cure = package.dtypes, export_for_gpu(engine_file.entry.gpu)
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    specs = (*engine_file.entry.inputs, *engine_file.entry.outputs)
    for spec in specs:
        if spec.name not in names or engine.get_tensor_dtype(spec.name) != dtypes[spec.dtype]:
            raise BackendError(f"{engine_file.path}: has no {spec}, which its JSON lists; {cure}")
    extra = sorted(names - {spec.name for spec in specs})
    if extra:
        raise BackendError(f"{engine_file.path}: has {', '.join(extra)}, which its JSON does not list; {cure}")


def create_context(package: TensorRT, engine: Any, engine_file: EngineFile, cache: RuntimeCache) -> Any:
    """TensorRT's execution context, without scratch memory: the caller allocates what the shapes need.

    `cache` is used where the package compiles kernels. Raises BackendError with TensorRT's reason.
    """
    options = package.api.ExecutionContextAllocationStrategy.USER_MANAGED
    if package.name == "tensorrt_rtx":
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(options)
        # Compiles kernels for the shapes before the first run: a captured kernel cannot be replaced later.
        config.dynamic_shapes_kernel_specialization_strategy = (
            package.api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        cache.attach(config)
        options = config
    context = engine.create_execution_context(options)
    if context is None:
        raise BackendError(f"{engine_file.path}: {package.name} cannot run it ({package.take_errors()})")
    return context
