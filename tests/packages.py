"""Packages that some platforms lack."""

import pytest

from ttt_video_engine.engines.tensorrt.package import TensorRT, load_package
from ttt_video_engine.runtime.errors import BackendError


def tensorrt_rtx() -> TensorRT:
    """TensorRT-RTX; skips the test without it. Not by `importorskip`: `load_package` must be the first to import it."""
    try:
        return load_package("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(str(error))
