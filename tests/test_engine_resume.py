"""Engines that a stopped export left, or an older program made: only what is damaged or old is built again."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.builder import BuildRequest
from ttt_video_engine.engines.tensorrt.checks import usable_engine
from ttt_video_engine.engines.tensorrt.engine import (
    FOLDER,
    EngineEntry,
    EngineFile,
    engine_name,
    entry_path,
    list_engines,
)
from ttt_video_engine.export import engines as exported
from ttt_video_engine.export.build import export_bundle
from ttt_video_engine.export.engines import EngineRequest, build_engines
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.runtime.bundle import MANIFEST, FileEntry, encode_manifest, open_bundle
from ttt_video_engine.runtime.callbacks import Progress
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.presets import tiny

NAMES = ("text_encoder", "vae_decoder-first", "vae_decoder-next")
OLD = "transformer-9s.bfloat16.tensorrt_rtx-1.7.0.sm_89.plan"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs whose engines were built; the engines are files of the right form that no GPU could run."""
    names: list[str] = []

    def build(request: BuildRequest, folder: Path, progress: Progress) -> EngineFile:
        names.append(request.graph)
        path = folder / engine_name(request.graph, request.dtype, "tensorrt_rtx", "1.7.0", request.gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"an engine of {request.graph}")
        entry = EngineEntry(
            graph=request.graph,
            gpu=request.gpu,
            dtype=request.dtype,
            package="tensorrt_rtx",
            package_version="1.7.0",
            inputs=request.inputs,
            outputs=request.outputs,
            profiles=request.profiles,
            plugins={},
            settings=request.settings,
            size=path.stat().st_size,
            weights=0,
            sha256=sha256_of(path),
            seconds=0.0,
            key=request.key,
        )
        entry_path(path).write_bytes(msgspec.json.encode(entry))
        return EngineFile(path, entry)

    monkeypatch.setattr(exported, "build_engine", build)
    return names


@pytest.fixture
def build(bundle: Path) -> Callable[[], None]:
    whole = open_bundle(bundle).manifest
    manifest = replace(whole, graphs={name: whole.graphs[name] for name in NAMES})

    def run() -> None:
        build_engines(manifest, bundle, None, EngineRequest(("sm_89",)), lambda line: None, lambda *_: None)

    return run


def damage_bytes(engine: EngineFile) -> None:
    content = bytearray(engine.path.read_bytes())
    content[0] ^= 1
    engine.path.write_bytes(content)


def damage_json(engine: EngineFile) -> None:
    entry_path(engine.path).write_text("{")


def remove_file(engine: EngineFile) -> None:
    engine.path.unlink()


def lose_kernel(engine: EngineFile) -> None:
    entry = replace(engine.entry, plugins={"layer": "ttt_linear-c16-f16-bfloat16-sm_89"})
    entry_path(engine.path).write_bytes(msgspec.json.encode(entry))


@pytest.mark.parametrize("damage", [damage_bytes, damage_json, remove_file, lose_kernel])
def test_of_engines_that_a_stopped_export_left_the_damaged_one_is_built_again(
    bundle: Path, built: list[str], build: Callable[[], None], damage: Callable[[EngineFile], None]
) -> None:
    build()
    assert built == list(NAMES)
    built.clear()
    damage(list_engines(bundle)[1])
    theirs = bundle / FOLDER / "notes.txt"
    theirs.write_text("theirs")
    build()
    assert built == [NAMES[1]]
    assert len(list_engines(bundle)) == 3 and theirs.exists()
    for engine in list_engines(bundle):
        engine.verify()


def test_a_damaged_engine_of_the_bundle_before_is_no_hindrance(
    bundle: Path, tmp_path: Path, built: list[str], build: Callable[[], None]
) -> None:
    build()
    built.clear()
    damage_json(list_engines(bundle)[1])
    whole = open_bundle(bundle).manifest
    manifest = replace(whole, graphs={name: whole.graphs[name] for name in NAMES})
    stage = tmp_path / "stage"
    stage.mkdir()
    for graph in manifest.graphs.values():
        (stage / graph.file).parent.mkdir(exist_ok=True)
        (stage / graph.weights).write_bytes(b"")
    build_engines(manifest, stage, bundle, EngineRequest(("sm_89",)), lambda line: None, lambda *_: None)
    assert built == [NAMES[1]] and len(list_engines(stage)) == 3


def with_old_engine(bundle: Path) -> None:
    """A bundle of a program that called engines plans."""
    folder = bundle / FOLDER
    folder.mkdir()
    (folder / OLD).write_text("a plan")
    (folder / f"{OLD}.json").write_text(json.dumps({"graph": "transformer-9s", "gpu": "sm_89"}))
    manifest = open_bundle(bundle).manifest
    names = (f"{FOLDER}/{OLD}", f"{FOLDER}/{OLD}.json")
    files = {name: FileEntry(sha256_of(bundle / name), (bundle / name).stat().st_size) for name in names}
    (bundle / MANIFEST).write_bytes(encode_manifest(replace(manifest, files={**manifest.files, **files})))


def test_engines_of_an_older_program_are_asked_for_again(bundle: Path) -> None:
    with_old_engine(bundle)
    assert list_engines(bundle) == []
    with pytest.raises(BackendError) as raised:
        usable_engine(open_bundle(bundle), "transformer-9s", "sm_89")
    message = str(raised.value)
    assert message.endswith("run: ttt-video export --engine tensorrt --gpu sm_89") and "\n" not in message


def test_an_export_drops_engines_of_an_older_program(bundle: Path) -> None:
    with_old_engine(bundle)
    lines: list[str] = []
    source = SeededSource(tiny("linear"), seed=0)
    export_bundle(source, bundle, ["9s"], "float32", lines.append).verify()
    assert not [line for line in lines if not line.endswith(": unchanged")]
    assert not (bundle / FOLDER).exists()
    export_bundle(source, bundle, ["9s"], "float32", lines.append)
    assert lines[-1] == "nothing has changed"
