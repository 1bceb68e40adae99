"""Many videos in one command: the memory they take, and the time that loading once saves."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import disk_speed, interleaved, peak_memory, table

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.planning.shapes import file_bytes, weight_shapes
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, VAE_FIRST, VAE_NEXT, open_bundle, transformer_graph_name
from ttt_video_engine.runtime.events import VideoDone
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import Scene, Storyboard

MEMORY_LIMIT = 1.05
"""Upper bound of the peak memory of rendering 50 videos over that of one."""

VIDEOS = (1, 50)
TIMED_VIDEOS = 4
LENGTH = "3s"
SETTINGS = Settings(num_steps=2)
PROBE_BYTES = 1 << 30
"""Size of the file that the disk's speed is measured with."""


def memory() -> str:
    peaks, rows = [], []
    with short_bundle() as bundle:
        for number in VIDEOS:
            program = [__file__, str(bundle), str(number)]
            done = subprocess.run([sys.executable, *program], check=True, capture_output=True, text=True)
            peaks.append(int(done.stdout))
            rows.append([f"tiny {LENGTH}", str(number), f"{peaks[-1] / 2**20:.0f}"])
    ratio = peaks[-1] / peaks[0]
    verdict = "met" if ratio <= MEMORY_LIMIT else "missed"
    printed = table(["rendering", "videos", "peak MiB"], rows)
    return f"{printed}\n\nPeak memory, {VIDEOS[-1]} videos / 1: {ratio:.3f} (limit {MEMORY_LIMIT:.2f}: {verdict})"


def loading() -> str:
    with short_bundle() as bundle:
        together, alone = _timed(bundle, TIMED_VIDEOS)
        load = OnnxRuntimeLoader(open_bundle(bundle))
        graphs = [TEXT_ENCODER, transformer_graph_name(LENGTH), VAE_FIRST, VAE_NEXT]
        seconds = interleaved([_loading(load, graph) for graph in graphs], repetitions=5)
        _, read = disk_speed(bundle.parent / "probe", PROBE_BYTES)
    sizes = {name: file_bytes(shapes, "bfloat16") for name, shapes in weight_shapes(preset("5B")).items()}
    of_graph = [sizes[graph.partition("-")[0]] for graph in graphs]
    rows = [
        [graph, f"{taken * 1e3:.0f}", "a video" if graph in (VAE_FIRST, VAE_NEXT) else "a queue", f"{size / 1e9:.2f}",
         f"{size / read:.1f}"]
        for graph, taken, size in zip(graphs, seconds, of_graph, strict=True)
    ]  # fmt: skip
    printed = table(["loading", "tiny ms", "loaded once", "5B GB", "5B estimate s"], rows)
    kept = sum(sizes[name] for name in ("text_encoder", "transformer"))
    return (
        f"{printed}\n\ntiny, {TIMED_VIDEOS} videos, {SETTINGS.num_steps} steps: {together:.2f} s a video in one queue, "
        f"{alone:.2f} s in a queue each: loading once saves {alone - together:.2f} s a video, in one process.\n"
        f"5B, bfloat16: it saves reading {kept / 1e9:.1f} GB a video: {kept / read:.0f} s at the "
        f"{read / 1e6:.0f} MB/s that this disk was measured to read. That is the estimate: the sizes of the weights, "
        "divided by that speed."
    )


def render_and_report(bundle_path: str, number: int) -> None:
    """Renders so many videos and prints the peak memory of this process in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        _render(Path(bundle_path), boards_for(number), Path(folder))
    print(peak_memory())


def _timed(bundle: Path, number: int) -> tuple[float, float]:
    """Median seconds of a video, of so many in one call and of one a call."""
    boards = boards_for(number)

    def in_one_call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _render(bundle, boards, Path(folder))

    def in_a_call_each() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for board in boards:
                _render(bundle, [board], Path(folder))

    together, alone = interleaved([in_one_call, in_a_call_each], repetitions=3)
    return together / number, alone / number


def _render(bundle_path: Path, boards: list[Storyboard], folder: Path) -> None:
    bundle = open_bundle(bundle_path)
    outcomes = Pipeline(bundle, OnnxRuntimeLoader(bundle)).render(boards, SETTINGS, folder)
    failed = [outcome for outcome in outcomes.values() if not isinstance(outcome, VideoDone)]
    if failed:
        raise RuntimeError(f"not rendered: {failed}")


def boards_for(number: int) -> list[Storyboard]:
    """So many videos of a scene each."""
    texts = (f"Video {index}: a bear bakes bread." for index in range(number))
    return [Storyboard(f"video-{index}", (Scene(text),), "benchmark") for index, text in enumerate(texts)]


def _loading(load: OnnxRuntimeLoader, graph: str) -> Callable[[], None]:
    def run() -> None:
        with load(graph):
            pass

    return run


@contextmanager
def short_bundle() -> Iterator[Path]:
    """A bundle of `tiny` for 3 s, while the block runs."""
    from ttt_video_engine.export.build import export_bundle
    from ttt_video_engine.export.sources.source import SeededSource

    with tempfile.TemporaryDirectory() as parent:
        bundle = Path(parent) / "bundle"
        export_bundle(SeededSource(preset("tiny"), seed=0), bundle, [LENGTH], "float32", lambda line: None)
        yield bundle


if __name__ == "__main__":
    render_and_report(sys.argv[1], int(sys.argv[2]))
