"""Videos to render, with everything checked that can be checked before the first step."""

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import av
import msgspec
import numpy as np
import tokenizers

from ttt_video_engine import __version__
from ttt_video_engine.runtime.bundle import (
    TEXT_ENCODER,
    TOKENIZER,
    VAE_FIRST,
    VAE_NEXT,
    Bundle,
    latent_shape,
    transformer_graph_name,
)
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.files import check_folder, check_space
from ttt_video_engine.runtime.passes import check_steps
from ttt_video_engine.runtime.prompts import without_transitions
from ttt_video_engine.runtime.render_folder import TEXT, check_begin, is_done
from ttt_video_engine.runtime.run_record import BundleRecord, RunRecord
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.step_state import LATENTS, states_in
from ttt_video_engine.runtime.storyboard import Storyboard, length_of
from ttt_video_engine.runtime.tokenizer import SceneTokenizer, Truncation
from ttt_video_engine.runtime.video import VideoFormat, bits_per_pixel, check_encoder, with_crf

_VERSIONS = {
    "ttt-video-engine": __version__,
    "python": platform.python_version(),
    "numpy": np.__version__,
    "av": av.__version__,
    "tokenizers": tokenizers.__version__,
}
"""Of what is loaded, whatever the distribution is called that it was installed from."""


@dataclass(frozen=True)
class Job:
    """One video: a storyboard that the bundle can render, and what fixes the result.

    `ignored` says what of the storyboard has no effect with the bundle, one line each.
    """

    storyboard: Storyboard
    record: RunRecord
    truncations: tuple[Truncation, ...]
    folder: Path
    latent_shape: tuple[int, int, int, int, int]
    overwrite: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.storyboard.name

    @property
    def length(self) -> str:
        return self.record.length

    @property
    def settings(self) -> Settings:
        return self.record.settings

    @property
    def warnings(self) -> list[str]:
        """What can be rendered but is seldom meant, one line each."""
        cuts = [f"{self.storyboard.source}: {truncation.message}" for truncation in self.truncations]
        return [*self.storyboard.warnings, *self.ignored, *cuts]


def check_inputs(bundle: Bundle, storyboards: Iterable[Storyboard], settings: Settings) -> None:
    """Checks what needs neither a device nor the output folder.

    Raises StoryboardError for a scene count without a graph or two videos of one name, ConfigError for settings out of
    range.
    """
    model = bundle.manifest.model
    check_steps(settings, model.diffusion)
    video_format = VideoFormat(settings.fps, settings.crf, settings.codec)
    check_encoder(video_format, width=model.width, height=model.height)
    sources: dict[str, str] = {}
    for storyboard in storyboards:
        if (other := sources.get(storyboard.name)) is not None:
            raise StoryboardError(f"{storyboard.source}: its video is named {storyboard.name}, as is that of {other}")
        sources[storyboard.name] = storyboard.source
        length_of(storyboard, bundle.manifest.lengths)


def prepare_jobs(
    bundle: Bundle,
    storyboards: Iterable[Storyboard],
    settings: Settings,
    output_dir: Path,
    *,
    environment: dict[str, str],
    overwrite: bool = False,
) -> list[Job]:
    """One job for each storyboard. Nothing is written.

    Raises StoryboardError for a scene count without a graph or two videos of one name, ConfigError for settings out of
    range, OutputError for a folder that was begun with something else, or that cannot be written or would not fit.
    """
    manifest = bundle.manifest
    model = manifest.model
    storyboards = list(storyboards)
    check_inputs(bundle, storyboards, settings)
    settings = with_crf(settings)
    check_folder(output_dir)
    tokenizer = SceneTokenizer.from_file(bundle.path(TOKENIZER))
    made_by = BundleRecord(
        sha256=bundle.sha256,
        preset=model.name,
        ttt=model.transformer.ttt,
        dtype=manifest.dtype,
        quantize=manifest.stored_quantize,
    )
    jobs: dict[str, Job] = {}
    for storyboard in storyboards:
        length, ignored = length_of(storyboard, manifest.lengths), list[str]()
        if model.transformer.ttt_kind is None:
            storyboard, ignored = without_transitions(storyboard)
        record = RunRecord(
            length=length,
            scenes=storyboard.scenes,
            settings=settings,
            bundle=made_by,
            environment=environment,
            versions=_VERSIONS,
        )
        jobs[storyboard.name] = Job(
            storyboard=storyboard,
            record=record,
            truncations=tokenizer.encode(storyboard, model.text_lengths[length]).truncations,
            folder=output_dir / storyboard.name,
            latent_shape=(1, *latent_shape(model, model.clip_size(length))),
            overwrite=overwrite,
            ignored=tuple(ignored),
        )
        check_begin(jobs[storyboard.name].folder, record, overwrite=overwrite)
    for job in list(jobs.values())[:1]:
        check_space(job.folder, space_needed(bundle, jobs.values()))
    return list(jobs.values())


def graphs_needed(lengths: Iterable[str]) -> list[str]:
    """Every graph that rendering videos of these lengths loads."""
    transformers = dict.fromkeys(map(transformer_graph_name, lengths))
    return [TEXT_ENCODER, *transformers, VAE_FIRST, VAE_NEXT]


def space_needed(bundle: Bundle, jobs: Iterable[Job]) -> dict[str, int]:
    """Bytes that the folders of videos which are not done grow by at most, by what takes them.

    Texts and latents of all videos are on the disk at once, the states of one video at a time: two that are kept and
    the one being written. The mp4's size is an estimate.
    """
    model = bundle.manifest.model
    texts = latents = states = videos = 0
    for job in jobs:
        if is_done(job.folder) and not job.overwrite:
            continue
        size = model.clip_size(job.length)
        latent = 4 * int(np.prod(job.latent_shape))
        text = 4 * 2 * size.num_scenes * size.text_length * model.transformer.text_dim
        finished = (job.folder / LATENTS).exists()
        texts += 0 if finished else text - _size(job.folder / TEXT)
        latents += 0 if finished else latent
        held = sum(map(_size, states_in(job.folder).values()))
        arrays = 2 if job.settings.step_cache is None else 5  # of the latents' size, in a state
        states = max(states, 0 if finished else 3 * arrays * latent - held)
        videos += int(model.num_video_frames(size) * model.width * model.height * bits_per_pixel(job.settings) / 8)
    return {"texts": max(texts, 0), "states": states, "latents": latents, "videos": videos}


def in_shard(storyboard: Storyboard, index: int, count: int) -> bool:
    """Whether a video belongs to part `index`, 1 … `count`. It depends on its name and scenes alone."""
    content = msgspec.json.encode((storyboard.name, storyboard.scenes))
    return int.from_bytes(hashlib.sha256(content).digest()) % count == index - 1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
