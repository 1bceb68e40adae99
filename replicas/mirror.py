"""Folders of videos in local scratch, each with its copy in an object store.

A render works in scratch alone. After each step that is saved, its files go to the store, `video.json` last: the store
is what says that a video is done. A process on another machine fetches what the store has and goes on from there.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ttt_video_engine.replicas.store import Store
from ttt_video_engine.runtime.errors import ConfigError, OutputError, RenderBusy
from ttt_video_engine.runtime.events import (
    Event,
    PreviewWritten,
    StepDone,
    VideoDone,
    VideoFailed,
    VideoSkipped,
    VideoStarted,
    VideoStopped,
)
from ttt_video_engine.runtime.files import writing
from ttt_video_engine.runtime.render_folder import (
    CONTACT,
    PREVIEW,
    SIDECAR,
    VIDEO,
    claimed,
    clear,
    is_kept,
    kept_files,
    progress,
)
from ttt_video_engine.runtime.run_record import RECORD
from ttt_video_engine.runtime.step_state import HISTORY, is_state
from ttt_video_engine.runtime.user_cache import cache_folder

_NEVER_READ = (VIDEO, CONTACT, PREVIEW)
"""Products that nothing is resumed from."""
_OF_A_DONE_VIDEO = (RECORD, SIDECAR)
"""What a queue reads of a video that is done."""
_TRANSFERS = 16
"""Videos that are fetched at a time."""

E = TypeVar("E", bound=Event)


class Mirror:
    """Videos below a URI. `scratch` is the output folder to render in.

    It lies in the user's cache and has the URI as its path, so that processes of one machine share it, and its locks;
    a process that could not reach the store left there what it had done.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.scratch = _scratch(store.uri)
        self._there: dict[str, dict[str, int]] = {}
        """What the store has: sizes by video and name."""
        self._sent: dict[Path, tuple[int, int]] = {}
        self._begun: set[str] = set()

    def fetch(self, names: Iterable[str], *, overwrite: bool = False) -> None:
        """Brings scratch and store to what the further one of them has, for each video that no other process has.

        With `overwrite`, the videos are to be made anew, and nothing is fetched. Raises what `Store` does.
        """
        found = self._listed(list(names))
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            for _ in pool.map(lambda name: self._fetch(name, found[name], overwrite), found):
                pass

    def follow(self, event: Event) -> None:
        """An `on_event`: what it reports is in the store when this returns."""
        match event:
            case VideoStarted() | StepDone() | VideoStopped() | PreviewWritten() | VideoFailed():
                self._begun.add(event.video)
                self._push(event.video)
            case VideoDone():
                # Anew, as other processes may have left states there.
                self._there |= self._listed([event.video])
                self._push(event.video)
                self._drop(event.video)

    def finish(self) -> None:
        """Sends what a render that was stopped has saved after its last event."""
        for video in sorted(self._begun):
            self._push(video)

    def named(self, event: E) -> E:
        """The event as of the store: a URI in place of a path in scratch."""
        if isinstance(event, PreviewWritten | VideoDone | VideoSkipped):
            return replace(event, path=f"{self._store.uri}/{event.video}/{Path(event.path).name}")
        return event

    def _listed(self, videos: list[str]) -> dict[str, dict[str, int]]:
        """What the store has of these videos."""
        found: dict[str, dict[str, int]] = {video: {} for video in videos}
        for path, size in self._store.files(videos[0] if len(videos) == 1 else "").items():
            video, _, name = path.partition("/")
            if video in found and is_kept(name):
                found[video][name] = size
        return found

    def _push(self, video: str) -> None:
        """Makes the store's copy of a video equal to scratch. At no moment has it `video.json` without the rest."""
        there, here = self._there.setdefault(video, {}), kept_files(self.scratch / video)
        names = {path.name for path in here}
        if SIDECAR in names and VIDEO not in names:  # it was sent, and dropped
            return
        if SIDECAR in there and SIDECAR not in names:
            self._remove(video, SIDECAR)
        for path in here:
            try:
                mark = _mark(path)
                if self._sent.get(path) != mark:
                    self._store.upload(path, f"{video}/{path.name}")
            except FileNotFoundError:  # replaced by a newer one of another process of this machine
                continue
            self._sent[path] = mark
            there[path.name] = mark[0]
        for name in there.keys() - names:
            self._remove(video, name)

    def _fetch(self, video: str, there: dict[str, int], overwrite: bool) -> None:
        folder = self.scratch / video
        self._there[video] = there
        if overwrite or not (there or folder.is_dir()):
            return
        try:
            with claimed(folder):
                self._reconcile(video, folder, there)
        except RenderBusy:
            return  # by a process that keeps both equal

    def _reconcile(self, video: str, folder: Path, there: dict[str, int]) -> None:
        here = {path.name for path in kept_files(folder)}
        if here and not self._same_record(video, folder, there):
            clear(folder)  # of a render that the store no longer has
            here = set()
        if progress(there) > progress(here):
            clear(folder)
            done = SIDECAR in there
            for name in sorted(there, key=lambda name: (name == SIDECAR, name)):
                if (name in _OF_A_DONE_VIDEO) if done else (name not in _NEVER_READ):
                    with suppress(FileNotFoundError):  # removed since, by a process of another machine
                        self._store.download(f"{video}/{name}", folder / name, there[name])
        for path in kept_files(folder):
            if there.get(path.name) == path.stat().st_size:
                self._sent[path] = _mark(path)
        if SIDECAR in here and SIDECAR not in there:
            self._push(video)
            self._drop(video)
        elif SIDECAR in there:
            for name in list(there):
                if is_state(name) or name == HISTORY:  # of a process that ended between its last two calls
                    self._remove(video, name)

    def _same_record(self, video: str, folder: Path, there: dict[str, int]) -> bool:
        path = folder / RECORD
        if RECORD not in there or not path.exists() or path.stat().st_size != there[RECORD]:
            return False
        return path.read_bytes() == self._store.read(f"{video}/{RECORD}")

    def _drop(self, video: str) -> None:
        """Frees the disk of a video that is done and in the store, but for the files that say so."""
        for path in kept_files(self.scratch / video):
            if path.name not in _OF_A_DONE_VIDEO:
                with writing(path):
                    path.unlink(missing_ok=True)

    def _remove(self, video: str, name: str) -> None:
        self._store.remove(f"{video}/{name}")
        self._there[video].pop(name, None)
        self._sent.pop(self.scratch / video / name, None)


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _scratch(uri: str) -> Path:
    """The folder of a URI in the user's cache. Raises ConfigError for a URI that would leave it."""
    cache = cache_folder("scratch")
    if cache is None:
        raise OutputError(f"{uri}: needs a folder for its scratch, and this user has no home; set XDG_CACHE_HOME")
    protocol, _, path = uri.partition("://")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in uri:
        raise ConfigError(f"{uri}: has an empty part, or one that is . or ..; name a plain prefix")
    return cache.joinpath(protocol, *parts)
