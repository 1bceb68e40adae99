"""From storyboards to folders with an mp4 each: one component in memory at a time, frames straight into the file.

The pipeline is handed a loader for engines and does not know what runs them. What it makes depends on the storyboards,
the bundle and the settings alone. The same call resumes a render, whatever ended it.

    bundle = open_bundle(Path("bundles/tiny"))
    pipeline = Pipeline(bundle, OnnxRuntimeLoader(bundle))
    outcomes = pipeline.render(load_storyboards(Path("kitchen.json")), Settings(), Path("videos"), on_event=print)
"""

import traceback
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import ConfigError, OutputError, RenderBusy
from ttt_video_engine.runtime.events import (
    Event,
    OnEvent,
    Outcome,
    StopRendering,
    TextEncoded,
    VideoBusy,
    VideoFailed,
    VideoSkipped,
)
from ttt_video_engine.runtime.jobs import Job, graphs_needed, prepare_jobs
from ttt_video_engine.runtime.phases import Phase, Queue, RenderOptions, decode_video, encode_text, run_steps
from ttt_video_engine.runtime.render_folder import VIDEO, claimed, is_done, note_failure
from ttt_video_engine.runtime.runner import RunnerLoader
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.stages import Load, kept_loaded
from ttt_video_engine.runtime.storyboard import Storyboard, length_of
from ttt_video_engine.runtime.text_cache import TextCache


class Pipeline:
    """Renders storyboards with the graphs of a bundle.

    `load` gives the graphs to run. `cache` keeps embeddings from call to call; None keeps them for the videos of one
    call only.
    """

    def __init__(
        self,
        bundle: Bundle,
        load: RunnerLoader,
        *,
        cache: TextCache | None = None,
    ) -> None:
        self._bundle, self._load = bundle, load
        self._cache = cache or TextCache(None, "")

    def prepare(
        self, storyboards: Iterable[Storyboard], settings: Settings, output_dir: Path, *, overwrite: bool = False
    ) -> list[Job]:
        """One job for each storyboard, with everything checked that can be. Nothing is written.

        Raises what `prepare_jobs` raises, and what the loader does for a graph that it cannot load.
        """
        storyboards = list(storyboards)
        lengths = [length_of(storyboard, self._bundle.manifest.lengths) for storyboard in storyboards]
        self._load.check(graphs_needed(lengths))
        environment = self._load.environment()
        return prepare_jobs(
            self._bundle, storyboards, settings, output_dir, environment=environment, overwrite=overwrite
        )

    def render(
        self,
        storyboards: Iterable[Storyboard],
        settings: Settings,
        output_dir: Path,
        *,
        options: RenderOptions | None = None,
        on_event: OnEvent | None = None,
    ) -> dict[str, Outcome]:
        """`prepare`, then `run`. Returns the outcome of each video, by name."""
        return self.run(self.prepare(storyboards, settings, output_dir), options=options, on_event=on_event)

    def run(
        self,
        jobs: list[Job],
        *,
        options: RenderOptions | None = None,
        on_event: OnEvent | None = None,
    ) -> dict[str, Outcome]:
        """Returns the outcome of each video, by name. A video that fails is an outcome; the others continue.

        `on_event` is called in this thread, after what it reports is on the disk. It may raise StopRendering: the next
        call then resumes the videos without an outcome. Any other exception ends the call too, and is raised.
        """
        options = options or RenderOptions()
        _check_options(options)
        outcomes: dict[str, Outcome] = {}

        def emit(event: Event) -> None:
            if isinstance(event, Outcome):
                outcomes[event.video] = event
            try:
                if on_event is not None:
                    on_event(event)
            except Exception as error:
                raise _CallerFailed(error) from error

        queue = Queue(self._bundle, self._load, self._cache, options, emit)
        of_caller: Exception | None = None
        try:
            _Run(queue, outcomes).all_phases(jobs)
        except StopRendering:
            pass
        except _CallerFailed as failed:
            of_caller = failed.error
        if of_caller is not None:  # raised here, as its carrier, which has it for a cause, must not become its context
            raise of_caller
        return outcomes


class _CallerFailed(BaseException):
    """Carries what `on_event` raised past everything that handles the failures of a video."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Run:
    """One call of `Pipeline.run`. Videos with an outcome are left alone, those of other processes asked for again."""

    def __init__(self, queue: Queue, outcomes: Mapping[str, Outcome]) -> None:
        self._queue, self._outcomes = queue, outcomes
        self._busy: dict[str, str] = {}

    def all_phases(self, jobs: list[Job]) -> None:
        for job in jobs:
            if is_done(job.folder) and not job.overwrite:
                self._queue.emit(VideoSkipped(job.name, job.folder / VIDEO))
        jobs = [job for job in jobs if job.name not in self._outcomes]
        self._phase("text", encode_text, jobs)
        for length in dict.fromkeys(job.length for job in jobs):
            self._phase("denoise", run_steps, [job for job in jobs if job.length == length])
        self._phase("decode", decode_video, jobs)
        for job in jobs:
            if job.name not in self._outcomes:
                self._queue.emit(self._of_another(job))

    def _phase(self, stage: str, work: Phase, jobs: list[Job]) -> None:
        """A stage of every video. The text encoder and the transformer stay loaded from one to the next.

        The decoder does not: it has two graphs, which run in turn, and would take the working memory of both. Its
        weights are 1 % of a model's, so that loading it again takes little of the time of a video.
        """
        load = self._queue.load
        graphs_of_stage: AbstractContextManager[Load] = nullcontext(load) if stage == "decode" else kept_loaded(load)
        with graphs_of_stage as graphs:
            for done, job in enumerate(jobs, start=1):
                if job.name in self._outcomes:
                    continue
                try:
                    with claimed(job.folder, begun=stage != "text") as claim:
                        try:
                            work(self._queue, job, graphs, claim)
                        except Exception as error:
                            self._failed(job, stage, error)
                except RenderBusy as busy:
                    self._busy[job.name] = str(busy)
                except Exception as error:
                    self._failed(job, stage, error)
                if stage == "text":
                    self._queue.emit(TextEncoded(job.name, done, len(jobs)))

    def _failed(self, job: Job, stage: str, error: Exception) -> None:
        with suppress(OutputError, OSError):  # such as a full disk, which is the failure itself
            note_failure(job.folder, stage, error)
        _free_frames(error)
        self._queue.emit(VideoFailed(job.name, stage, error))

    def _of_another(self, job: Job) -> Outcome:
        if is_done(job.folder):
            return VideoSkipped(job.name, job.folder / VIDEO)
        return VideoBusy(job.name, self._busy.get(job.name, f"{job.folder}: is being rendered by another process"))


def _free_frames(error: BaseException | None) -> None:
    """Frees the arrays and runners that the traceback of an error refers to, and keeps the traceback."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _check_options(options: RenderOptions) -> None:
    for name in ("checkpoint_every", "stop_after", "preview_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value!r}: must be at least 1")
