"""From a storyboard to a folder with an mp4: one component in memory at a time, frames straight into the file.

The pipeline is handed a loader for engines and does not know what runs them. What it makes depends on the storyboard,
the bundle and the settings alone.
"""

import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import av
import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from ttt_video_engine import __version__
from ttt_video_engine.runtime.bundle import (
    CACHE_IN,
    CACHE_OUT,
    TEXT_ENCODER,
    TOKENIZER,
    VAE_FIRST,
    VAE_NEXT,
    Bundle,
    latent_shape,
    transformer_graph_name,
)
from ttt_video_engine.runtime.callbacks import Progress
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, check_folder, sha256_of
from ttt_video_engine.runtime.runner import Runner, RunnerLoader
from ttt_video_engine.runtime.sampler import Step, sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import Storyboard, length_of
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import EncodedPrompts, SceneTokenizer
from ttt_video_engine.runtime.video import frame_rate, to_frames, write_mp4

VIDEO, SIDECAR = "video.mp4", "video.json"
SIDECAR_VERSION = 1
_VERSIONS = {
    "ttt-video-engine": __version__,
    "python": platform.python_version(),
    "numpy": np.__version__,
    "av": av.__version__,
    "tokenizers": tokenizers.__version__,
}
"""Of what is loaded, whatever the distribution is called that it was installed from."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One storyboard with all that could be wrong with it checked."""

    storyboard: Storyboard
    length: str
    prompts: EncodedPrompts
    folder: Path


def prepare_jobs(
    bundle: Bundle, storyboards: list[Storyboard], settings: Settings, output_dir: Path, *, overwrite: bool
) -> list[Job]:
    """Checks everything that can be checked before the first video starts.

    Raises StoryboardError for a scene count without a graph, ConfigError for settings out of range, OutputError for a
    video that exists or a folder that cannot be written.
    """
    model = bundle.manifest.model
    schedule = make_schedule(model.diffusion, settings.num_steps)
    guidance_scales(settings.guidance, settings.guidance_scale, schedule.timesteps)
    frame_rate(settings.fps)
    check_folder(output_dir)
    tokenizer = SceneTokenizer.from_file(bundle.path(TOKENIZER))
    jobs = []
    for storyboard in storyboards:
        length = length_of(storyboard, bundle.manifest.lengths)
        prompts = tokenizer.encode(storyboard, model.text_lengths[length])
        job = Job(storyboard, length, prompts, output_dir / storyboard.name)
        if (job.folder / VIDEO).exists() and not overwrite:
            raise OutputError(f"{job.folder / VIDEO}: exists; use --overwrite or another --output-dir")
        jobs.append(job)
    return jobs


def graphs_needed(jobs: list[Job]) -> list[str]:
    """Every graph that `render` will load."""
    transformers = dict.fromkeys(transformer_graph_name(job.length) for job in jobs)
    return [TEXT_ENCODER, *transformers, VAE_FIRST, VAE_NEXT]


def render(
    bundle: Bundle, load: RunnerLoader, jobs: list[Job], settings: Settings, cache: TextCache, progress: Progress
) -> Iterator[Path]:
    """Renders every job and yields the path of each mp4 as it is complete."""
    rendering = _Rendering(bundle, bundle.sha256, load, settings, progress)
    texts = encode_prompts(load, jobs, cache, progress)
    for job, (text, text_seconds) in zip(jobs, texts, strict=True):
        yield _render_one(rendering, job, text, text_seconds)


def encode_prompts(
    load: RunnerLoader, jobs: list[Job], cache: TextCache, progress: Progress
) -> list[tuple[Floats, float]]:
    """Embeddings [2, S, N, text_dim] of each job, negative prompts first, and the seconds they took.

    The encoder is loaded only where the cache lacks a scene. It takes one scene at a time, so that what a scene comes
    to does not depend on those it was encoded with.
    """
    texts = []
    progress("text", 0, len(jobs))
    with ExitStack() as stack:
        engine: Runner | None = None

        def encode(ids: NDArray[np.int64]) -> Floats:
            nonlocal engine
            embedding = cache.get(ids)
            if embedding is None:
                engine = engine or stack.enter_context(load(TEXT_ENCODER))
                (embedding,) = np.asarray(engine.run({"ids": ids[None]})["embeddings"], dtype=np.float32)
                cache.put(ids, embedding)
            return embedding

        for done, job in enumerate(jobs, start=1):
            start = perf_counter()
            branches = (job.prompts.negative, job.prompts.positive)
            text = np.stack([np.stack([encode(ids) for ids in branch]) for branch in branches])
            texts.append((text, perf_counter() - start))
            progress("text", done, len(jobs))
    return texts


