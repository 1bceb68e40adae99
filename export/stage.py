"""The stage: the folder beside a bundle in which an export builds the next bundle. It survives an interrupted run."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct
from msgspec import field as struct_field

from ttt_video_engine.export.graphs.journal import journal_path
from ttt_video_engine.export.keys import Key, key_changes
from ttt_video_engine.export.swap import FINISHED, remove_files, replace_bundle, stage_folder
from ttt_video_engine.runtime.bundle import MANIFEST, TOKENIZER, Bundle, FileEntry, GraphEntry
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, link_or_copy, sha256_of, sync, sync_tree

_ENGINE_FILES = re.compile(r"engines/([^/]*\.engine(\.json)?|kernels/[^/]*\.(cubin|json))")
_EXPORT_FILES = re.compile(
    rf"{FINISHED}|{MANIFEST}|{TOKENIZER}|{_ENGINE_FILES.pattern}"
    r"|(text_encoder|transformer|vae_decoder)/[^/]*\.onnx(_data)?(\.journal)?"
    r"|([^/]*/)*\.[^/]*\.\d+\.partial(\.[^/]*)?"  # of an atomic_write that was killed
)
"""Names of the files that an export writes. An export never removes a file of any other name."""


class Finished(Struct, forbid_unknown_fields=True):
    """The finished files of a stage: graphs that passed the parity gate, and weight files, by name."""

    graphs: dict[str, GraphEntry] = struct_field(default_factory=dict)
    files: dict[str, FileEntry] = struct_field(default_factory=dict)
    weight_keys: dict[str, Key] = struct_field(default_factory=dict)


@dataclass
class Stage:
    """The files of the next bundle. Each is recorded when it is finished, so that a later export reuses it.

    Files of `previous`, the bundle at the output, are reused too. File names are relative to `root`.
    """

    root: Path
    finished: Finished
    previous: Bundle | None
    _verified: set[str] = field(default_factory=set)

    def has_weights(self, name: str, key: Key) -> bool:
        """Whether `find_weights` would return this file. Compares sizes, not contents; copies nothing."""
        entry = self.finished.files.get(name)
        in_stage = entry is not None and self.finished.weight_keys.get(name) == key and self._has_size(name, entry)
        return in_stage or self._previous_has_weights(name, key)

    def find_weights(self, name: str, key: Key) -> FileEntry | None:
        """The weight file of this name and key, from the stage or the previous bundle; None if neither has it."""
        entry = self.finished.files.get(name)
        if entry is not None and self.finished.weight_keys.get(name) == key and self._is_intact(name, entry):
            return entry
        return self.reuse_weights(name, key) if self._previous_has_weights(name, key) else None

    def reuse_weights(self, name: str, key: Key) -> FileEntry:
        """Reuses a weight file of the previous bundle and records it under `key`.

        Raises ValueError if there is no previous bundle.
        """
        if self.previous is None:
            raise ValueError(f"{name}: there is no previous bundle to reuse it from")
        self._reuse_file(name)
        return self.add_weights(name, key, self.previous.manifest.files[name])

    def prepare_file(self, name: str) -> Path:
        """The path to write a file to, in an existing folder.

        A partial file with a journal stays, so that writing it is resumed. Any other file is removed: it may be a hard
        link to a file of the previous bundle, which writing would change.
        """
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        if not journal_path(path).exists():
            path.unlink(missing_ok=True)
        return path

    def add_weights(self, name: str, key: Key, entry: FileEntry) -> FileEntry:
        """Records a weight file that is complete."""
        self.finished.files[name], self.finished.weight_keys[name] = entry, key
        self._record(name)
        return entry

    def find_graph(self, name: str, key: Key) -> GraphEntry | None:
        """The graph of this name and key, reused from the stage or the previous bundle; None if it must be built."""
        staged = self.finished.graphs.get(name)
        entry = None if staged is None else self.finished.files.get(staged.file)
        if staged is not None and staged.key == key and entry is not None and self._is_intact(staged.file, entry):
            return staged
        previous = None if self.previous is None else self.previous.manifest.graphs.get(name)
        if previous is None or key_changes(previous.key, key):
            return None
        self._reuse_file(previous.file)
        return self.add_graph(name, previous)

    def add_graph(self, name: str, entry: GraphEntry) -> GraphEntry:
        """Records a graph that is written and passed the parity gate."""
        path = self.root / entry.file
        self.finished.files[entry.file] = FileEntry(sha256_of(path), path.stat().st_size)
        self.finished.graphs[name] = entry
        self._record(entry.file)
        return entry

    def keep_only(self, names: Iterable[str]) -> dict[str, FileEntry]:
        """Removes the files that an export wrote here, except these and the engines. Returns the files that remain."""
        kept, entries = set(names), {}
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            name = path.relative_to(self.root).as_posix()
            if name in kept or _ENGINE_FILES.fullmatch(name):
                known = self.finished.files.get(name)
                entries[name] = known or FileEntry(sha256_of(path), path.stat().st_size)
            elif name != FINISHED and is_export_file(name):
                path.unlink()
        return entries

    def complete(self, manifest: bytes, output: Path) -> None:
        """Writes the manifest, syncs the stage to the disk, and replaces the bundle at `output` with it.

        Raises OutputError as `replace_bundle` does.
        """
        with atomic_write(self.root / MANIFEST) as partial:
            partial.write_bytes(manifest)
        sync_tree(self.root)
        replace_bundle(self.root, output)

    def suspend(self) -> int:
        """Ends an interrupted run. Returns the bytes that the next run can reuse; without any, removes the stage."""
        kept = [path for path in self.root.rglob("*") if path.is_file() and self._is_reusable(path)]
        if not kept:
            self.discard()
        return sum(path.stat().st_size for path in kept)

    def discard(self) -> None:
        """Removes the files that an export wrote, and the folder if nothing else is in it."""
        remove_files(self.root, is_export_file)

    def _previous_has_weights(self, name: str, key: Key) -> bool:
        return self.previous is not None and self.previous.manifest.weight_keys.get(name) == key

    def _reuse_file(self, name: str) -> None:
        """Links or copies a file of the previous bundle into the stage."""
        journal_path(self.root / name).unlink(missing_ok=True)
        target = self.prepare_file(name)
        if self.previous is not None:
            link_or_copy(self.previous.path(name), target)

    def _is_reusable(self, path: Path) -> bool:
        name = path.relative_to(self.root).as_posix()
        return name in self.finished.files or journal_path(path).exists() or path.suffix == ".engine"

    def _has_size(self, name: str, entry: FileEntry) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == entry.size

    def _is_intact(self, name: str, entry: FileEntry) -> bool:
        """Whether a file still has its recorded digest. Reads each file once per run."""
        if name not in self._verified and self._has_size(name, entry) and sha256_of(self.root / name) == entry.sha256:
            self._verified.add(name)
        return name in self._verified

    def _record(self, name: str) -> None:
        """Syncs a finished file to the disk, then the record of it."""
        sync(self.root / name)
        sync((self.root / name).parent)
        self._verified.add(name)
        _write_finished(self.root, self.finished)


def is_export_file(name: str) -> bool:
    """Whether a file of a stage, by its name, is one that an export writes."""
    return _EXPORT_FILES.fullmatch(name) is not None


@contextmanager
def export_lock(output: Path) -> Iterator[None]:
    """Locks `output` against other exports. Raises OutputError if another export holds the lock."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{output}: another export is writing it; wait for it to end, or stop it") from error
    try:
        yield
    finally:
        # The lock file is removed while it is locked. Another process may have opened it before: filelock (3.21 and
        # later) sees from the link count that the file was removed, and locks the new file instead.
        with suppress(OSError):  # some systems do not remove open files
            path.unlink()
        lock.release()


def open_stage(output: Path, previous: Bundle | None, report: Callable[[str], None]) -> Stage:
    """The stage for the bundle at `output`, with the files that an earlier run finished.

    Raises OutputError if the stage's folder exists and holds files that no export wrote.
    """
    root = stage_folder(output)
    root.mkdir(parents=True, exist_ok=True)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()]
    if FINISHED not in names and not all(map(is_export_file, names)):
        raise OutputError(f"{root}: the export needs this folder for unfinished files, but it holds others; move it")
    try:
        finished = msgspec.json.decode((root / FINISHED).read_bytes(), type=Finished)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        finished = Finished()
        _write_finished(root, finished)
    if finished.files:
        report(f"an interrupted export is resumed from {root.name}")
    return Stage(root, finished, previous)


def _write_finished(root: Path, finished: Finished) -> None:
    with atomic_write(root / FINISHED) as partial:
        partial.write_bytes(msgspec.json.encode(finished))
