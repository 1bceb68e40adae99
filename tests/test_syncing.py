"""What claims to be complete is on the disk first: its bytes before its name, and its name in its folder after."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ttt_video_engine.export import swap
from ttt_video_engine.export.graphs.journal import Journal, journal_path
from ttt_video_engine.export.graphs.weights import lay_out, write_weights
from ttt_video_engine.export.stage import open_stage
from ttt_video_engine.reference.checkpoints.lazy import lazy_state
from ttt_video_engine.runtime.bundle import FileEntry
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, exchange, make_folder, sha256_of

Event = tuple[str, int, int]
"""(what, inode of what is synced or renamed, inode of the folder that it is renamed in)."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What was synced and what was renamed, in order."""
    noted: list[Event] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        noted.append(("sync", os.fstat(descriptor).st_ino, 0))

    def replace(source: Path, target: Path) -> None:
        inode = os.stat(source).st_ino
        real_replace(source, target)
        noted.append(("rename", inode, os.stat(Path(target).parent).st_ino))

    def swapped(first: Path, second: Path) -> bool:
        inode = os.stat(first).st_ino
        done = exchange(first, second)
        noted.append(("rename", inode, os.stat(second.parent).st_ino))
        return done

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(swap, "exchange", swapped)
    return noted


def assert_synced(events: list[Event], renames: int) -> None:
    found = [number for number, (what, *_) in enumerate(events) if what == "rename"]
    assert len(found) >= renames
    for number in found:
        _, inode, folder = events[number]
        assert ("sync", inode, 0) in events[:number], "its bytes before its name"
        assert ("sync", folder, 0) in events[number:], "its name after"


def failing(inode: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the disk fail for one file or folder."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == inode():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path: Path, events: list[Event]) -> None:
    with atomic_write(tmp_path / "new" / "file.json") as partial:
        partial.write_text("content")
    assert_synced(events, 1)


def test_a_new_folder_is_in_its_parent_before_anything_is_in_it(tmp_path: Path, events: list[Event]) -> None:
    make_folder(tmp_path / "a/b/c")
    synced = [inode for _, inode, _ in events]
    assert synced == [(tmp_path / path).stat().st_ino for path in (".", "a", "a/b")]
    make_folder(tmp_path / "a/b/c")
    assert len(events) == 3


def test_a_journal_is_synced_after_the_bytes_that_it_speaks_of(tmp_path: Path, events: list[Event]) -> None:
    path = tmp_path / "weights"
    with path.open("w+b") as out:
        out.write(b"content")
        Journal(path, {}).record(out, 7, "")
    assert events[0] == ("sync", path.stat().st_ino, 0)
    assert_synced(events, 1)


def test_what_is_noted_as_finished_is_on_the_disk(tmp_path: Path, events: list[Event]) -> None:
    stage = open_stage(tmp_path / "bundle", None, lambda line: None)
    path = stage.prepare_file("text_encoder/model.onnx_data")
    path.write_bytes(b"weights")
    events.clear()
    stage.add_weights("text_encoder/model.onnx_data", {}, FileEntry(sha256_of(path), 7))
    assert events[0] == ("sync", path.stat().st_ino, 0)
    assert_synced(events, 1)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_bundle_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[Event], replaces: bool) -> None:
    output = tmp_path / "bundle"
    if replaces:
        output.mkdir()
    stage = open_stage(output, None, lambda line: None)
    names = ("transformer/model.onnx_data", "transformer/model-9s.onnx", "engines/kernels/a.cubin")
    for name in names:
        (stage.root / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.root / name).write_text(name)
    events.clear()
    stage.complete(b"{}", output)
    assert_synced(events, 2)
    named = next(number for number, event in enumerate(events) if event[:2] == ("rename", output.stat().st_ino))
    synced = {inode for what, inode, _ in events[:named] if what == "sync"}
    paths = [output / name for name in (*names, "bundle.json")]
    folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(output)}
    assert {path.stat().st_ino for path in (*paths, *folders)} <= synced


def test_a_disk_that_fails_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.json"
    inodes: list[int] = []
    failing(lambda: inodes[0], monkeypatch)
    with pytest.raises(OutputError, match=r"file\.json: .*Input/output error") as raised, atomic_write(target) as part:
        part.write_text("content")
        inodes.append(part.stat().st_ino)
    assert raised.value.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(lambda: tmp_path.stat().st_ino, monkeypatch)
    with pytest.raises(OutputError, match="Input/output error"), atomic_write(tmp_path / "file.json") as partial:
        partial.write_text("content")


def test_weights_that_cannot_be_synced_are_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, path = lazy_state({"a": torch.ones(3)}), tmp_path / "weights"
    file = lay_out(state, path, torch.float32)
    failing(lambda: path.stat().st_ino, monkeypatch)
    with pytest.raises(OutputError, match=r"weights: .*Input/output error"):
        write_weights(state, file, torch.float32, {})
    assert not journal_path(path).exists()
