"""Events that a render reports to its caller. The command line and the JSON log are clients of the same events."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class StopRendering(BaseException):
    """Raise it in `on_event` to stop a render; the same call resumes it. A BaseException: no handler may catch it."""


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened to one video, named after its folder."""

    video: str


@dataclass(frozen=True, eq=False)
class RenderWarning(Event):
    """Something to know that stops nothing, such as a prompt that was cut or a damaged state."""

    message: str


@dataclass(frozen=True, eq=False)
class TextEncoded(Event):
    """The embeddings of a video are in its folder; `done` of `total` videos have them."""

    done: int
    total: int


@dataclass(frozen=True, eq=False)
class VideoStarted(Event):
    """Denoising starts, or resumes after `steps_done` steps."""

    length: str
    steps_done: int
    num_steps: int


@dataclass(frozen=True, eq=False)
class StepDone(Event):
    """One more step. The arrays [1, T, C, H, W] are the sampler's own: read them, copy them to change or keep them."""

    steps_done: int
    num_steps: int
    seconds: float
    saved: bool
    """Whether the step is on the disk."""
    guidance: float
    latents: NDArray[np.float32]
    denoised: NDArray[np.float32]
    """x0, the clean latents as this step predicts them."""
    velocity: NDArray[np.float32]
    """What the model predicts, with guidance."""


@dataclass(frozen=True, eq=False)
class PreviewWritten(Event):
    """A picture of the video as the model predicts it after `steps_done` steps is on the disk."""

    steps_done: int
    path: Path | str
    """A string is the URI of an object store; so in the other events."""


@dataclass(frozen=True, eq=False)
class DecodeStarted(Event):
    """Decoding starts: `num_windows` windows of frames."""

    num_windows: int


@dataclass(frozen=True, eq=False)
class WindowDecoded(Event):
    """One more window of frames, uint8 [T, height, width, 3], handed to the video encoder."""

    windows_done: int
    num_windows: int
    frames: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class VideoDone(Event):
    """The video and its sidecar are on the disk. `seconds` by stage, of all processes that worked on it."""

    path: Path | str
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class VideoSkipped(Event):
    """The video was done before."""

    path: Path | str


@dataclass(frozen=True, eq=False)
class VideoBusy(Event):
    """Another process has the video; `message` names it."""

    message: str


@dataclass(frozen=True, eq=False)
class VideoStopped(Event):
    """`stop_after` steps are done and saved. The same call with a later stop, or none, resumes."""

    steps_done: int
    num_steps: int


@dataclass(frozen=True, eq=False)
class VideoFailed(Event):
    """The video cannot be finished; `error.json` in its folder says the same. The others continue."""

    stage: str
    error: Exception

    @property
    def message(self) -> str:
        return f"{self.video}: {self.error or type(self.error).__name__}"


Outcome = VideoDone | VideoSkipped | VideoBusy | VideoStopped | VideoFailed
OnEvent = Callable[[Event], None]


def to_json(event: Event) -> str:
    """One line: the event's class as "event", and its fields but for arrays."""
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    shown = {name: _plain(value) for name, value in values.items() if not isinstance(value, np.ndarray)}
    return json.dumps({"event": type(event).__name__, **shown}) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Exception):
        return {"error": type(value).__name__, "message": str(value)}
    return str(value) if isinstance(value, Path) else value
