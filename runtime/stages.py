"""The three stages of a video, each with one component in memory: text → embeddings → latents → frames.

What they give depends on the bundle, the prompts and the settings alone. Shapes: S scenes, N tokens kept per scene, T
latent frames.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from msgspec.structs import replace as with_fields
from numpy.typing import NDArray

from ttt_video_engine.runtime.bundle import (
    CACHE_IN,
    CACHE_OUT,
    TEXT_ENCODER,
    VAE_FIRST,
    VAE_NEXT,
    Bundle,
    latent_shape,
    transformer_graph_name,
)
from ttt_video_engine.runtime.errors import NumericsError
from ttt_video_engine.runtime.passes import GuidedVelocity
from ttt_video_engine.runtime.runner import HostOrDeviceArray, Runner, RunnerLoader
from ttt_video_engine.runtime.sampler import sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.step_state import History, StepState, new_generator, restored_generator
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import EncodedPrompts
from ttt_video_engine.runtime.video import to_frames

Floats = NDArray[np.float32]
Load = Callable[[str], Runner]
"""A `RunnerLoader`, or what stands for one while its graphs stay loaded."""


@contextmanager
def kept_loaded(load: RunnerLoader) -> Iterator[Load]:
    """A loader that loads every graph once, when it is first asked for, and frees them all at the end."""
    runners: dict[str, Runner] = {}
    with ExitStack() as stack:

        def load_once(graph: str) -> Runner:
            if graph not in runners:
                runners[graph] = stack.enter_context(load(graph))
            return _Borrowed(runners[graph])

        yield load_once


@dataclass(frozen=True)
class _Borrowed:
    """A runner that is not freed by who uses it."""

    _runner: Runner

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> Mapping[str, HostOrDeviceArray]:
        return self._runner.run(inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def encode_prompts(load: Load, prompts: EncodedPrompts, cache: TextCache) -> Floats:
    """Embeddings [2, S, N, text_dim], negative prompts first.

    The encoder is loaded only where the cache lacks a scene. It takes one scene at a time, so that what a scene comes
    to does not depend on those it was encoded with.
    """
    with ExitStack() as stack:
        engine: Runner | None = None
        encoded: dict[bytes, Floats] = {}  # here as well: most negative prompts are the same, and a cache may keep none

        def encode(ids: NDArray[np.int64]) -> Floats:
            nonlocal engine
            key = ids.tobytes()
            if key not in encoded:
                embedding = cache.get(ids)
                if embedding is None:
                    engine = engine or stack.enter_context(load(TEXT_ENCODER))
                    (embedding,) = np.asarray(engine.run({"ids": ids[None]})["embeddings"], dtype=np.float32)
                    _check_finite(embedding, f"{TEXT_ENCODER}: embeddings")
                    cache.put(ids, embedding)
                encoded[key] = embedding
            return encoded[key]

        return np.stack([np.stack([encode(ids) for ids in branch]) for branch in (prompts.negative, prompts.positive)])


def denoise(
    bundle: Bundle, load: Load, length: str, text: Floats, settings: Settings, start: StepState | None = None
) -> Generator[StepState]:
    """The state after every step, from noise, or from `start`, to latents [1, T, C, H, W].

    The transformer is freed when the generator ends. Raises NumericsError where a tensor has NaN or infinite values.
    """
    model = bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size(length)))
    schedule = make_schedule(model.diffusion, settings.num_steps)
    guidance = guidance_scales(
        settings.guidance, settings.guidance_scale, schedule.timesteps, settings.guidance_interval
    )
    random = restored_generator(start.generator) if start else new_generator(settings.seed)
    history = start.history if start else History()
    graph = transformer_graph_name(length)
    done = start.steps_done if start else 0

    def draw_noise() -> Floats:
        return random.standard_normal(shape, dtype=np.float32)

    def where(tensor: str) -> str:
        return f"step {done + 1} of {settings.num_steps}: {tensor} of {graph}"

    with load(graph) as engine:

        def branches(x: Floats, timestep: int, guided: bool) -> Floats:
            texts = text if guided else text[1:]
            size = 1 if settings.low_memory else len(texts)
            runs = [
                np.asarray(
                    engine.run(
                        {
                            "latents": np.repeat(x, size, axis=0),
                            "text": texts[first : first + size],
                            "timestep": np.full(size, timestep, dtype=np.int64),
                        }
                    )["velocity"]
                )
                for first in range(0, len(texts), size)
            ]
            velocities = np.concatenate(runs).astype(np.float32)
            _check_finite(velocities, where("velocity"))
            return velocities

        velocity = GuidedVelocity(
            branches, int(schedule.timesteps[-1]), settings.step_cache, start.reusable if start else None
        )
        for step in sample(
            velocity, start.step if start else draw_noise(), schedule, guidance, settings.sampler, draw_noise
        ):
            _check_finite(step.latents, where("latents"))
            done = step.index + 1
            history = with_fields(history, passes=history.passes + velocity.num_passes)
            yield StepState(step, dict(random.bit_generator.state), history, velocity.reusable)


def decode(bundle: Bundle, load: Load, latents: Floats) -> Iterator[NDArray[np.uint8]]:
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


def _check_finite(tensor: Floats, what: str) -> None:
    if not np.isfinite(tensor).all():
        bad = f"{np.isnan(tensor).sum()} NaN and {np.isinf(tensor).sum()} infinite"
        raise NumericsError(
            f"{what} has {bad} values of {tensor.size}; export with --dtype float32, or bfloat16 for TensorRT"
        )
