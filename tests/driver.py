"""A CUDA driver in place of NVIDIA's, for processes that tests start: its GPU is the memory of the host."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_driver = [
    pytest.mark.skipif(sys.platform != "linux", reason="the fake driver is a library of Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the fake driver is compiled with cc"),
]


def build_driver(folder: Path) -> Path:
    """Compiles the driver into a folder, which is returned. Skips the test where there is nothing to call it."""
    pytest.importorskip("cuda.core")
    command = ["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(HERE / "fake_driver.c"), "-ldl"]
    subprocess.run(command, check=True)
    return folder


def run_with(driver: Path, folder: Path, code: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder` with the driver, and `settings` in its environment."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(HERE.parent), **settings}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, *code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