def denoise(bundle: Bundle, load: RunnerLoader, length: str, text: Floats, settings: Settings) -> Iterator[Step]:
    """Every step from noise to latents [1, T, C, H, W]; the transformer is freed when the generator ends."""
    model = bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size(length)))
    schedule = make_schedule(model.diffusion, settings.num_steps)
    guidance = guidance_scales(settings.guidance, settings.guidance_scale, schedule.timesteps)
    random = np.random.Generator(np.random.PCG64(settings.seed))

    def draw_noise() -> Floats:
        return random.standard_normal(shape, dtype=np.float32)

    with load(transformer_graph_name(length)) as engine:

        def velocities(x: Floats, timestep: int) -> tuple[Floats, Floats]:
            size = 1 if settings.low_memory else 2
            batches = [text[start : start + size] for start in range(0, 2, size)]
            runs = [
                np.asarray(
                    engine.run(
                        {
                            "latents": np.repeat(x, size, axis=0),
                            "text": batch,
                            "timestep": np.full(size, timestep, dtype=np.int64),
                        }
                    )["velocity"]
                )
                for batch in batches
            ]
            negative, positive = np.split(np.concatenate(runs).astype(np.float32), 2)
            return negative, positive

        yield from sample(velocities, draw_noise(), schedule, guidance, settings.sampler, draw_noise)


def decode(bundle: Bundle, load: RunnerLoader, latents: Floats) -> Iterator[NDArray[np.uint8]]:
    """Frames [T', height, width, 3] of each window of latents [1, T, C, H, W]; one window is in memory at a time."""
    size = bundle.manifest.model.vae.temporal_window
    with load(VAE_FIRST) as engine:
        outputs = engine.run({"latents": latents[:, : 1 + size]})
    yield to_frames(np.asarray(outputs["frames"], np.float32))
    with load(VAE_NEXT) as engine:
        for start in range(1 + size, latents.shape[1], size):
            caches = {
                name.replace(CACHE_OUT, CACHE_IN, 1): value
                for name, value in outputs.items()
                if name.startswith(CACHE_OUT)
            }
            outputs = engine.run({"latents": latents[:, start : start + size], **caches})
            yield to_frames(np.asarray(outputs["frames"], np.float32))


@dataclass(frozen=True)
class _Rendering:
    """What all videos of a call have in common."""

    bundle: Bundle
    bundle_sha256: str
    load: RunnerLoader
    settings: Settings
    progress: Progress


def _render_one(rendering: _Rendering, job: Job, text: Floats, text_seconds: float) -> Path:
    """Writes one video and its sidecar; the path of the video."""
    model, settings, progress = rendering.bundle.manifest.model, rendering.settings, rendering.progress

    start = perf_counter()
    progress("denoise", 0, settings.num_steps)
    for step in denoise(rendering.bundle, rendering.load, job.length, text, settings):
        latents = step.latents
        progress("denoise", step.index + 1, step.num_steps)
    denoised = perf_counter()

    num_windows = (model.clip_size(job.length).num_frames - 1) // model.vae.temporal_window

    def windows() -> Iterator[NDArray[np.uint8]]:
        progress("decode", 0, num_windows)
        for done, window in enumerate(decode(rendering.bundle, rendering.load, latents), start=1):
            yield window
            progress("decode", done, num_windows)

    video = job.folder / VIDEO
    num_frames = write_mp4(video, windows(), width=model.width, height=model.height, fps=settings.fps)
    (job.folder / SIDECAR).unlink(missing_ok=True)  # of the video that was here before
    seconds = {"text": text_seconds, "denoise": denoised - start, "decode": perf_counter() - denoised}
    sidecar = _sidecar(rendering, job, num_frames, seconds)
    with atomic_write(job.folder / SIDECAR) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n")
    return video


def _sidecar(rendering: _Rendering, job: Job, num_frames: int, seconds: dict[str, float]) -> dict[str, Any]:
    """What is written beside a video, see docs/formats.md."""
    manifest = rendering.bundle.manifest
    model = manifest.model
    return {
        "format_version": SIDECAR_VERSION,
        "video": VIDEO,
        "sha256": sha256_of(job.folder / VIDEO),
        "length": job.length,
        "num_frames": num_frames,
        "width": model.width,
        "height": model.height,
        "storyboard": {"source": job.storyboard.source, "scenes": job.storyboard.scenes},
        "truncations": [truncation.message for truncation in job.prompts.truncations],
        "settings": rendering.settings,
        "bundle": {
            "sha256": rendering.bundle_sha256,
            "preset": model.name,
            "ttt": model.transformer.ttt,
            "dtype": manifest.dtype,
        },
        "seconds": seconds,
        "environment": rendering.load.environment(),
        "versions": _VERSIONS,
    }
