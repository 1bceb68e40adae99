"""TensorRT-RTX under the name that its parser looks for: who imports it first decides, and no process aborts."""

import subprocess
import sys

from packages import tensorrt_rtx

IMPORTED_BEFORE = """
import tensorrt_rtx
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.runtime.errors import BackendError
try:
    load_package("tensorrt_rtx")
except BackendError as error:
    print(error)
"""


def test_a_package_that_other_code_imported_first_is_refused() -> None:
    tensorrt_rtx()
    done = subprocess.run([sys.executable, "-c", IMPORTED_BEFORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensorrt_rtx" in done.stdout and "load_package" in done.stdout
