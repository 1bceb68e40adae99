"""A new bundle in the place of an old one: killed at any moment, and with files of the user's in the folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ttt_video_engine.export import swap
from ttt_video_engine.export.stage import Stage, export_lock, open_stage
from ttt_video_engine.export.swap import FINISHED, finish_replacement, stage_folder
from ttt_video_engine.runtime import bundle as bundles
from ttt_video_engine.runtime.bundle import MANIFEST, encode_manifest, open_bundle
from ttt_video_engine.runtime.errors import OutputError

THEIRS = {
    "videos/bear/video.mp4": "a bear",
    "videos/.hidden": "hidden",
    "transformer/notes.txt": "notes",
    "engines/old/readme": "their own folder of engines",
    "thesis.tex": "a thesis",
}
"""Files of a user's in the folder of a bundle, by their names."""

STEPS = [(os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (swap, "exchange")]
"""What changes names on the disk."""


class Killed(BaseException):
    """What ends a run at a place of our choice."""


@pytest.fixture(params=["exchanged", "renamed"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that can swap two names, and one that cannot."""
    if request.param == "renamed":
        monkeypatch.setattr(swap, "exchange", lambda first, second: False)
    return str(request.param)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def add_theirs(folder: Path) -> None:
    for name, text in THEIRS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "link").symlink_to("nowhere")
    (folder / "empty").mkdir()


def assert_theirs(folder: Path) -> None:
    assert {name: (folder / name).read_text() for name in THEIRS} == THEIRS
    assert os.readlink(folder / "link") == "nowhere" and (folder / "empty").is_dir()


def complete(bundle: Path, *, tool: str) -> None:
    """Replaces a bundle by one that was made with another tool."""
    before = open_bundle(bundle)
    stage = open_stage(bundle, before, lambda line: None)
    for name, entry in before.manifest.files.items():
        stage.prepare_file(name).parent.mkdir(exist_ok=True)
        if not (stage.root / name).exists():
            os.link(before.path(name), stage.root / name)
        stage.finished.files[name] = entry
    stage.complete(encode_manifest(replace(before.manifest, tools={"tool": tool})), bundle)


def tool_of(bundle: Path) -> str:
    """As `sample` opens a bundle."""
    opened = open_bundle(bundle)
    opened.check()
    return opened.manifest.tools.get("tool", "old")


def killing(patch: pytest.MonkeyPatch, at: int, *, after: bool) -> list[str]:
    """Ends the run before or after the step of this number; the names of the steps that were reached."""
    reached: list[str] = []

    def wrapped(module: Any, name: str) -> Callable[..., object]:
        real = getattr(module, name)

        def step(*arguments: Any, **options: Any) -> object:
            if len(reached) > at:  # it is dead; what `finally` does would not be done
                raise Killed
            reached.append(name)
            done = real(*arguments, **options) if after or len(reached) <= at else None
            if len(reached) > at:
                raise Killed
            return done

        return step

    for module, name in STEPS:
        patch.setattr(module, name, wrapped(module, name))
    return reached


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_leaves_a_bundle_and_all_files(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, system: str, after: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses no bytes; this is about names
    monkeypatch.setattr(bundles, "check_external_data", lambda *arguments: None)
    add_theirs(bundle)
    at, tool = 0, ""
    while True:
        tool = f"of kill {at}"
        with monkeypatch.context() as patch:
            reached = killing(patch, at, after=after)
            try:
                complete(bundle, tool=tool)
                break
            except Killed:
                pass
        assert tool_of(bundle) in (tool, f"of kill {at - 1}", "old"), (at, reached)
        finish_replacement(bundle)
        assert tool_of(bundle) in (tool, f"of kill {at - 1}", "old"), (at, reached)
        assert_theirs(bundle)
        complete(bundle, tool=tool)
        assert tool_of(bundle) == tool
        assert_theirs(bundle)
        assert os.listdir(bundle.parent) == ["bundle"] and not (bundle / FINISHED).exists()
        at += 1
    assert at > 5 and ("exchange" in reached) and tool_of(bundle) == tool


def test_files_of_others_stay_and_files_of_the_old_bundle_go(bundle: Path, system: str) -> None:
    add_theirs(bundle)
    manifest = open_bundle(bundle).manifest
    stale = "engines/transformer-9s.bfloat16.tensorrt_rtx-1.7.sm_89.plan"
    (bundle / stale).parent.mkdir(exist_ok=True)
    (bundle / stale).write_text("of a program before this one")
    entry = manifest.files["tokenizer/tokenizer.json"]
    (bundle / MANIFEST).write_bytes(encode_manifest(replace(manifest, files={**manifest.files, stale: entry})))
    stage = open_stage(bundle, None, lambda line: None)
    for name in manifest.files:
        os.link(bundle / name, stage.prepare_file(name))
    stage.complete(encode_manifest(manifest), bundle)
    assert tool_of(bundle) == "old" and not (bundle / stale).exists()
    assert_theirs(bundle)
    assert os.listdir(bundle.parent) == ["bundle"]


def test_a_file_of_another_in_the_place_of_a_new_one_is_named(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    theirs = bundle / "transformer/model-9s.onnx"
    files = {name: entry for name, entry in manifest.files.items() if name != "transformer/model-9s.onnx"}
    (bundle / MANIFEST).write_bytes(encode_manifest(replace(manifest, files=files)))
    content = theirs.read_bytes()
    stage = open_stage(bundle, None, lambda line: None)
    stage.prepare_file("transformer/model-9s.onnx").write_text("new")
    with pytest.raises(OutputError, match=r"transformer/model-9s\.onnx: .*move"):
        stage.complete(encode_manifest(manifest), bundle)
    assert theirs.read_bytes() == content and (stage.root / FINISHED).is_file()


@pytest.mark.parametrize("name", [".bundle.partial", ".bundle.previous"])
def test_folders_beside_that_are_of_no_export_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "cat.jpg").write_text("a cat")
    with pytest.raises(OutputError, match=f"{name}: .*move"):
        finish_replacement(tmp_path / "bundle")
        open_stage(tmp_path / "bundle", None, lambda line: None)
    assert (tmp_path / name / "cat.jpg").read_text() == "a cat"


def test_only_what_an_export_wrote_is_removed_from_its_stage(tmp_path: Path) -> None:
    def filled() -> Stage:
        stage = open_stage(tmp_path / "bundle", None, lambda line: None)
        for name in ("transformer/.part.model-9s.onnx", "text_encoder/model.onnx_data", "engines/a.engine"):
            stage.prepare_file(name).write_text("of an export")
        for name in ("transformer/notes.txt", "cat.jpg"):
            (stage.root / name).write_text("theirs")
        return stage

    stage = filled()
    assert list(stage.keep_only(["text_encoder/model.onnx_data"])) == [
        "engines/a.engine",
        "text_encoder/model.onnx_data",
    ]
    theirs = {"transformer/notes.txt", "cat.jpg"}
    assert files_in(stage.root) == {"engines/a.engine", "text_encoder/model.onnx_data", FINISHED, *theirs}
    stage = filled()
    stage.discard()
    assert files_in(stage.root) == theirs


def test_names_in_a_manifest_that_lead_out_remove_nothing(bundle: Path) -> None:
    """What is removed is found in the folder; a manifest from elsewhere may name anything."""
    outside = bundle.parent / "outside"
    outside.write_text("theirs")
    (bundle / "away").symlink_to(bundle.parent)
    manifest = open_bundle(bundle).manifest
    entry = manifest.files["tokenizer/tokenizer.json"]
    files = {**manifest.files, "../outside": entry, "away/outside": entry}
    (bundle / MANIFEST).write_bytes(encode_manifest(replace(manifest, files=files)))
    stage = open_stage(bundle, None, lambda line: None)
    for name in manifest.files:
        os.link(bundle / name, stage.prepare_file(name))
    stage.complete(encode_manifest(manifest), bundle)
    assert outside.read_text() == "theirs" and (bundle / "away").is_symlink()


def test_a_lock_that_was_let_go_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process opens the lock's file, and before it locks it the holder lets it go: it must lock the file of now."""
    import fcntl

    bundle, lock = tmp_path / "bundle", tmp_path / ".bundle.lock"
    real, calls = fcntl.flock, list[int]()

    def flock(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            lock.unlink()
        real(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        try:
            with export_lock(bundle):
                assert lock.exists()
        except OutputError:
            pass  # said to be held, which it was when this process came
    assert stage_folder(bundle).exists() is False
    with export_lock(bundle), pytest.raises(OutputError, match="another export"), export_lock(bundle):
        pass
