"""A process that renders, made of paths, URIs and settings alone, so that it can be made on any machine."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from ttt_video_engine.commands.loaders import make_loader, make_pair_loader, make_sharded_loader
from ttt_video_engine.engines.onnxruntime import PROVIDERS, ProviderName, available_providers
from ttt_video_engine.engines.ort import ort
from ttt_video_engine.replicas.bundle_cache import fetch_bundle
from ttt_video_engine.replicas.mirror import Mirror
from ttt_video_engine.replicas.store import Store, Warn, is_uri, local_path
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, Bundle
from ttt_video_engine.runtime.demo_bundle import bundle_folder
from ttt_video_engine.runtime.errors import printable
from ttt_video_engine.runtime.events import Event, OnEvent, Outcome
from ttt_video_engine.runtime.jobs import Job
from ttt_video_engine.runtime.phases import RenderOptions
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.runner import RunnerLoader
from ttt_video_engine.runtime.settings import BackendName, Settings
from ttt_video_engine.runtime.storyboard import Storyboard
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.user_cache import cache_folder


@dataclass(frozen=True)
class Engine:
    """What runs the graphs, as the options name it."""

    name: BackendName = "onnxruntime"
    provider: ProviderName | None = None
    gpu_memory: str | None = None
    guidance_parallel: bool = False
    devices: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that it runs on, where there are any."""
        return 2 if self.guidance_parallel else 1

    def loader(self, bundle: Bundle, *, low_memory: bool) -> RunnerLoader:
        """Loads graphs of a bundle."""
        if self.guidance_parallel:
            return make_pair_loader(bundle, self.name, self.provider, self.gpu_memory)
        if self.devices > 1:
            return make_sharded_loader(bundle, self.name, self.provider, self.gpu_memory, self.devices)
        return make_loader(bundle, self.name, self.provider, self.gpu_memory, low_memory=low_memory)


@dataclass(frozen=True)
class Order:
    """What a replica is made from. `bundle` and `output` are paths or URIs."""

    bundle: str | None
    output: str
    settings: Settings
    engine: Engine
    options: RenderOptions

    def anywhere(self) -> "Order":
        """With absolute paths, for a process with another current folder."""
        bundle = None if self.bundle is None else _absolute(self.bundle)
        return replace(self, bundle=bundle, output=_absolute(self.output))


class Replica:
    """Renders with an opened bundle what an order states. `warn` is told that a store does not answer.

    Raises what `make_loader`, `Bundle.check` and stores do.
    """

    def __init__(self, bundle: Bundle, order: Order, warn: Warn) -> None:
        engine, output = order.engine, order.output
        loader = engine.loader(bundle, low_memory=order.settings.low_memory)
        bundle.check()
        self._settings, self._options = order.settings, order.options
        self._mirror = Mirror(Store(output, warn)) if is_uri(output) else None
        self._folder = self._mirror.scratch if self._mirror else local_path(output)
        self._pipeline = Pipeline(bundle, loader, cache=_text_cache(bundle, engine, loader.environment()))

    def prepare(self, boards: Iterable[Storyboard], *, overwrite: bool = False) -> list[Job]:
        """As `Pipeline.prepare`, with what an object store has of these videos in local scratch."""
        boards = list(boards)
        if self._mirror is not None:
            self._mirror.fetch((board.name for board in boards), overwrite=overwrite)
        return self._pipeline.prepare(boards, self._settings, self._folder, overwrite=overwrite)

    def run(self, jobs: list[Job], on_event: OnEvent) -> dict[str, Outcome]:
        """As `Pipeline.run`. What an event reports is in the object store, if there is one, when it is reported."""
        mirror = self._mirror
        if mirror is None:
            return self._pipeline.run(jobs, options=self._options, on_event=on_event)

        def sent(event: Event) -> None:
            mirror.follow(event)
            on_event(mirror.named(event))

        outcomes = self._pipeline.run(jobs, options=self._options, on_event=sent)
        mirror.finish()
        return {name: mirror.named(outcome) for name, outcome in outcomes.items()}


def warn_on_terminal(message: str) -> None:
    """Writes a line on standard error."""
    typer.echo(f"warning: {printable(message)}", err=True)


def local_bundle(place: str | None, warn: Warn) -> Path:
    """The folder of a bundle, which is fetched where `place` is a URI; that of the demo model where it is None."""
    if place is not None and is_uri(place):
        return fetch_bundle(Store(place, warn))
    return bundle_folder(None if place is None else local_path(place))


def _text_cache(bundle: Bundle, engine: Engine, environment: dict[str, str]) -> TextCache:
    """The cache of the texts that this engine has encoded: another's embeddings differ in the last bits."""
    provider = engine.provider
    providers = available_providers() if provider is None else PROVIDERS.get(provider, (provider,))
    runs_on = {
        "onnxruntime": " ".join((engine.name, ort.__version__, *providers)),
        "tensorrt": engine.name,
        "torch": " ".join(environment.get(name, "") for name in ("engine", "torch", "provider", "gpu")),
    }[engine.name]
    return TextCache(
        cache_folder("text"),
        f"{bundle.component_digest(TEXT_ENCODER)} {runs_on}",
        width=bundle.manifest.model.text_encoder.d_model,
        verify=lambda: bundle.verify_component(TEXT_ENCODER),
    )


def _absolute(place: str) -> str:
    return place if is_uri(place) else str(local_path(place).absolute())
