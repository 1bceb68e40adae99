"""The phases of a queue, each a stage for all of its videos: text, then denoising, then decoding.

What one phase leaves for the next is in the folders of the videos, so memory does not grow with their number, and a
process that is killed between any two instructions has lost one step at most, or the decoding of one video.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
from msgspec.structs import replace as with_fields
from numpy.typing import NDArray

from ttt_video_engine.runtime.bundle import TOKENIZER, Bundle
from ttt_video_engine.runtime.config import ttt_label
from ttt_video_engine.runtime.contact_frames import FramePicker
from ttt_video_engine.runtime.contact_sheet import draw_contact_sheet, draw_preview, scene_frames
from ttt_video_engine.runtime.errors import DamagedFile, OutputError, TTTVideoError
from ttt_video_engine.runtime.events import (
    DecodeStarted,
    OnEvent,
    PreviewWritten,
    RenderWarning,
    StepDone,
    VideoDone,
    VideoStarted,
    VideoStopped,
    WindowDecoded,
)
from ttt_video_engine.runtime.files import atomic_write
from ttt_video_engine.runtime.jobs import Job
from ttt_video_engine.runtime.preview import preview_frames
from ttt_video_engine.runtime.prompts import PROMPTS, prompt_text
from ttt_video_engine.runtime.render_folder import CONTACT, PREVIEW, TEXT, VIDEO, Claim, begin, is_done, remove_states
from ttt_video_engine.runtime.run_record import changes, read_record
from ttt_video_engine.runtime.runner import RunnerLoader
from ttt_video_engine.runtime.sampler import Step
from ttt_video_engine.runtime.sidecar import write_sidecar
from ttt_video_engine.runtime.stages import Floats, Load, decode, denoise, encode_prompts
from ttt_video_engine.runtime.step_state import (
    HISTORY,
    LATENTS,
    History,
    StepState,
    load_history,
    load_latents,
    save_latents,
    save_state,
    states_in,
    usable_states,
)
from ttt_video_engine.runtime.tensor_file import load_tensors, save_tensors
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import SceneTokenizer
from ttt_video_engine.runtime.video import VideoFormat, write_video

CONTACT_COLUMNS = 4
"""Frames of each scene on a contact sheet."""
SCENE_FRAMES = 48
"""Video frames of a scene: 12 latent frames of 4."""


@dataclass(frozen=True)
class RenderOptions:
    """How to render; none of it changes a video.

    A state is written after every `checkpoint_every` steps, and a preview after every `preview_every` steps.
    `stop_after` ends each video after that many steps in total, with its state and a preview written.
    """

    checkpoint_every: int = 1
    keep_latents: bool = True
    stop_after: int | None = None
    preview_every: int | None = None


@dataclass(frozen=True, eq=False)
class Queue:
    """What the videos of one call have in common."""

    bundle: Bundle
    load: RunnerLoader
    cache: TextCache
    options: RenderOptions
    emit: OnEvent
    tokenizer: SceneTokenizer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", SceneTokenizer.from_file(self.bundle.path(TOKENIZER)))


Phase = Callable[[Queue, Job, Load, Claim], None]
"""Does its stage for one video, in a folder that this process has claimed, unless it was done before."""


def encode_text(queue: Queue, job: Job, load: Load, claim: Claim) -> None:
    """Begins or resumes the folder, and writes the embeddings that the steps need."""
    if is_done(job.folder) and not job.overwrite:
        return
    begin(job.folder, job.record, overwrite=job.overwrite)
    with atomic_write(job.folder / PROMPTS) as partial:
        partial.write_text(prompt_text(job.storyboard), encoding="utf-8")
    for message in job.warnings:
        queue.emit(RenderWarning(job.name, message))
    for change in _changes(job):
        queue.emit(RenderWarning(job.name, f"{job.folder}: was begun with another {change}; it may round differently"))
    if _has_latents(queue, job) or _has_text(queue, job):
        return
    start = perf_counter()
    prompts = queue.tokenizer.encode(job.storyboard, queue.bundle.manifest.model.text_lengths[job.length])
    text = encode_prompts(load, prompts, queue.cache)
    facts = {"run": job.record.digest, "seconds": perf_counter() - start}
    claim.check()
    save_tensors(job.folder / TEXT, {"text": text}, facts)


def run_steps(queue: Queue, job: Job, load: Load, claim: Claim) -> None:
    """Denoises from the newest state that is whole, and writes a state after each step, then the latents."""
    folder, digest, num_steps = job.folder, job.record.digest, job.settings.num_steps
    if is_done(folder) or (folder / LATENTS).exists():
        return
    text, text_seconds = _load_text(queue, job)
    start = _newest_state(queue, job)
    steps_done, history = (start.steps_done, start.history) if start else (0, History({"text": text_seconds}))
    if start:
        history = with_fields(history, resumed=(*history.resumed, steps_done))
    queue.emit(VideoStarted(job.name, job.length, steps_done, num_steps))
    stop = queue.options.stop_after or num_steps
    if steps_done >= stop:
        queue.emit(VideoStopped(job.name, steps_done, num_steps))
        return
    began = before = perf_counter()
    with closing(denoise(queue.bundle, load, job.length, text, job.settings, start)) as steps:
        for state in steps:
            claim.check()
            now = perf_counter()
            told = with_fields(history, passes=state.history.passes)
            state = replace(state, history=_after(told, "denoise", now - began))
            done = state.steps_done
            saved = done in (stop, num_steps) or done % queue.options.checkpoint_every == 0
            if done == num_steps:
                save_latents(folder, state.step.latents, state.history, digest)
                remove_states(folder)
            elif saved:
                save_state(folder, state, digest)
            try:
                queue.emit(_step_done(job, state.step, now - before, saved=saved))
            except BaseException:
                if not saved:
                    save_state(folder, state, digest)
                raise
            before = now
            if _previews(queue.options, done, stop, num_steps):
                _write_preview(queue, job, state)
            if done == stop < num_steps:
                queue.emit(VideoStopped(job.name, done, num_steps))
                return


def decode_video(queue: Queue, job: Job, load: Load, claim: Claim) -> None:
    """Decodes finished latents into the mp4, then writes the contact sheet and, last, the sidecar."""
    folder, model = job.folder, queue.bundle.manifest.model
    if is_done(folder) or not (folder / LATENTS).exists():
        return
    latents, history = load_latents(folder, job.latent_shape, job.record.digest), load_history(folder)
    size = model.clip_size(job.length)
    num_windows = (size.num_frames - 1) // model.vae.temporal_window
    picker = FramePicker(scene_frames(size.num_scenes, model.num_video_frames(size), CONTACT_COLUMNS))
    start = perf_counter()
    queue.emit(DecodeStarted(job.name, num_windows))

    def windows() -> Iterator[NDArray[np.uint8]]:
        for done, frames in enumerate(decode(queue.bundle, load, latents), start=1):
            claim.check()
            picker.see(frames)
            yield frames
            queue.emit(WindowDecoded(job.name, done, num_windows, frames))

    settings = job.settings
    video_format = VideoFormat(settings.fps, settings.crf, settings.codec)
    num_frames = write_video(folder / VIDEO, windows(), video_format, width=model.width, height=model.height)
    seconds = SCENE_FRAMES / settings.fps
    draw_contact_sheet(folder / CONTACT, picker.frames, _captions(job), _footer(job), scene_seconds=seconds)
    history = _after(history, "decode", perf_counter() - start)
    claim.check()
    write_sidecar(job, model, num_frames, history, queue.load.environment(), _changes(job))
    try:
        remove_states(folder)
        (folder / HISTORY).unlink(missing_ok=True)
        if not queue.options.keep_latents:
            (folder / LATENTS).unlink(missing_ok=True)
    except (OSError, OutputError) as error:  # the video is done all the same
        queue.emit(RenderWarning(job.name, f"{error}; the video is done, and this file is left over"))
    queue.emit(VideoDone(job.name, folder / VIDEO, history.seconds))


def _step_done(job: Job, step: Step, seconds: float, *, saved: bool) -> StepDone:
    assert step.velocity is not None  # of a step that was read, which is none that was done here
    return StepDone(
        video=job.name,
        steps_done=step.index + 1,
        num_steps=step.num_steps,
        seconds=seconds,
        saved=saved,
        guidance=step.guidance,
        latents=step.latents,
        denoised=step.denoised,
        velocity=step.velocity,
    )


def _previews(options: RenderOptions, done: int, stop: int, num_steps: int) -> bool:
    every = options.preview_every
    return done < num_steps and (done == stop or (every is not None and done % every == 0))


def _write_preview(queue: Queue, job: Job, state: StepState) -> None:
    """One decoded frame of each scene as the model predicts it now. A preview that fails does not stop the render.

    The decoder is freed again, as the transformer stays in memory.
    """
    title = f"{job.name}: step {state.steps_done} of {job.settings.num_steps}"
    try:
        frames = preview_frames(queue.bundle, queue.load, state.step.denoised)
        draw_preview(job.folder / PREVIEW, frames, _captions(job), title)
    except (TTTVideoError, OSError) as error:
        queue.emit(RenderWarning(job.name, f"{job.folder / PREVIEW}: no preview ({error})"))
        return
    queue.emit(PreviewWritten(job.name, state.steps_done, job.folder / PREVIEW))


def _captions(job: Job) -> list[str]:
    return [scene.text for scene in job.storyboard.scenes]


def _has_latents(queue: Queue, job: Job) -> bool:
    """Whether the latents are finished; damaged ones are removed, with a warning."""
    if not (job.folder / LATENTS).exists():
        return False
    try:
        load_latents(job.folder, job.latent_shape, job.record.digest)
    except DamagedFile as error:
        queue.emit(RenderWarning(job.name, f"{error}; they are made again"))
        (job.folder / LATENTS).unlink()
        return False
    return True


def _has_text(queue: Queue, job: Job) -> bool:
    try:
        _load_text(queue, job)
    except OutputError:
        return False
    except DamagedFile as error:
        queue.emit(RenderWarning(job.name, f"{error}; it is encoded again"))
        return False
    return True


def _load_text(queue: Queue, job: Job) -> tuple[Floats, float]:
    """Embeddings [2, S, N, text_dim] and the seconds they took."""
    model = queue.bundle.manifest.model
    path, size = job.folder / TEXT, model.clip_size(job.length)
    if not path.exists():
        raise OutputError(f"{path}: is missing, though the render began; run again")
    shape = (2, size.num_scenes, size.text_length, model.transformer.text_dim)
    arrays, facts = load_tensors(path, {"text": shape})
    if facts.get("run") != job.record.digest:
        raise DamagedFile(f"{path}: belongs to another render than run.json")
    return arrays["text"], float(facts["seconds"])


def _newest_state(queue: Queue, job: Job) -> StepState | None:
    """The newest undamaged state. A warning names damaged ones, and the step from which the render resumes."""
    reuses = job.settings.step_cache is not None
    damaged: list[DamagedFile] = []
    found = None
    for state in usable_states(job.folder, job.latent_shape, job.record.digest, reuses=reuses):
        if isinstance(state, StepState):
            found = state
            break
        damaged.append(state)
    for error in damaged:
        resumes = f"resumes after step {found.steps_done}" if found else "starts from the first step"
        queue.emit(RenderWarning(job.name, f"{error}; the render {resumes}"))
    for steps_done, path in states_in(job.folder).items():
        if found is None or steps_done > found.steps_done:
            path.unlink()
    return found


def _changes(job: Job) -> list[str]:
    begun = read_record(job.folder)
    return changes(begun, job.record) if begun else []


def _after(history: History, stage: str, seconds: float) -> History:
    return with_fields(history, seconds={**history.seconds, stage: history.seconds.get(stage, 0.0) + seconds})


def _footer(job: Job) -> str:
    settings = job.settings
    return (
        f"{job.record.bundle.preset}, {ttt_label(job.record.bundle.ttt)}, {job.length}, {settings.num_steps} steps, "
        f"{settings.sampler}, guidance {settings.guidance} {settings.guidance_scale:g}, seed {settings.seed}"
    )
