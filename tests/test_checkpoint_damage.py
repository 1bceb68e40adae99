"""Damaged and hostile weight files: values, or one CheckpointError; never a trace, a hang or a large allocation."""

import dataclasses
import json
import os
import pickle
import random
import resource
import socket
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import save_distributed
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from ttt_video_engine.reference.checkpoints.lazy import open_state
from ttt_video_engine.runtime.errors import CheckpointError

State = dict[str, Tensor]
GENERATOR = torch.Generator().manual_seed(0)
STATE: State = {
    "layers.0.weight": torch.randn(12, 8, generator=GENERATOR),
    "layers.0.bias": torch.randn(12, generator=GENERATOR).bfloat16(),
    "scale": torch.tensor(2.5),
}


def save_two_shards(state: State, folder: Path) -> None:
    names = {"a.safetensors": ["layers.0.weight"], "b.safetensors": ["layers.0.bias", "scale"]}
    for file, held in names.items():
        save_file({name: state[name] for name in held}, folder / file)
    places = {name: file for file, held in names.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_before_zip(state: State, folder: Path) -> None:
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=False)


SAVED: dict[str, Callable[[State, Path], None]] = {
    "zip": lambda state, folder: torch.save({"model": state}, folder / "model.pt"),
    "before zip": save_before_zip,
    "safetensors": lambda state, folder: save_file(state, folder / "model.safetensors"),
    "shards": save_two_shards,
    "distributed": lambda state, folder: save_distributed({"model": state, "step": 3}, folder),
}


def read_all(path: Path) -> None:
    """Every value, of the shape and dtype that were announced."""
    for stored in open_state(path).values():
        value = stored.read()
        assert (tuple(value.shape), value.dtype) == (stored.shape, stored.dtype)
        value.float().sum()


def refusal(path: Path) -> str:
    """The message of the error, in one line, for opening or reading."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    return str(caught.value)


def damages(content: bytes, seed: int, count: int) -> list[bytes]:
    """Versions of a file: cut off, and with bytes changed, some in each of its sixteenths."""
    chosen = random.Random(seed)
    found = []
    for number in range(count):
        start, end = (len(content) * part // 16 for part in (number % 16, number % 16 + 1))
        place = chosen.randrange(start, max(end, start + 1))
        if number % 4 == 0:
            found.append(content[:place])
            continue
        changed = bytearray(content)
        for at in range(place, min(place + chosen.choice((1, 1, 2, 8)), len(content))):
            changed[at] = chosen.choice((0x00, 0xFF, changed[at] ^ 1 << chosen.randrange(8), chosen.randrange(256)))
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize("format", SAVED)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_values_or_an_error(tmp_path: Path, format: str) -> None:
    SAVED[format](STATE, tmp_path)
    read_all(tmp_path)
    before, refused, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, time.monotonic()
    for seed, path in enumerate(sorted(file for file in tmp_path.iterdir())):
        whole = path.read_bytes()
        for content in damages(whole, seed, 64):
            path.write_bytes(content)
            try:
                read_all(tmp_path)
            except CheckpointError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
        path.write_bytes(whole)
    read_all(tmp_path)
    assert refused >= 16, "the cuts at least, or the damage is none"
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "in KiB"


# What is no regular file


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.safetensors.index.json", ".metadata"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "pipe")
    assert str(folder / name) in refusal(folder)
    assert str(folder / name) in refusal(folder / name)


def test_devices_and_sockets_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.pt").symlink_to("/dev/zero")
    refusal(tmp_path / "model.pt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "model.bin"))
        refusal(tmp_path / "model.bin")


@pytest.mark.parametrize("place", ["a.safetensors", "__0_0.distcp"])
def test_a_pipe_in_place_of_a_part_is_not_waited_for(tmp_path: Path, place: str) -> None:
    (save_two_shards if place == "a.safetensors" else SAVED["distributed"])(STATE, tmp_path)
    (tmp_path / place).unlink()
    os.mkfifo(tmp_path / place)
    assert str(tmp_path / place) in refusal(tmp_path)


# safetensors


def with_dtype(path: Path, dtype: str, bits: int) -> None:
    size = 16 * bits // 8
    header = json.dumps({"first": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)


@pytest.mark.parametrize(("dtype", "bits"), [("U16", 16), ("U32", 32), ("U64", 64), ("F8_E8M0", 8), ("C64", 64)])
@pytest.mark.filterwarnings("ignore")
def test_every_dtype_of_torch_is_described(tmp_path: Path, dtype: str, bits: int) -> None:
    with_dtype(tmp_path / "model.safetensors", dtype, bits)
    read_all(tmp_path)


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F9", 8)])
def test_another_dtype_is_named(tmp_path: Path, dtype: str, bits: int) -> None:
    with_dtype(tmp_path / "model.safetensors", dtype, bits)
    message = refusal(tmp_path)
    assert dtype in message and (dtype == "F9" or "'first'" in message)


def test_a_name_that_breaks_lines_is_refused(tmp_path: Path) -> None:
    save_file({"a\nerror: \x1b[2J": torch.ones(2)}, tmp_path / "model.safetensors")
    refusal(tmp_path)


# Indices


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "7",
        '{"weight_map": null}',
        '{"weight_map": ["scale"]}',
        '{"weight_map": {"scale": 3}}',
        '{"weight_map": {"scale": ["a.safetensors"]}}',
        '{"weight_map": {"scale": "."}}',
        '{"weight_map": {"scale": ""}}',
        '{"weight_map": {"scale": "a\\u0000b"}}',
        '{"weight_map": {"sc\\nale": "a.safetensors"}}',
        '{"weight_map": ' + "[" * 100_000,
        '{"deep": ' + '{"a":' * 100_000,
        '{"weight_map": {}, "padding": "' + " " * (17 << 20) + '"}',
    ],
    ids=lambda content: content[:30].replace("\\", "").replace("/", ""),
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    save_two_shards(STATE, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    refusal(tmp_path)


# torch.save


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["sparse", "compressed sparse", "meta", "quantized"])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_not_dense_is_named(tmp_path: Path, kind: str, zipped: bool) -> None:
    value = {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "compressed sparse": lambda: torch.eye(4).to_sparse_csr(),
        "meta": lambda: torch.ones(4, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    }[kind]()
    torch.save({"first": torch.ones(2), "second": value}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert "'second'" in refusal(tmp_path)


def test_a_tensor_without_a_name_is_refused(tmp_path: Path) -> None:
    torch.save({3: torch.ones(2)}, tmp_path / "model.pt")
    assert "int" in refusal(tmp_path)


def test_an_archive_that_would_unpack_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    torch.save({"first": torch.zeros(4), "text": " " * 1_000_000}, tmp_path / "plain")
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(path, "w") as packed:
        for info in plain.infolist():
            method = zipfile.ZIP_DEFLATED if info.filename.endswith(".pkl") else zipfile.ZIP_STORED
            packed.writestr(info.filename, plain.read(info), method)
    refusal(path)


# Distributed checkpoints


def change_table(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Of a checkpoint of one weight [4, 3]."""
    save_distributed({"weight": torch.arange(12.0).view(4, 3)}, folder)
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def resize(table: Metadata, size: tuple[int, ...]) -> None:
    weight = table.state_dict_metadata["weight"]
    assert isinstance(weight, TensorStorageMetadata)
    weight.size = weight.chunks[0].sizes = torch.Size(size)


