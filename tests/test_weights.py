"""Weight files: laid out once, written a tensor at a time, gone on with after a kill, held to what they were to be."""

import math
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from messages import holds, refused_with
from torch import Tensor

from ttt_video_engine.export.graphs import journal, weights
from ttt_video_engine.export.graphs.weights import lay_out, write_weights
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor, lazy_state
from ttt_video_engine.runtime.dtypes import WEIGHT_ALIGNMENT
from ttt_video_engine.runtime.errors import CheckpointError, OutputError
from ttt_video_engine.runtime.files import sha256_of

TENSORS = {f"layer.{i}": torch.randn(40, 60 + i, generator=torch.Generator().manual_seed(i)) for i in range(8)}
SHARED, EMBED = "t5.shared.weight", "t5.encoder.embed_tokens.weight"
KEY = {"origin": "a checkpoint"}


class Killed(BaseException):
    """What ends a run at a place of our choice."""


def stopping_at(name: str | None, reads: list[str]) -> LazyStateDict:
    """The tensors; reading one is noted, and that of `name` ends the run."""

    def reader(of: str) -> LazyTensor:
        def read() -> Tensor:
            if of == name:
                raise Killed
            reads.append(of)
            return TENSORS[of]

        return LazyTensor(tuple(TENSORS[of].shape), torch.float32, read)

    return {of: reader(of) for of in TENSORS}


def write(state: LazyStateDict, path: Path, key: dict[str, str] = KEY, dtype: torch.dtype = torch.float32) -> str:
    file = lay_out(state, path, dtype)
    entry = write_weights(state, file, dtype, key)
    assert entry.sha256 == sha256_of(path) and entry.size == file.size == path.stat().st_size
    assert not list(path.parent.glob("*.journal"))
    return entry.sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_is_at_its_place(tmp_path: Path, dtype: torch.dtype) -> None:
    state = lazy_state(TENSORS)
    write(state, tmp_path / "weights", dtype=dtype)
    content = (tmp_path / "weights").read_bytes()
    for name, (offset, length) in lay_out(state, tmp_path / "weights", dtype).ranges.items():
        assert offset % WEIGHT_ALIGNMENT == 0
        found = torch.frombuffer(bytearray(content[offset : offset + length]), dtype=dtype)
        assert torch.equal(found.view(TENSORS[name].shape), TENSORS[name].to(dtype))


def test_names_of_one_tensor_share_a_place(tmp_path: Path) -> None:
    state = lazy_state({SHARED: TENSORS["layer.0"], "other": TENSORS["layer.1"], EMBED: TENSORS["layer.0"]})
    ranges = lay_out(state, tmp_path / "weights", torch.float32).ranges
    assert ranges[SHARED] == ranges[EMBED] != ranges["other"]


@pytest.mark.parametrize("stop", ["layer.1", "layer.4", "layer.7"])
def test_a_stopped_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    monkeypatch.setattr(weights, "JOURNAL_INTERVAL", 1)
    whole = write(lazy_state(TENSORS), tmp_path / "whole")
    before: list[str] = []
    with pytest.raises(Killed):
        write(stopping_at(stop, before), tmp_path / "weights")
    after: list[str] = []
    assert write(stopping_at(None, after), tmp_path / "weights") == whole
    assert before + after == list(TENSORS), "nothing is read twice"


@pytest.mark.parametrize("damage", ["other bytes", "cut", "other key", "no journal", "no json"])
def test_what_cannot_be_vouched_for_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(weights, "JOURNAL_INTERVAL", 1)
    path = tmp_path / "weights"
    with pytest.raises(Killed):
        write(stopping_at("layer.4", []), path)
    content = bytearray(path.read_bytes())
    if damage == "other bytes":
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:100])
    elif damage == "no journal":
        journal.journal_path(path).unlink()
    elif damage == "no json":
        journal.journal_path(path).write_bytes(b"{")
    reads: list[str] = []
    key = {"origin": "another"} if damage == "other key" else KEY
    assert write(stopping_at(None, reads), path, key) == write(lazy_state(TENSORS), tmp_path / "whole")
    assert reads == list(TENSORS)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(70000.0, torch.float16), (float("nan"), torch.bfloat16), (float("inf"), torch.float32)],
)
def test_values_that_would_be_lost_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """The dtype is to blame for a number that it cannot hold alone."""
    damaged = TENSORS["layer.3"].clone()
    damaged[7, 7] = value
    state = lazy_state({**TENSORS, "layer.3": damaged})
    with refused_with(CheckpointError, "layer.3", "--dtype") as caught:
        write(state, tmp_path / "weights", dtype=dtype)
    assert holds(str(caught.value), dtype) == math.isfinite(value)


def test_a_disk_that_gives_back_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(journal.Journal):
        def record(self, out: BinaryIO, end: int, sha256: str) -> None:
            super().record(out, end, sha256)
            out.seek(5000)
            out.write(b"torn")
            out.seek(end)

    monkeypatch.setattr(weights, "Journal", Torn)
    with refused_with(OutputError, tmp_path / "weights"):
        write(lazy_state(TENSORS), tmp_path / "weights")
