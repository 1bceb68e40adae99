"""Reads what Weights & Biases writes offline: a log of LevelDB's format, whose records are protocol buffers."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

_BLOCK, _MAGIC = 32768, b":W&B"
_WHOLE, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """`rows` are the values in the order in which they were logged; `files` what images and videos are stored in."""

    folder: Path
    project: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]

    def file(self, key: str) -> Path:
        """The one image or video of a key."""
        (path,) = self.series(f"{key}.path")
        return self.folder / "files" / str(path)


def offline_runs(folder: Path) -> list[OfflineRun]:
    wandb.teardown()  # its process ends when all is written
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.project = record.run.project
                run.config |= _items(record.run.config.update)
            case "config":
                run.config |= _items(record.config.update)
            case "history":
                run.rows.append(_items(record.history.item))
            case "summary":
                run.summary |= _items(record.summary.update)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> list[bytes]:
    assert content.startswith(_MAGIC)
    records, position = [b""], 7
    while position + 7 <= len(content):
        if _BLOCK - position % _BLOCK < 7:
            position += _BLOCK - position % _BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        assert kind in range(_WHOLE, _LAST + 1)
        records[-1] += content[position + 7 : position + 7 + size]
        if kind in (_WHOLE, _LAST):
            records.append(b"")
        position += 7 + size
    return records[:-1]
