"""What it costs to write the state of a render after every step, beside the time of the step."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import step
from measure import interleaved, table

from ttt_video_engine.runtime.bundle import latent_shape
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.sampler import Step
from ttt_video_engine.runtime.step_state import StepState, new_generator, save_state

LIMIT = 0.02
"""Upper bound of the time of writing a state, over that of a step at `debug` size."""

OUTPUT = Path(__file__).parents[1] / "output"
"""Where the states are written: on the disk of the repository, as the system's temporary files may be in memory."""

FULL_SIZE = ("9s", "63s")


def after_every_step() -> str:
    model, rows = preset("debug"), []
    with step.exported("debug", "linear", "9s") as case, _writing("debug", "9s") as save:
        seconds, saved, unsynced = interleaved([case.onnx_runtime, save, _without_sync(save)], repetitions=11)
    share = saved / seconds
    verdict = "met" if share < LIMIT else "missed"
    rows.append(_row(f"{model.name} 9s", "9s", seconds, saved, unsynced))
    for length in FULL_SIZE:
        with _writing("5B", length) as save:
            saved, unsynced = interleaved([save, _without_sync(save)], repetitions=5)
        rows.append(_row(f"5B {length}", length, None, saved, unsynced))
    header = ["state", "KiB", "step ms", "write ms", "of it fsync ms", "of the step"]
    printed = table(header, rows)
    return f"{printed}\n\nA state after every step, debug: {share:.2%} of the step (limit {LIMIT:.0%}: {verdict})"


def _row(name: str, length: str, step_seconds: float | None, saved: float, unsynced: float) -> list[str]:
    size = 2 * 4 * int(np.prod(_shape(name.split()[0], length)))
    shown = ["", ""] if step_seconds is None else [f"{step_seconds * 1e3:.0f}", f"{saved / step_seconds:.2%}"]
    return [name, f"{size >> 10:,}", shown[0], f"{saved * 1e3:.1f}", f"{(saved - unsynced) * 1e3:.1f}", shown[1]]


@contextmanager
def _writing(name: str, length: str) -> Iterator[Callable[[], None]]:
    """A function that writes the state of one more step, as a render does: the two newest stay."""
    random = new_generator(0)
    latents, denoised = (random.standard_normal(_shape(name, length), dtype=np.float32) for _ in range(2))
    steps = count()
    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:

        def save() -> None:
            done = Step(next(steps), 1000, 999, 6.0, latents, denoised)
            save_state(Path(folder), StepState(done, dict(random.bit_generator.state)), "0" * 64)

        yield save


def _without_sync(save: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with patch("os.fsync", lambda descriptor: None):
            save()

    return run


def _shape(name: str, length: str) -> tuple[int, ...]:
    model = preset(name)
    return (1, *latent_shape(model, model.clip_size(length)))
