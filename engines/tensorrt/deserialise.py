"""Loads an engine file onto the GPU."""

from typing import Any

import numpy as np

from ttt_video_engine.engines.tensorrt.engine import EngineFile
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.runtime.errors import BackendError, export_for_gpu


def deserialised(package: TensorRT, runtime: Any, built: EngineFile) -> Any:
    """TensorRT's engine. Raises BackendError with TensorRT's reason where the file is damaged or for another GPU."""
    package.errors.clear()
    content = np.memmap(built.path, np.uint8, mode="r")  # an engine may be as large as the RAM
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(
            f"{built.path}: {package.name} cannot load it ({package.take_errors()}); {export_for_gpu(built.entry.gpu)}"
        )
    return engine


def check_tensors(package: TensorRT, engine: Any, built: EngineFile) -> None:
    """Raises BackendError unless the engine has exactly the inputs and outputs that its JSON lists."""
    dtypes = package.dtypes
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    specs = (*built.entry.inputs, *built.entry.outputs)
    for spec in specs:
        if spec.name not in names or engine.get_tensor_dtype(spec.name) != dtypes[spec.dtype]:
            raise BackendError(f"{built.path}: has no {spec}, which its JSON lists; {export_for_gpu(built.entry.gpu)}")
    extra = sorted(names - {spec.name for spec in specs})
    if extra:
        raise BackendError(
            f"{built.path}: has {', '.join(extra)}, which its JSON does not list; {export_for_gpu(built.entry.gpu)}"
        )
