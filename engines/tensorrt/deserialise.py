"""From the file of a plan to an engine on the GPU."""

from typing import Any

import numpy as np

from ttt_video_engine.engines.tensorrt.checks import export_again
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.plan import Plan
from ttt_video_engine.runtime.errors import EngineError


def deserialised(package: TensorRT, runtime: Any, plan: Plan) -> Any:
    """The engine of a plan. Raises EngineError with TensorRT's own reason where it is none, or not for this GPU."""
    package.errors.clear()
    content = np.memmap(plan.path, np.uint8, mode="r")  # mapped: a plan may be as large as the memory of the host
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(
            f"{plan.path}: {package.name} cannot load it ({package.take_errors()}); {export_again(plan.entry.gpu)}"
        )
    return engine


def check_tensors(package: TensorRT, engine: Any, plan: Plan) -> None:
    """Raises EngineError unless the engine has the inputs and outputs that the plan's JSON says."""
    api = package.api
    dtypes = {
        "float32": api.DataType.FLOAT,
        "float16": api.DataType.HALF,
        "bfloat16": api.DataType.BF16,
        "int64": api.DataType.INT64,
    }
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    specs = (*plan.entry.inputs, *plan.entry.outputs)
    for spec in specs:
        if spec.name not in names or engine.get_tensor_dtype(spec.name) != dtypes[spec.dtype]:
            raise EngineError(f"{plan.path}: has no {spec}, which its JSON promises; {export_again(plan.entry.gpu)}")
    extra = sorted(names - {spec.name for spec in specs})
    if extra:
        raise EngineError(f"{plan.path}: has {', '.join(extra)}, not in its JSON; {export_again(plan.entry.gpu)}")
