"""A step of `first_contact.py`: a whole video of the preset `tiny` by every backend, beside that of a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import av
import numpy as np
from contact_rows import add_row
from safetensors.numpy import load_file

from ttt_video_engine.engines.cuda import device

CLI = Path(__file__).resolve().parent.parent / "cli.py"
BACKENDS = (
    ("onnxruntime", ("--provider", "cpu")),
    ("torch", ("--provider", "cpu")),
    ("torch", ("--provider", "cuda")),
    ("onnxruntime", ("--provider", "cuda")),
    ("tensorrt", ()),
)
"""Engine and options; the first is what the others are compared to."""
ALLOWED = 1e-2
"""Largest error of the latents over their largest value: a GPU may multiply float32 in TF32."""
ALLOWED_PIXELS = 2.0
"""Mean difference of the mp4s' frames, of 255."""


def main() -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        board = folder / "bear.json"
        board.write_text(json.dumps([{"text": "A bear bakes bread."}]))
        export = ("export", "--preset", "tiny", "--length", "3s", "--output", str(folder / "bundle"))
        done = call(*export)
        if done.returncode != 0:
            sys.exit(f"export: {done.stderr.strip().splitlines()[-1]}")
        reference: Path | None = None
        for engine, options in BACKENDS:
            name = " ".join((engine, *options[1:]))
            if engine == "tensorrt":
                built = call(*export, "--engine", "tensorrt", "--gpu", device().gpu)
                if built.returncode != 0:
                    add_row(backend=name, note=f"left out: {last_line(built)}")
                    continue
            output = folder / name.replace(" ", "-")
            places = (str(board), "--bundle", str(folder / "bundle"), "--output-dir", str(output))
            start = perf_counter()
            done = call("sample", *places, "--num-steps", "4", "--seed", "1", "--engine", engine, *options)
            row = {"backend": name, "seconds": f"{perf_counter() - start:.1f}"}
            if done.returncode == 2:  # wrong environment: the backend is not installed
                add_row(**row, note=f"left out: {last_line(done)}")
            elif done.returncode != 0:
                add_row(**row, note=last_line(done), passed=False)
            elif reference is None:
                reference = output / "bear"
                add_row(**row, note="the reference of the others")
            else:
                add_row(**row, **compare(output / "bear", reference))


def compare(found: Path, expected: Path) -> dict[str, object]:
    """Errors of the latents and of the mp4's frames."""
    latents, wanted = (next(iter(load_file(one / "latents.safetensors").values())) for one in (found, expected))
    error = float(np.abs(latents - wanted).max() / np.abs(wanted).max())
    pixels = float(np.abs(frames(found / "video.mp4") - frames(expected / "video.mp4")).mean())
    passed = error <= ALLOWED and pixels <= ALLOWED_PIXELS
    return {"latents": f"{error:.1e}", "frames, of 255": f"{pixels:.2f}", "passed": passed}


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(np.int16)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CLI), *arguments], capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]


if __name__ == "__main__":
    main()
