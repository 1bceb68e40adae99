"""Clips of held-out storyboards from a training checkpoint, in torch, with the runtime's own schedule and sampler."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from demo.captions import captions
from demo.config import MODEL
from demo.data import HELD_OUT_SEED, prompt_ids
from demo.encoder import LinearEncoder
from demo.files import load
from demo.model import DemoModel, new_model
from demo.scenes import SCENE_FRAMES, Frames
from demo.story import Script, random_script
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.sampler import guided, sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule

_NOISE_SEED = 42
_BATCH = 4
_GUIDANCE = 4.0
"""In every step: what the text decides is decided in the first ones, where dynamic guidance is still 1."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """The averaged weights of a folder of training; `num_done` counts the transformer's steps."""

    model: DemoModel
    decoder: VaeDecoder
    num_done: int

    @classmethod
    def load(cls, folder: Path) -> "Trained":
        transformer, vae = load(folder / "transformer.pt"), load(folder / "vae.pt")
        model = new_model(0).requires_grad_(False)
        model.load_state_dict(transformer["average"], strict=False)  # T5 has one weight under two names
        decoder = seeded(lambda: VaeDecoder(MODEL.vae), 0)
        decoder.load_state_dict(vae["average"])
        return cls(model, decoder, transformer["num_done"])


def rendered(
    trained: Trained, count: int, num_scenes: int, num_steps: int, *, linear: bool = False
) -> Iterator[tuple[Script, list[str], Frames]]:
    """`count` held-out storyboards as `judge` takes them; `linear`: decoded by the encoder's linear inverse."""
    for first in range(0, count, _BATCH):
        numbers = range(first, min(first + _BATCH, count))
        scripts = [random_script(HELD_OUT_SEED, number, num_scenes) for number in numbers]
        ids = [prompt_ids(script, number) for script, number in zip(scripts, numbers, strict=True)]
        positive, negative = (torch.from_numpy(np.stack(kind)) for kind in zip(*ids, strict=True))
        latents = _sampled(trained.model, positive, negative, num_steps, np.random.default_rng([_NOISE_SEED, first]))
        for number, script, clip in zip(numbers, scripts, latents, strict=True):
            frames = LinearEncoder.load().decode(clip) if linear else _decoded(trained.decoder, clip)
            yield script, captions(script, number), frames


def _sampled(
    model: DemoModel, positive: torch.Tensor, negative: torch.Tensor, num_steps: int, rng: np.random.Generator
) -> Array:
    """Latents [B, T, 16, 8, 12] from ids [B, S, N]."""
    size, num_scenes = positive.shape[:2]
    shape = (size, 1 + SCENE_FRAMES // 4 * num_scenes, 16, 8, 12)
    schedule = make_schedule(DiffusionConfig(), num_steps)
    scales = guidance_scales("constant", _GUIDANCE, schedule.timesteps)
    with torch.inference_mode():
        conditional, unconditional = model.embed(positive), model.embed(negative)

        def velocities(x: Array, timestep: int) -> tuple[Array, Array]:
            told = torch.full((size,), timestep)
            without, with_text = (
                model.transformer(torch.from_numpy(x), text, told).numpy() for text in (unconditional, conditional)
            )
            return without, with_text

        noise = rng.standard_normal(shape, dtype=np.float32)
        *_, last = sample(guided(velocities), noise, schedule, scales, "ddim", lambda: noise)
    return last.latents


def _decoded(decoder: VaeDecoder, latents: Array) -> Frames:
    """Frames [1 + 4·(T − 1), 64, 96, 3] of latents [T, 16, 8, 12]."""
    with torch.inference_mode():
        windows = list(decoder.decode(torch.from_numpy(latents).transpose(0, 1)[None]))
    frames = torch.cat(windows, dim=2)[0].permute(1, 2, 3, 0)
    return ((frames + 1) * 127.5).clamp(0, 255).byte().numpy()
