"""ONNX Runtime leaves nothing in the user's folders when it runs from here."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SESSION = """
import sys
from pathlib import Path
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.runtime.bundle import open_bundle
import numpy as np
with OnnxRuntimeLoader(open_bundle(Path(sys.argv[1])))("text_encoder") as runner:
    runner.run({"ids": np.zeros((1, 8), np.int64)})
"""


def test_a_session_leaves_the_users_folders_empty(shared_bundle: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    home = tmp_path / "home"
    home.mkdir()
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
        environment[f"XDG_{kind}_HOME"] = str(home / kind)
    subprocess.run([sys.executable, "-c", SESSION, shared_bundle], env=environment, check=True, timeout=120)
    assert list(home.rglob("*")) == []
