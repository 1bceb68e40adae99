"""The folder beside a bundle in which its successor grows, and which outlives a run that was stopped."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct, field

from ttt_video_engine.export.graphs.journal import journal_of
from ttt_video_engine.export.keys import Key, differences
from ttt_video_engine.runtime.bundle import ENGINES, MANIFEST, Bundle, FileEntry, GraphEntry
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, link_or_copy, sha256_of

FINISHED = "finished.json"


class Finished(Struct, forbid_unknown_fields=True):
    """What is whole in a folder that is no bundle yet: graphs that passed the gate, and weight files by their names."""

    graphs: dict[str, GraphEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    weight_keys: dict[str, Key] = field(default_factory=dict)


@dataclass
class Stage:
    """What a run finished is noted as soon as it is, and taken over by the next; so is what the bundle before has."""

    root: Path
    finished: Finished
    previous: Bundle | None

    def weights(self, name: str, key: Key) -> FileEntry | None:
        """The weight file of this name and key, brought into the folder; None where there is none to be had."""
        here, there = self.finished, self.previous
        if name in here.files and here.weight_keys[name] == key and self._is_whole(name, here.files[name]):
            return here.files[name]
        if there is not None and there.manifest.weight_keys.get(name) == key:
            return self.reuse_weights(name, key)
        return None

    def reuse_weights(self, name: str, key: Key) -> FileEntry:
        """Brings a file of the previous bundle into the folder, as what was made from `key`."""
        if self.previous is None:
            raise ValueError(f"{name} is of no bundle")
        self._bring(name)
        return self.add_weights(name, key, self.previous.manifest.files[name])

    def place(self, name: str) -> Path:
        """Where to write a file. One that was begun is left there to be gone on with; any other may be a second name of
        the previous bundle's, which writing would change: it is let go."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        if not journal_of(path).exists():
            path.unlink(missing_ok=True)
        return path

    def add_weights(self, name: str, key: Key, entry: FileEntry) -> FileEntry:
        """Notes a weight file that is whole."""
        self.finished.files[name], self.finished.weight_keys[name] = entry, key
        self._note()
        return entry

    def graph(self, name: str, key: Key) -> GraphEntry | None:
        """The graph of this name and key, brought into the folder; None where it has to be built."""
        here = self.finished.graphs.get(name)
        if here is not None and here.key == key and self._is_whole(here.file, self.finished.files[here.file]):
            return here
        there = None if self.previous is None else self.previous.manifest.graphs.get(name)
        if self.previous is None or there is None or differences(there.key, key):
            return None
        self._bring(there.file)
        return self.add_graph(name, there)

    def add_graph(self, name: str, entry: GraphEntry) -> GraphEntry:
        """Notes a graph that is written and passed the gate."""
        path = self.root / entry.file
        self.finished.files[entry.file] = FileEntry(sha256_of(path), path.stat().st_size)
        self.finished.graphs[name] = entry
        self._note()
        return entry

    def keep_only(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Removes all but these files and the engines; what is left, by name."""
        kept, entries = set(names), {}
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            name = path.relative_to(self.root).as_posix()
            if name in kept or name.startswith(ENGINES):
                known = self.finished.files.get(name)
                entries[name] = known or FileEntry(sha256_of(path), path.stat().st_size)
            elif name != FINISHED:
                path.unlink()
        return entries

    def complete(self, manifest: bytes, output: Path) -> None:
        """Puts the folder, with its manifest, in the place of the bundle before."""
        (self.root / MANIFEST).write_bytes(manifest)
        retired = retired_folder(output)
        shutil.rmtree(retired, ignore_errors=True)
        if output.exists():
            os.replace(output, retired)
        os.replace(self.root, output)
        (output / FINISHED).unlink()  # not before: a kill before the renaming must not lose what it notes
        shutil.rmtree(retired, ignore_errors=True)

    def suspend(self) -> int:
        """Ends a run that did not get to the end: bytes that the next one need not write again."""
        kept = [path for path in self.root.rglob("*") if path.is_file() and self._is_of_use(path)]
        if not kept:
            self.discard()
        return sum(path.stat().st_size for path in kept)

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _bring(self, name: str) -> None:
        journal_of(self.root / name).unlink(missing_ok=True)
        target = self.place(name)
        if self.previous is not None:
            link_or_copy(self.previous.path(name), target)

    def _is_of_use(self, path: Path) -> bool:
        name = path.relative_to(self.root).as_posix()
        return name in self.finished.files or journal_of(path).exists() or path.suffix == ".engine"

    def _is_whole(self, name: str, entry: FileEntry) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == entry.size

    def _note(self) -> None:
        with atomic_write(self.root / FINISHED) as partial:
            partial.write_bytes(msgspec.json.encode(self.finished))


@contextmanager
def export_lock(output: Path) -> Iterator[None]:
    """Keeps others from exporting to `output`. Raises OutputError where another does."""
    path = output.absolute().with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{output}: another export is writing it; wait for that one, or stop it") from error
    try:
        yield
    finally:
        with suppress(OSError):  # where the system keeps a file that is open
            path.unlink()
        lock.release()


def open_stage(output: Path, previous: Bundle | None, report: Callable[[str], None]) -> Stage:
    """The stage of a bundle to be, with what an earlier run finished in it."""
    root = output.absolute().with_name(f".{output.name}.partial")
    try:
        finished = msgspec.json.decode((root / FINISHED).read_bytes(), type=Finished)
        report(f"going on with what an export that was stopped left in {root.name}")
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        finished = Finished()
    root.mkdir(parents=True, exist_ok=True)
    return Stage(root, finished, previous)


def retired_folder(output: Path) -> Path:
    """Where a bundle lies for the moment in which its successor takes its place."""
    return output.absolute().with_name(f".{output.name}.previous")
