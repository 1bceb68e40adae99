"""What `sample --wandb` logs to Weights & Biases: one run for a command, with a section of charts for each video.

It is a client of the pipeline's events, as the display is. Whatever happens to it, the render continues.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from ttt_video_engine.runtime.errors import BackendError, printable
from ttt_video_engine.runtime.events import (
    Event,
    OnEvent,
    PreviewWritten,
    StepDone,
    VideoDone,
    VideoFailed,
    VideoStarted,
)
from ttt_video_engine.runtime.jobs import Job
from ttt_video_engine.runtime.render_folder import CONTACT, is_done

Warn = Callable[[str], None]


@contextmanager
def wandb_log(project: str | None, jobs: Sequence[Job], warn: Warn) -> Iterator[OnEvent]:
    """An `on_event` that logs to a project; to nowhere where there is none, and then nothing of it is imported.

    A failure is one call of `warn`, and ends the logging alone. Raises BackendError where the package is missing.
    """
    to_do = [job for job in jobs if job.overwrite or not is_done(job.folder)]
    if project is None or not to_do:
        yield lambda event: None
        return
    log = _WandbLog(_package(), warn)
    log.begin(project, to_do)
    try:
        yield log.on_event
    finally:
        log.end()


class _WandbLog:
    def __init__(self, package: ModuleType, warn: Warn) -> None:
        self._wandb, self._warn = package, warn
        self._run: Any = None
        self._jobs: Mapping[str, Job] = {}
        self._failed = False

    def begin(self, project: str, jobs: Sequence[Job]) -> None:
        """Begins a run with the settings, which all videos of a command share."""
        self._jobs = {job.name: job for job in jobs}
        record = jobs[0].record
        config = msgspec.to_builtins(record.settings) | msgspec.to_builtins(
            {"bundle": record.bundle, "environment": record.environment, "versions": record.versions}
        )
        with self._reporting():
            # The display stays with this program, and only what is documented is logged: no code, no console.
            quiet = self._wandb.Settings(console="off", disable_git=True, disable_code=True, x_save_requirements=False)
            self._run = self._wandb.init(project=project, config=config, settings=quiet)

    def on_event(self, event: Event) -> None:
        if self._run is None:
            return
        with self._reporting():
            self._log(event, section(event.video))

    def end(self) -> None:
        """Sends what is not sent yet. Ctrl-C leaves it for `wandb sync`, which the package names."""
        if self._run is None:
            return
        with self._reporting():
            try:
                self._run.finish(exit_code=int(self._failed))
            except KeyboardInterrupt as error:
                raise RuntimeError("interrupted while sending; the rest can be sent with wandb sync") from error

    def _log(self, event: Event, name: str) -> None:
        match event:
            case VideoStarted():
                job = self._jobs[event.video]
                about = {"length": job.length, "scenes": msgspec.to_builtins(job.storyboard.scenes)}
                self._run.config.update({name: about}, allow_val_change=True)
                self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            case StepDone():
                values = {
                    "step": event.steps_done,
                    "guidance": event.guidance,
                    "latents_norm": float(np.linalg.norm(event.latents)),
                    "x0_norm": float(np.linalg.norm(event.denoised)),
                    "velocity_norm": float(np.linalg.norm(event.velocity)),
                    "step_seconds": event.seconds,
                }
                self._run.log({f"{name}/{key}": value for key, value in values.items()})
            case PreviewWritten():
                preview = self._wandb.Image(str(event.path))
                self._run.log({f"{name}/step": event.steps_done, f"{name}/preview": preview})
            case VideoDone():
                seconds = {f"{name}/{stage}_seconds": value for stage, value in event.seconds.items()}
                contact = self._wandb.Image(str(Path(event.path).with_name(CONTACT)))
                video = self._wandb.Video(str(event.path), format="mp4")
                self._run.log({f"{name}/contact_sheet": contact, f"{name}/video": video, **seconds})
            case VideoFailed():
                self._failed = True
                self._run.summary[f"{name}/failure"] = event.message

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns any failure into one warning, after which nothing is logged."""
        try:
            yield
        except Exception as error:
            self._run = None
            self._warn(f"warning: wandb: {printable(str(error)) or type(error).__name__}; nothing more is logged there")


def section(video: str) -> str:
    """The name of a video in keys, where "/", "." and "*" have a meaning. Different videos have different ones."""
    plain = re.sub(r"[^\w-]", "_", video)
    return plain if plain == video else f"{plain}-{hashlib.sha256(video.encode()).hexdigest()[:8]}"


def _package() -> ModuleType:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report its own errors to its makers
    try:
        import wandb
    except ImportError as error:
        raise _missing() from error
    if wandb.__file__ is None:  # a folder of that name, such as the one it writes to
        raise _missing()
    return wandb


def _missing() -> BackendError:
    return BackendError("wandb is not installed; run: pip install 'ttt-video-engine[wandb]'")
