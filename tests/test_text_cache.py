"""Embeddings that are kept: given back as they were, lost without harm, and no reason to load the encoder."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, OnnxRuntimeRunner
from ttt_video_engine.runtime import text_cache
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, TOKENIZER, open_bundle
from ttt_video_engine.runtime.stages import encode_prompts
from ttt_video_engine.runtime.storyboard import load_storyboards
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import SceneTokenizer

Run = Callable[..., tuple[int, str, str]]
IDS = np.array([5, 6, 7])
EMBEDDING = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "text", "an encoder")
    assert cache.get(IDS) is None
    cache.put(IDS, EMBEDDING)
    found = cache.get(IDS)
    assert found is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found, EMBEDDING)
    assert cache.get(IDS + 1) is None
    assert TextCache(tmp_path / "text", "another encoder").get(IDS) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "other shape", "not finite", "pickle"])
def test_what_is_damaged_is_as_if_it_were_not_there(tmp_path: Path, damage: str) -> None:
    cache = TextCache(tmp_path, "an encoder")
    cache.put(IDS, EMBEDDING)
    (path,) = tmp_path.iterdir()
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: -1 if damage == "cut" else 0])
    elif damage == "other shape":
        path.write_bytes(path.read_bytes()[: -EMBEDDING[0].nbytes])
    else:
        others = {"not finite": np.full_like(EMBEDDING, np.nan), "pickle": np.array([object()])}
        with path.open("wb") as file:
            np.save(file, others[damage], allow_pickle=True)
    assert cache.get(IDS) is None
    cache.put(IDS, EMBEDDING)
    assert cache.get(IDS) is not None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    cache = TextCache(tmp_path / "text", "an encoder")
    cache.put(IDS, EMBEDDING)
    assert cache.get(IDS) is None and (tmp_path / "text").read_text() == "mine"


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TextCache(tmp_path, "an encoder")
    cache.put(IDS, EMBEDDING)
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(text_cache, "LIMIT", 2 * size)
    for age, ids in enumerate((IDS, IDS + 1)):
        cache.put(ids, EMBEDDING)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (1000 + age, 1000 + age))
    assert cache.get(IDS) is not None  # now the one that was used last
    cache.put(IDS + 2, EMBEDDING)
    assert [cache.get(ids) is not None for ids in (IDS, IDS + 1, IDS + 2)] == [True, False, True]


def test_the_encoder_is_loaded_only_for_what_is_new(shared_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(shared_bundle)
    loads: list[str] = []
    real = OnnxRuntimeLoader(bundle)

    def load(graph: str) -> OnnxRuntimeRunner:
        loads.append(graph)
        return real(graph)

    def encode(texts: list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        board = tmp_path / "board.json"
        board.write_text(json.dumps([{"text": text} for text in texts]))
        (loaded,) = load_storyboards(board)
        tokenizer = SceneTokenizer.from_file(bundle.path(TOKENIZER))
        prompts = tokenizer.encode(loaded, bundle.manifest.model.text_lengths["9s"])
        cache = TextCache(tmp_path / "text", bundle.component_digest(TEXT_ENCODER))
        return encode_prompts(load, prompts, cache)

    scenes = ["A bear bakes bread.", "The bread rises.", "A mouse tastes it."]
    first = encode(scenes)
    assert loads == [TEXT_ENCODER] and len(list((tmp_path / "text").iterdir())) == 4  # one empty negative prompt
    np.testing.assert_array_equal(encode(scenes), first)
    assert loads == [TEXT_ENCODER]
    changed = encode([*scenes[:2], "A fox tastes it."])
    assert loads == [TEXT_ENCODER] * 2 and len(list((tmp_path / "text").iterdir())) == 5
    np.testing.assert_array_equal(changed[:, :2], first[:, :2])


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "an encoder")
    cache.put(IDS, EMBEDDING)
    (entry,) = tmp_path.iterdir()
    left = tmp_path / f".{entry.name}.123.partial.embedding"
    mine = [tmp_path / "notes.txt", tmp_path / ".mine.123.partial.embedding"]
    for path in (left, *mine):
        path.write_text("a")
    with FileLock(tmp_path / ".lock"):  # as a process that writes has it
        assert TextCache(tmp_path, "an encoder").get(IDS) is not None
        assert left.exists()
    assert TextCache(tmp_path, "an encoder").get(IDS) is not None
    assert not left.exists() and all(path.exists() for path in mine)
    left.write_text("a")
    cache.put(IDS + 1, EMBEDDING)
    assert not left.exists() and len(list(tmp_path.glob("[!.]*.embedding"))) == 2