def cut(table: Metadata, *chunks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Replaces the only chunk by chunks of (start, shape) that all lie where it did."""
    ((index, place),) = table.storage_data.items()
    weight = table.state_dict_metadata["weight"]
    assert isinstance(weight, TensorStorageMetadata)
    weight.chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape)) for start, shape in chunks]
    table.storage_data = {dataclasses.replace(index, offset=torch.Size(start)): place for start, _ in chunks}


def move(table: Metadata, **fields: object) -> None:
    ((index, place),) = table.storage_data.items()
    table.storage_data = {index: dataclasses.replace(place, **fields)}


@pytest.mark.parametrize("size", [(10**15,), (10**9, 10**9), (1 << 30, 1)])
def test_no_memory_is_taken_for_values_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]
) -> None:
    def change(table: Metadata) -> None:
        resize(table, size)
        cut(table, ((0,) * len(size), size))  # type: ignore[arg-type]

    change_table(tmp_path, change)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("memory was taken"))
    assert "'weight'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda table: cut(table, ((1, 0), (4, 3))), id="outside"),
        pytest.param(lambda table: cut(table, ((0, 0), (2, 3)), ((1, 0), (2, 3))), id="overlapping"),
        pytest.param(lambda table: cut(table, ((0, 0), (4, 2)), ((0, 1), (2, 2))), id="overlapping across"),
        pytest.param(lambda table: cut(table, ((0,), (12,))), id="too few axes"),  # type: ignore[arg-type]
        pytest.param(lambda table: move(table, offset=-1), id="negative place"),
        pytest.param(lambda table: move(table, length=-5), id="negative length"),
        pytest.param(lambda table: move(table, offset="0"), id="place of another type"),
        pytest.param(lambda table: move(table, relative_path=3), id="file of another type"),
        pytest.param(lambda table: move(table, relative_path="."), id="the folder as a file"),
        pytest.param(lambda table: move(table, transform_descriptors=["zstd"]), id="compressed"),
        pytest.param(lambda table: setattr(table, "state_dict_metadata", []), id="tensors as a list"),
        pytest.param(lambda table: setattr(table, "storage_data", None), id="places as None"),
        pytest.param(lambda table: setattr(table, "storage_data", {3: 4}), id="places of no kind"),
        pytest.param(
            lambda table: setattr(table.state_dict_metadata["weight"].properties, "dtype", torch.int32),
            id="another dtype",
        ),
        pytest.param(lambda table: resize(table, (3, 4)), id="another shape"),
        pytest.param(lambda table: setattr(table.state_dict_metadata["weight"], "chunks", None), id="chunks as None"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, change: Callable[[Metadata], object]) -> None:
    change_table(tmp_path, change)
    refusal(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(4, 3)], torch.eye(4).to_sparse(), "text"])
@pytest.mark.filterwarnings("ignore")
def test_a_chunk_that_holds_something_else_is_refused(tmp_path: Path, content: object) -> None:
    def change(table: Metadata) -> None:
        torch.save(content, tmp_path / "__0_0.distcp")
        move(table, offset=0, length=(tmp_path / "__0_0.distcp").stat().st_size)

    change_table(tmp_path, change)
    refusal(tmp_path)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02Kaq" + b"\x01.",
        b"\x80\x02Nr\xff\xff\xff\x3f.",  # a memo of a billion entries
        b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".",  # a bytearray of 16 GiB
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00aK\x01s\x86b.",  # Metadata.a
    ],
    ids=["a number", "a memo", "a bytearray", "depth", "a class"],
)
def test_a_pickle_that_costs_much_or_changes_classes_is_refused(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path)
    assert not hasattr(Metadata, "a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "in KiB"
