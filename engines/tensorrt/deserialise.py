"""From the file of an engine to an engine on the GPU."""

from typing import Any

import numpy as np

from ttt_video_engine.engines.tensorrt.engine import EngineFile
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.runtime.errors import BackendError, export_for_gpu


def deserialised(package: TensorRT, runtime: Any, file: EngineFile) -> Any:
    """The engine of an engine. Raises BackendError with TensorRT's own reason where it is none, or not for this GPU."""
    package.errors.clear()
    content = np.memmap(file.path, np.uint8, mode="r")  # mapped: an engine may be as large as the memory of the host
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(
            f"{file.path}: {package.name} cannot load it ({package.take_errors()}); {export_for_gpu(file.entry.gpu)}"
        )
    return engine


def check_tensors(package: TensorRT, engine: Any, file: EngineFile) -> None:
    """Raises BackendError unless the engine has the inputs and outputs that the engine's JSON says."""
    dtypes = package.dtypes
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    specs = (*file.entry.inputs, *file.entry.outputs)
    for spec in specs:
        if spec.name not in names or engine.get_tensor_dtype(spec.name) != dtypes[spec.dtype]:
            raise BackendError(f"{file.path}: has no {spec}, which its JSON promises; {export_for_gpu(file.entry.gpu)}")
    extra = sorted(names - {spec.name for spec in specs})
    if extra:
        raise BackendError(f"{file.path}: has {', '.join(extra)}, not in its JSON; {export_for_gpu(file.entry.gpu)}")
