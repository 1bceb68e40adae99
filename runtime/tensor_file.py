"""Arrays in a safetensors file with a checksum, so that damage is detected.

safetensors has no checksum of its own. The metadata holds one, over the facts beside the arrays and over the name,
dtype, shape and bytes of every array.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ttt_video_engine.runtime.errors import DamagedFile, brief
from ttt_video_engine.runtime.files import atomic_write, check_space

Arrays = Mapping[str, NDArray[Any]]
Facts = Mapping[str, Any]
"""What JSON can hold."""

_METADATA = "ttt-video"
_HEADER = 1 << 16
"""Bytes that a file may have beyond its arrays."""


def save_tensors(target: Path, arrays: Arrays, facts: Facts) -> None:
    """Writes arrays and facts, on the disk when this returns. Raises OutputError where the disk is full or fails."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    check_space(target, {target.name: sum(array.nbytes for array in arrays.values()) + _HEADER})
    facts = dict(facts)
    # Not `save_file`, which hides what the system says of a full disk.
    # One entry of metadata, as safetensors writes several in an order that changes from run to run.
    content = save(arrays, {_METADATA: json.dumps({"sha256": checksum_of(arrays, facts), "facts": facts})})
    with atomic_write(target) as partial:
        partial.write_bytes(content)


def load_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, NDArray[np.float32]], Any]:
    """The float32 arrays, which must have exactly these shapes, and the facts.

    Raises DamagedFile for anything else than what `save_tensors` wrote with such arrays.
    """
    expected = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(f"{path}: is damaged (it is not a regular file)")
        if status.st_size > expected + _HEADER:
            raise DamagedFile(f"{path}: is damaged (it is larger than its arrays)")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        record = json.loads(metadata[_METADATA])
        facts, checksum = record["facts"], record["sha256"]
        found = checksum_of(arrays, facts)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path}: is damaged ({brief(error)})") from error
    if checksum != found:
        raise DamagedFile(f"{path}: is damaged (its bytes do not have their checksum)")
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != {
        name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()
    }:
        raise DamagedFile(f"{path}: holds other arrays than this video has")
    return arrays, facts


def checksum_of(arrays: Arrays, facts: Facts) -> str:
    """Hex SHA-256 of arrays, with their names, dtypes and shapes, and of the facts beside them."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()
