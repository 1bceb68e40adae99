"""A model of the bundle's shapes that takes no time, and storyboards for it: for tests of what happens around it."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.events import Event, Outcome, StepDone
from ttt_video_engine.runtime.phases import RenderOptions
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.step_state import LATENTS
from ttt_video_engine.runtime.storyboard import Scene, Storyboard

Arrays = Mapping[str, NDArray[Any]]


DONE = ["contact.png", "latents.safetensors", "prompt.txt", "run.json", "video.json", "video.mp4"]
"""Files of a video that is done."""


class StandIn:
    """A graph: smooth functions of the inputs, so that a difference anywhere is one in the result."""

    def __init__(self, graph: str, bundle: Bundle) -> None:
        self._graph, self._model = graph, bundle.manifest.model

    def run(self, inputs: Any) -> Arrays:
        if self._graph == "text_encoder":
            width = self._model.transformer.text_dim
            return {"embeddings": np.sin(inputs["ids"][..., None] * np.arange(1, width + 1)).astype(np.float32)}
        x = inputs["latents"]
        if self._graph.startswith("transformer"):
            bias = inputs["text"].mean(axis=(1, 2, 3)) + np.cos(inputs["timestep"] / 100)
            return {"velocity": np.tanh(x) * np.float32(0.6) + bias.reshape(-1, 1, 1, 1, 1).astype(np.float32)}
        num_frames = 4 * (x.shape[1] - 1) + 1 if self._graph.endswith("first") else 4 * x.shape[1]
        gray = np.repeat(np.repeat(x[:, :1, 0], 8, axis=2), 8, axis=3)
        return {"frames": np.broadcast_to(np.tanh(gray)[:, :, None], (1, 1, 3, *gray.shape[2:])).repeat(num_frames, 1)
                .transpose(0, 2, 1, 3, 4)}  # fmt: skip

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None: ...


class StandInLoader:
    """Loads stand-ins and notes which. `change` sees (graph, number of the run, outputs) and gives the outputs."""

    def __init__(self, bundle: Bundle, change: Callable[[str, int, Arrays], Arrays] | None = None) -> None:
        self.loaded: list[str] = []
        self._bundle, self._change, self._runs = bundle, change, 0

    def check(self, graphs: Iterable[str]) -> None: ...

    def environment(self) -> dict[str, str]:
        return {"engine": "stand-in", "version": "1"}

    def __call__(self, graph: str) -> StandIn:
        self.loaded.append(graph)
        runner = StandIn(graph, self._bundle)
        real = runner.run

        def run(inputs: Any) -> Arrays:
            self._runs += graph.startswith("transformer")
            outputs = real(inputs)
            return self._change(graph, self._runs, outputs) if self._change else outputs

        runner.run = run  # type: ignore[method-assign]
        return runner


def board(name: str = "bear", *texts: str) -> Storyboard:
    return Storyboard(name, tuple(Scene(text) for text in texts or (f"A {name}.",)), f"{name}.json")


def render(
    bundle: Path,
    output_dir: Path,
    *boards: Storyboard,
    settings: Settings | None = None,
    on_event: Callable[[Event], None] | None = None,
    loader: StandInLoader | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Outcome]:
    """Renders with the stand-in, 4 steps unless the settings say otherwise."""
    opened = open_bundle(bundle)
    pipeline = Pipeline(opened, loader or StandInLoader(opened))
    settings = settings or Settings(num_steps=4)
    jobs = pipeline.prepare(boards or (board(),), settings, output_dir, overwrite=overwrite)
    return pipeline.run(jobs, options=RenderOptions(**options), on_event=on_event)


def steps_of(events: Iterable[Event]) -> list[int]:
    return [event.steps_done for event in events if isinstance(event, StepDone)]


def products(folder: Path) -> dict[str, bytes]:
    """What must not depend on interruptions."""
    return {name: (folder / name).read_bytes() for name in ("video.mp4", LATENTS)}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def storyboard_file(path: Path, *videos: object) -> Path:
    path.write_text("\n".join(json.dumps(video) for video in videos))
    return path
