"""Kept latents: they come back as they were, and no file that is not as it was written passes for them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import refused_with
from safetensors import safe_open
from safetensors.numpy import save

from ttt_video_engine.runtime.bundle import Bundle, latent_shape, open_bundle
from ttt_video_engine.runtime.errors import OutputError, StateError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.latents_file import LATENTS, Latents, read_latents, write_latents

METADATA = "ttt_video_latents"


@pytest.fixture(scope="module")
def opened(shared_bundle: Path) -> Bundle:
    return open_bundle(shared_bundle)


@pytest.fixture
def latents(opened: Bundle) -> Latents:
    model = opened.manifest.model
    shape = (1, *latent_shape(model, model.clip_size("3s")))
    return Latents(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), "3s", opened.sha256)


@pytest.fixture
def path(tmp_path: Path, latents: Latents) -> Path:
    write_latents(tmp_path / LATENTS, latents)
    return tmp_path / LATENTS


def rewrite(path: Path, change: Callable[[dict[str, Any], np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    """Changes metadata in place and replaces the values, in a file that is whole otherwise."""
    with safe_open(path, framework="numpy") as file:
        metadata, values = json.loads(file.metadata()[METADATA]), file.get_tensor("latents")
    values = change(metadata, values)
    path.write_bytes(save({"latents": values}, {METADATA: json.dumps(metadata)}))


def test_latents_come_back(path: Path, opened: Bundle, latents: Latents) -> None:
    found = read_latents(path, opened)
    np.testing.assert_array_equal(found.values, latents.values)
    assert found.values.dtype == np.float32
    assert (found.length, found.bundle_sha256) == ("3s", opened.sha256)
    assert [item.name for item in path.parent.iterdir()] == [LATENTS]


def test_the_same_latents_give_the_same_bytes(path: Path, latents: Latents, tmp_path: Path) -> None:
    first = sha256_of(path)
    for _ in range(5):
        write_latents(path, latents)
        assert sha256_of(path) == first
    mode = path.stat().st_mode
    (tmp_path / "other").touch()
    assert mode == (tmp_path / "other").stat().st_mode, "others may read it as they may any file of the user"


def test_every_byte_that_changes_is_noticed(path: Path, opened: Bundle) -> None:
    content = path.read_bytes()
    for place in (0, 4, 20, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with refused_with(StateError, path):
            read_latents(path, opened)


@pytest.mark.parametrize("size", [0, 7, 100, 1000, -4])
def test_a_file_that_is_cut_off_is_refused(path: Path, opened: Bundle, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with refused_with(StateError, path):
        read_latents(path, opened)


def test_latents_of_another_bundle_name_both(path: Path, opened: Bundle, latents: Latents) -> None:
    write_latents(path, Latents(latents.values, "3s", "0" * 64))
    with refused_with(StateError, path, "0" * 64, opened.root, opened.sha256):
        read_latents(path, opened)


def test_a_later_format_is_refused(path: Path, opened: Bundle) -> None:
    def change(metadata: dict[str, Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        metadata.update(format_version=2, unheard_of=True)
        return values

    rewrite(path, change)
    with refused_with(StateError, path, "format_version", 2, 1):
        read_latents(path, opened)


@pytest.mark.parametrize(
    ("shape", "dtype", "values"),
    [
        ((1, 13, 16, 8, 10), np.float32, ("[1, 13, 16, 8, 10]", "[1, 13, 16, 8, 12]")),
        (None, np.float64, ("F64", "F32")),
    ],
)
def test_another_shape_or_dtype_is_refused(
    path: Path, opened: Bundle, shape: tuple[int, ...] | None, dtype: type, values: tuple[str, ...]
) -> None:
    rewrite(path, lambda metadata, old: np.zeros(shape or old.shape, dtype))
    with pytest.raises(StateError) as caught:
        read_latents(path, opened)
    for value in (path, *values):
        assert str(value) in str(caught.value)


def test_a_length_that_the_bundle_lacks_is_refused(path: Path, opened: Bundle, latents: Latents) -> None:
    write_latents(path, Latents(latents.values, "63s", opened.sha256))
    with refused_with(StateError, path, "63s", opened.root):
        read_latents(path, opened)


def test_a_size_is_checked_before_it_is_read(path: Path, opened: Bundle) -> None:
    """A header that states 4 TiB, in a sparse file that has them, costs no memory."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["latents"].update(shape=[1, 1 << 40], data_offsets=[0, 4 << 40])
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + (4 << 40))
    with refused_with(StateError, path):
        read_latents(path, opened)


@pytest.mark.parametrize("metadata", [None, {}, {METADATA: "no JSON"}, {METADATA: '{"format_version": 1}'}])
def test_a_file_without_its_metadata_is_refused(
    path: Path, opened: Bundle, latents: Latents, metadata: dict[str, str] | None
) -> None:
    path.write_bytes(save({"latents": latents.values}, metadata))
    with refused_with(StateError, path):
        read_latents(path, opened)


def test_a_tensor_of_another_name_is_refused(path: Path, opened: Bundle, latents: Latents) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    path.write_bytes(save({"other": latents.values}, metadata))
    with refused_with(StateError, path):
        read_latents(path, opened)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_neither_written_nor_read(
    path: Path, opened: Bundle, latents: Latents, value: float
) -> None:
    before = path.read_bytes()
    bad = latents.values.copy()
    bad[0, 1, 2, 3, 4] = value
    with refused_with(OutputError, path, bad.size, 1):
        write_latents(path, Latents(bad, "3s", opened.sha256))
    assert path.read_bytes() == before

    def change(metadata: dict[str, Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        metadata["sha256"] = hashlib.sha256(bad.tobytes()).hexdigest()
        return bad

    rewrite(path, change)
    with refused_with(StateError, path):
        read_latents(path, opened)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, opened: Bundle, kind: str) -> None:
    if kind == "folder":
        (tmp_path / LATENTS).mkdir()
    with refused_with(StateError, tmp_path / LATENTS):
        read_latents(tmp_path / LATENTS, opened)
