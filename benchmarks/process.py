"""Measurements that need a fresh process: the time of imports, and the peak memory of decoding."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import median_of_processes, peak_memory, table

IMPORT_LIMIT = 0.5
"""Seconds."""

MEMORY_LIMIT = 1.10
"""Upper bound of the peak memory of decoding 63 s over that of 9 s."""

LENGTHS = ("9s", "63s")

_COMMANDS = {
    "import ttt_video_engine.runtime.pipeline": ["-c", "import ttt_video_engine.runtime.pipeline"],
    "ttt-video --help": ["-c", "import sys; sys.argv[1:] = ['--help']; from ttt_video_engine.cli import main; main()"],
}

_DECODE = (
    "import sys; sys.path.insert(0, {folder!r}); import process; process.decode_and_report({bundle!r}, {length!r})"
)


def imports() -> str:
    rows = []
    for name, arguments in _COMMANDS.items():
        seconds = median_of_processes(arguments, repetitions=5)
        verdict = "met" if seconds <= IMPORT_LIMIT else "missed"
        rows.append([f"`{name}`", f"{seconds:.2f}", verdict])
    return table(["process", "seconds", f"limit {IMPORT_LIMIT:g}"], rows)


def decode_memory() -> str:
    from ttt_video_engine.export.build import export_bundle
    from ttt_video_engine.export.sources.source import SeededSource
    from ttt_video_engine.runtime.presets import preset

    folder = str(Path(__file__).parent)
    peaks, rows = {}, []
    with tempfile.TemporaryDirectory() as parent:
        bundle = str(Path(parent) / "bundle")
        # The VAE graphs are the same for every length, so a bundle with one length is enough.
        export_bundle(SeededSource(preset("tiny"), seed=0), Path(bundle), ["3s"], "float32", lambda line: None)
        for length in LENGTHS:
            program = _DECODE.format(folder=folder, bundle=bundle, length=length)
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            frames, peak = done.stdout.split()
            peaks[length] = float(peak)
            rows.append([f"tiny {length}", frames, f"{peaks[length]:.0f}"])
    ratio = peaks["63s"] / peaks["9s"]
    verdict = "met" if ratio <= MEMORY_LIMIT else "missed"
    printed = table(["decoding", "frames", "peak MiB"], rows)
    return f"{printed}\n\nPeak memory, 63s / 9s: {ratio:.2f} (limit {MEMORY_LIMIT:.2f}: {verdict})"


def decode_and_report(bundle_path: str, length: str) -> None:
    """Decodes random latents into an mp4 and prints the frames written and the peak memory of this process in MiB."""
    from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
    from ttt_video_engine.runtime.bundle import latent_shape, open_bundle
    from ttt_video_engine.runtime.stages import decode
    from ttt_video_engine.runtime.video import VideoFormat, write_video

    bundle = open_bundle(Path(bundle_path))
    model = bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size(length)))
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    target = Path(bundle_path).with_name(f"{length}.mp4")
    windows = decode(bundle, OnnxRuntimeLoader(bundle), latents)
    frames = write_video(target, windows, VideoFormat(), width=model.width, height=model.height)
    print(frames, peak_memory() / 2**20)
