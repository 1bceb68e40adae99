"""Where a bundle may be made, what of another's stays, what of a stopped export is believed, and what a check does."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ttt_video_engine.export import build
from ttt_video_engine.export import stage as stages
from ttt_video_engine.export.build import ExportOptions, export_bundle
from ttt_video_engine.export.graphs.weights import lay_out
from ttt_video_engine.export.sources.source import Component, SeededSource
from ttt_video_engine.export.stage import open_stage
from ttt_video_engine.reference.checkpoints.lazy import LazyTensor, lazy_state
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.runtime import bundle as bundles
from ttt_video_engine.runtime import files
from ttt_video_engine.runtime.bundle import MANIFEST, open_bundle, retired_folder
from ttt_video_engine.runtime.errors import BundleError, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.presets import tiny

Run = Callable[..., tuple[int, str, str]]
Digests = Callable[[Path], dict[str, str]]
SEEDED = SeededSource(tiny("linear"), seed=0)


class OtherTextEncoder(SeededSource):
    """The shared bundle's model with a text encoder of another seed."""

    def text_encoder(self) -> Component[TextEncoder]:
        return SeededSource(self.model, self.seed + 1).text_encoder()


OTHER = OtherTextEncoder(tiny("linear"), seed=0)


def silent(line: str) -> None:
    pass


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an export gets as far as to describe its components."""

    def fail(source: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(build, "components_of", fail)


# Where


def test_a_place_that_cannot_be_replaced_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_work(monkeypatch)
    here, mount, bound, loop = (tmp_path / name for name in ("here", "mount", "bound", "loop"))
    (here / "inside").mkdir(parents=True)
    mount.mkdir()
    bound.mkdir()
    loop.symlink_to(loop)
    monkeypatch.chdir(here / "inside")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    monkeypatch.setattr(files, "_mount_points", lambda: {str(bound)})
    for place, why in {
        ".": "current folder",
        "..": "current folder",
        str(here): "current folder",
        str(mount): "mount point",
        str(bound): "mount point",
        str(loop): "",
    }.items():
        code, out, err = run("export", "--output", place)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {place}: ") and why in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bound", "here", "inside", "loop", "mount"]


def test_the_root_is_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_work(monkeypatch)
    with pytest.raises(OutputError, match=r"^/: "):
        export_bundle(SEEDED, Path("/"), ["9s"], "float32", silent)


def test_a_link_to_a_bundle_stays_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "link"
    link.parent.mkdir()
    link.symlink_to(bundle)
    before = open_bundle(bundle).manifest
    export_bundle(OTHER, link, ["9s"], "float32", silent)
    assert link.readlink() == bundle and os.listdir(link.parent) == ["link"]
    assert open_bundle(bundle).manifest != before
    assert sorted(os.listdir(tmp_path)) == ["bundle", "links"]


# What is another's


def test_an_export_keeps_what_is_not_of_the_bundle(bundle: Path) -> None:
    theirs = {"videos/bear/video.mp4": "a bear", "transformer/notes.txt": "notes"}
    for name, text in theirs.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(text)
    for source in (OTHER, OTHER):  # the second finds nothing changed
        export_bundle(source, bundle, ["9s"], "float32", silent)
        assert {name: (bundle / name).read_text() for name in theirs} == theirs
    opened = open_bundle(bundle)
    opened.verify()
    assert not opened.manifest.files.keys() & theirs.keys()


@pytest.mark.parametrize("content", ['{"name": "a bundle of javascript"}', "[]", "{", '{"files": {}}'])
def test_a_bundle_json_of_another_program_is_not_ours(
    tmp_path: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / MANIFEST).write_text(content)
    (folder / "thesis.tex").write_text("a thesis")
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="site: exists and is not a bundle"):
        export_bundle(SEEDED, folder, ["9s"], "float32", silent)
    assert digests(tmp_path) == before


def test_a_bundle_that_was_put_aside_is_opened(bundle: Path) -> None:
    """The moment between the two renames, where the system cannot swap two names."""
    bundle.rename(retired_folder(bundle))
    opened = open_bundle(bundle)
    opened.check()
    assert not bundle.exists()


# What is believed


def test_damage_of_the_same_size_is_not_resumed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.Stage, "keep_only", stop)
        export_bundle(OTHER, bundle, ["9s"], "float32", silent)
    stage = bundle.with_name(".bundle.partial")
    for name in ("text_encoder/model.onnx_data", "text_encoder/model.onnx"):
        content = bytearray((stage / name).read_bytes())
        content[len(content) // 2] ^= 1
        (stage / name).unlink()  # it may be a second name of the bundle's
        (stage / name).write_bytes(content)
    lines: list[str] = []
    export_bundle(OTHER, bundle, ["9s"], "float32", lines.append).verify()
    assert [line for line in lines if line.endswith("bytes of weights")] != []


def test_what_is_resumed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformer/model.onnx_data"
    stage = open_stage(tmp_path / "bundle", None, silent)
    stage.prepare_file(name).write_bytes(b"weights")
    stage.add_weights(name, {}, bundles.FileEntry(sha256_of(stage.root / name), 7))
    read: list[Path] = []

    def noted(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr(stages, "sha256_of", noted)
    resumed = open_stage(tmp_path / "bundle", None, silent)
    assert resumed.has_weights(name, {}) and read == []
    assert resumed.find_weights(name, {}) == resumed.find_weights(name, {}) != None  # noqa: E711
    assert len(read) == 1


# What checks


def state_of(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_nlink, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found.items()}


def test_a_check_of_a_copy_changes_nothing_and_is_done_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(bundle / "transformer/model.onnx_data")
    before, read = state_of(bundle), list[str]()

    def noted(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(bundles, "sha256_of", noted)
    open_bundle(bundle).check()
    assert state_of(bundle) == before and read == ["model.onnx_data"]
    open_bundle(bundle).check()
    assert read == ["model.onnx_data"]
    path = bundle / "transformer/model.onnx_data"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleError, match="has changed since the export"):
        open_bundle(bundle).check()


def test_a_check_for_space_changes_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = bundle.with_name(".bundle.partial")
    found: list[set[str]] = []
    monkeypatch.setattr(
        build, "check_space", lambda *_: found.append({path.name for path in stage.rglob("*") if path.is_file()})
    )
    export_bundle(SEEDED, bundle, ["9s"], "float32", silent, ExportOptions())
    assert found == [{"finished.json"}]


# A bundle.json that cannot be read


@pytest.mark.parametrize("command", ["sample", "inspect"])
@pytest.mark.parametrize("damage", ["deep", "deep in a field", "folder", "unreadable", "file for a folder"])
def test_a_manifest_that_cannot_be_read_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, damage: str
) -> None:
    bundle = tmp_path / "bundle"
    if damage == "file for a folder":
        bundle.write_text("a file")
    elif damage == "folder":
        (bundle / MANIFEST).mkdir(parents=True)
    else:
        bundle.mkdir()
        nested = "[" * 100_000 + "]" * 100_000
        (bundle / MANIFEST).write_text(f'{{"format_version": 2, "more": {nested}}}' if "field" in damage else nested)
    if damage == "unreadable":
        real = Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            if path.name == MANIFEST:
                raise PermissionError(13, "Permission denied")
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
    (tmp_path / "bear.json").write_text(json.dumps([{"text": "A bear bakes bread."}]))
    options: tuple[Any, ...] = ("sample", tmp_path / "bear.json", "--bundle", bundle)
    code, out, err = run(*(options if command == "sample" else ("inspect", bundle)))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {bundle}")


# Names that share a tensor


def test_a_tensor_is_shared_by_name_alone() -> None:
    def place(name: str) -> tuple[int, int]:
        return ranges[name]

    def lazy() -> LazyTensor:
        return LazyTensor((3, 2), torch.float32, lambda: torch.ones(3, 2))

    first, second = "encoder.t5.shared.weight", "encoder.t5.encoder.embed_tokens.weight"
    one = lazy()
    ranges = dict(lay_out({second: lazy(), first: lazy(), "a": one, "b": one}, Path("x"), torch.float32).ranges)
    assert place(first) == place(second)
    assert len({place(first), place("a"), place("b")}) == 3

    meta = {name: torch.empty(3, 2, device="meta") for name in ("a", "b")}  # all of the data pointer 0
    ranges = dict(lay_out(lazy_state(meta), Path("x"), torch.float32).ranges)
    assert place("a") != place("b")
