"""The folder beside a bundle in which its successor grows, and which outlives a run that was stopped."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct
from msgspec import field as struct_field

from ttt_video_engine.export.graphs.journal import journal_of
from ttt_video_engine.export.keys import Key, differences
from ttt_video_engine.export.swap import FINISHED, remove_files, replace_bundle, stage_folder
from ttt_video_engine.runtime.bundle import MANIFEST, TOKENIZER, Bundle, FileEntry, GraphEntry
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, link_or_copy, sha256_of, sync, sync_tree

_ENGINE = re.compile(r"engines/([^/]*\.engine(\.json)?|kernels/[^/]*\.(cubin|json))")
_WRITTEN = re.compile(
    rf"{FINISHED}|{MANIFEST}|{TOKENIZER}|{_ENGINE.pattern}"
    r"|(text_encoder|transformer|vae_decoder)/[^/]*\.onnx(_data)?(\.journal)?"
    r"|([^/]*/)*\.[^/]*\.\d+\.partial(\.[^/]*)?"  # of an atomic_write that was killed
)
"""Names of files that an export writes. A file of any other name is not its own: it is never removed."""


class Finished(Struct, forbid_unknown_fields=True):
    """What is whole in a folder that is no bundle yet: graphs that passed the gate, and weight files by their names."""

    graphs: dict[str, GraphEntry] = struct_field(default_factory=dict)
    files: dict[str, FileEntry] = struct_field(default_factory=dict)
    weight_keys: dict[str, Key] = struct_field(default_factory=dict)


@dataclass
class Stage:
    """What a run finished is noted as soon as it is, and taken over by the next; so is what the bundle before has."""

    root: Path
    finished: Finished
    previous: Bundle | None
    _verified: set[str] = field(default_factory=set)

    def has_weights(self, name: str, key: Key) -> bool:
        """Whether `weights` would find this file, its bytes aside: nothing is read and nothing is brought."""
        entry, there = self.finished.files.get(name), self.previous
        here = entry is not None and self.finished.weight_keys.get(name) == key and self._has_size(name, entry)
        return here or (there is not None and there.manifest.weight_keys.get(name) == key)

    def weights(self, name: str, key: Key) -> FileEntry | None:
        """The weight file of this name and key, brought into the folder; None where there is none to be had."""
        entry, there = self.finished.files.get(name), self.previous
        if entry is not None and self.finished.weight_keys.get(name) == key and self._is_whole(name, entry):
            return entry
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
        """Where to write a file. One that was begun is left there to be resumed; any other may be a second name of
        the previous bundle's, which writing would change: it is let go."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        if not journal_of(path).exists():
            path.unlink(missing_ok=True)
        return path

    def add_weights(self, name: str, key: Key, entry: FileEntry) -> FileEntry:
        """Notes a weight file that is whole."""
        self.finished.files[name], self.finished.weight_keys[name] = entry, key
        self._note(name)
        return entry

    def graph(self, name: str, key: Key) -> GraphEntry | None:
        """The graph of this name and key, brought into the folder; None where it has to be built."""
        here = self.finished.graphs.get(name)
        entry = None if here is None else self.finished.files.get(here.file)
        if here is not None and here.key == key and entry is not None and self._is_whole(here.file, entry):
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
        self._note(entry.file)
        return entry

    def keep_only(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Removes what an export wrote here, but these files and the engines; what is left of it, by name."""
        kept, entries = set(names), {}
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            name = path.relative_to(self.root).as_posix()
            if name in kept or _ENGINE.fullmatch(name):
                known = self.finished.files.get(name)
                entries[name] = known or FileEntry(sha256_of(path), path.stat().st_size)
            elif name != FINISHED and is_written(name):
                path.unlink()
        return entries

    def complete(self, manifest: bytes, output: Path) -> None:
        """Puts the folder, with its manifest and all of it on the disk, in the place of the bundle before."""
        with atomic_write(self.root / MANIFEST) as partial:
            partial.write_bytes(manifest)
        sync_tree(self.root)
        replace_bundle(self.root, output)

    def suspend(self) -> int:
        """Ends a run that did not get to the end: bytes that the next one need not write again."""
        kept = [path for path in self.root.rglob("*") if path.is_file() and self._is_of_use(path)]
        if not kept:
            self.discard()
        return sum(path.stat().st_size for path in kept)

    def discard(self) -> None:
        """Removes the folder, or what an export wrote in it where there is more."""
        remove_files(self.root, is_written)

    def _bring(self, name: str) -> None:
        journal_of(self.root / name).unlink(missing_ok=True)
        target = self.place(name)
        if self.previous is not None:
            link_or_copy(self.previous.path(name), target)

    def _is_of_use(self, path: Path) -> bool:
        name = path.relative_to(self.root).as_posix()
        return name in self.finished.files or journal_of(path).exists() or path.suffix == ".engine"

    def _has_size(self, name: str, entry: FileEntry) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == entry.size

    def _is_whole(self, name: str, entry: FileEntry) -> bool:
        """Whether a file still has the bytes that were noted; each is read once a run."""
        if name not in self._verified and self._has_size(name, entry) and sha256_of(self.root / name) == entry.sha256:
            self._verified.add(name)
        return name in self._verified

    def _note(self, name: str) -> None:
        """Puts on the disk that the file of this name is finished, once it is there itself."""
        sync(self.root / name)
        sync((self.root / name).parent)
        self._verified.add(name)
        _write(self.root, self.finished)


def is_written(name: str) -> bool:
    """Whether a file in a stage is an export's own, by its name."""
    return _WRITTEN.fullmatch(name) is not None


@contextmanager
def export_lock(output: Path) -> Iterator[None]:
    """Keeps others from exporting to `output`. Raises OutputError where another does."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{output}: another export is writing it; wait for that one, or stop it") from error
    try:
        yield
    finally:
        # The file goes while it is locked. Another process may have opened it before: filelock, from 3.21, tells by
        # the number of its names that it has gone, and locks the file that is there then.
        with suppress(OSError):  # where the system keeps a file that is open
            path.unlink()
        lock.release()


def open_stage(output: Path, previous: Bundle | None, report: Callable[[str], None]) -> Stage:
    """The stage of a bundle to be, with what an earlier run finished in it.

    Raises OutputError where a folder that is not of an export has its name.
    """
    root = stage_folder(output)
    root.mkdir(parents=True, exist_ok=True)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()]
    if FINISHED not in names and not all(map(is_written, names)):
        raise OutputError(f"{root}: is where an export keeps what it has finished, and holds other files; move it away")
    try:
        finished = msgspec.json.decode((root / FINISHED).read_bytes(), type=Finished)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        finished = Finished()
        _write(root, finished)
    if finished.files:
        report(f"going on with what an export that was stopped left in {root.name}")
    return Stage(root, finished, previous)


def _write(root: Path, finished: Finished) -> None:
    with atomic_write(root / FINISHED) as partial:
        partial.write_bytes(msgspec.json.encode(finished))
