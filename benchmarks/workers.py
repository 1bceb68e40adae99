"""Videos an hour of two workers over one, at the same number of threads in total."""

import subprocess
import sys
import tempfile
from pathlib import Path

from measure import interleaved, table
from queues import boards_for, short_bundle

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.settings import Settings

VIDEOS, THREADS, REPETITIONS = 4, 2, 3
SETTINGS = Settings(num_steps=4)


def throughput() -> str:
    with short_bundle() as bundle:
        one, two = interleaved([lambda: _render_with(bundle, 1), lambda: _render_with(bundle, 2)], REPETITIONS)
    rows = [
        [str(workers), str(THREADS // workers), f"{seconds:.1f}", f"{VIDEOS * 3600 / seconds:.0f}"]
        for workers, seconds in ((1, one), (2, two))
    ]
    printed = table(["workers", "threads each", f"seconds for {VIDEOS} videos", "videos an hour"], rows)
    return f"{printed}\n\ntiny, 3 s, {SETTINGS.num_steps} steps: 2 workers / 1 worker = {one / two:.2f}"


def _render_with(bundle: Path, workers: int) -> None:
    """Renders the videos with so many processes on one folder. Their start is counted, as it is of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, __file__, str(bundle), folder, str(THREADS // workers)]
        processes = [subprocess.Popen(program) for _ in range(workers)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}")


def work(bundle_path: str, folder: str, threads: str) -> None:
    """What one worker does."""
    bundle = open_bundle(Path(bundle_path))
    pipeline = Pipeline(bundle, OnnxRuntimeLoader(bundle, num_threads=int(threads)))
    pipeline.render(boards_for(VIDEOS), SETTINGS, Path(folder))


if __name__ == "__main__":
    work(*sys.argv[1:])
