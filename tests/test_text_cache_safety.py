"""The cache of embeddings cannot change a video: no entry that was altered or that a damaged encoder made is used."""

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ttt_video_engine.runtime.bundle import TEXT_ENCODER, open_bundle
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.user_cache import cache_folder

Run = Callable[..., tuple[int, str, str]]
IDS = np.array([5, 6, 7])
EMBEDDING = np.arange(12, dtype=np.float32).reshape(3, 4)


def kept(folder: Path) -> tuple[TextCache, Path]:
    cache = TextCache(folder, "an encoder", width=4)
    cache.put(IDS, EMBEDDING)
    (path,) = folder.iterdir()
    return cache, path


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path, place: int) -> None:
    cache, path = kept(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert cache.get(IDS) is None


def test_an_entry_of_other_ids_or_another_encoder_is_not_taken(tmp_path: Path) -> None:
    cache, path = kept(tmp_path / "a")
    for other, ids in (
        (TextCache(tmp_path / "b", "an encoder", width=4), IDS + 1),
        (TextCache(tmp_path / "c", "x"), IDS),
    ):
        other.put(ids, EMBEDDING + 1)
        (donor,) = other._folder.iterdir()  # type: ignore[union-attr]
        path.write_bytes(donor.read_bytes())
        assert cache.get(IDS) is None


def test_an_entry_of_another_width_is_not_taken(tmp_path: Path) -> None:
    TextCache(tmp_path, "an encoder").put(IDS, EMBEDDING[:, :2])
    assert TextCache(tmp_path, "an encoder", width=4).get(IDS) is None
    found = TextCache(tmp_path, "an encoder", width=2).get(IDS)
    assert found is not None and found.shape == (3, 2)


@pytest.mark.parametrize("damage", ["huge", "huge header", "zip", "folder", "pipe"])
def test_what_is_no_entry_costs_no_memory_and_no_error(tmp_path: Path, damage: str) -> None:
    cache, path = kept(tmp_path)
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":  # reading it would wait for ever
        os.mkfifo(path)
    elif damage == "huge":
        with path.open("wb") as file:
            file.truncate(32 + 12 * (1 << 38))
    else:
        header = (
            np.lib.format.magic(1, 0)
            + b"v\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999)}"
        )
        path.write_bytes(b"PK\x03\x04" + bytes(100) if damage == "zip" else header)
    assert cache.get(IDS) is None


def test_the_encoder_is_verified_once_and_before_anything_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def verify() -> None:
        calls.append(len(list(tmp_path.iterdir())))

    cache = TextCache(tmp_path, "an encoder", verify=verify)
    assert cache.get(IDS) is None and calls == []
    cache.put(IDS, EMBEDDING)
    cache.put(IDS + 1, EMBEDDING)
    assert calls == [0]


def test_a_damaged_encoder_leaves_no_entry(
    run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size and time are those of the export, so that only its digest shows it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = bundle / open_bundle(bundle).graph(TEXT_ENCODER).weights
    status, content = weights.stat(), weights.read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    board = tmp_path / "bear.json"
    board.write_text(json.dumps([{"text": "A bear bakes bread."}]))
    options = ("--bundle", bundle, "--output-dir", tmp_path / "out", "--num-steps", 1)
    code, out, err = run("sample", board, *options)
    assert (code, out) == (1, "") and str(weights.relative_to(bundle)) in err.splitlines()[-1]
    assert not list(tmp_path.glob("cache/**/*.embedding")) and not list(tmp_path.glob("out/**/*.mp4"))


def test_a_component_is_verified_by_its_bytes(bundle: Path) -> None:
    opened = open_bundle(bundle)
    opened.verify_component(TEXT_ENCODER)
    file = bundle / opened.graph(TEXT_ENCODER).file
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError):
        opened.verify_component(TEXT_ENCODER)


def test_an_entry_that_was_altered_is_encoded_again(
    run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    board = tmp_path / "bear.json"
    board.write_text(json.dumps([{"text": "A bear bakes bread."}]))

    def video(name: str) -> bytes:
        out = tmp_path / name
        code, _, err = run("sample", board, "--bundle", shared_bundle, "--output-dir", out, "--num-steps", 1)
        assert code == 0, err
        return (out / "bear/video.mp4").read_bytes()

    first = video("first")
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(entries) == 2
    for path in entries:
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    assert video("second") == first


# Where it lies


def test_the_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("text") == tmp_path / "ttt-video" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("text") == tmp_path / "home/.cache/ttt-video/text"


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_folder("text") is None
    cache = TextCache(None, "an encoder")
    cache.put(IDS, EMBEDDING)
    assert cache.get(IDS) is None
