"""The finished latents of a video in a safetensors file, so that it can be decoded again without the transformer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ttt_video_engine.runtime.bundle import Bundle, latent_shape
from ttt_video_engine.runtime.errors import OutputError, StateError, printable
from ttt_video_engine.runtime.files import atomic_write

LATENTS = "latents.safetensors"
FORMAT_VERSION = 1
_TENSOR, _METADATA = "latents", "ttt_video_latents"
_AGAIN = "render the video again"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Latents:
    """Latents [1, T, C, H, W] of a video of a length such as "9s", and the digest of the bundle that made them."""

    values: Floats
    length: str
    bundle_sha256: str


class _Version(Struct):
    format_version: int


class _Metadata(Struct, frozen=True, forbid_unknown_fields=True):
    """JSON under one key, as safetensors writes several in another order every time. `sha256` is that of the values."""

    format_version: int
    bundle_sha256: str
    length: str
    sha256: str


def write_latents(target: Path, latents: Latents) -> None:
    """Writes latents; `target` appears when it is complete.

    Raises OutputError where a value is NaN or infinite, or the file cannot be written.
    """
    values = np.ascontiguousarray(latents.values, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = f"{np.isnan(values).sum()} NaN and {np.isinf(values).sum()} infinite"
        raise OutputError(
            f"{target}: the latents have {bad} values of {values.size}; use a wider dtype, such as float32"
        )
    metadata = _Metadata(FORMAT_VERSION, latents.bundle_sha256, latents.length, _digest(values))
    with atomic_write(target) as partial:
        partial.write_bytes(save({_TENSOR: values}, {_METADATA: msgspec.json.encode(metadata).decode()}))


def read_latents(path: Path, bundle: Bundle) -> Latents:
    """Latents that this bundle made, checked before and after they are read.

    Raises StateError where the file is missing, too new, made with another bundle, or not as it was written. A file
    that states another size than that of its length is not read.
    """
    if not path.is_file():
        raise StateError(f"{path}: is missing or no file; name the folder of a render that is denoised")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _read_metadata(path, file.metadata() or {})
            if metadata.bundle_sha256 != bundle.sha256:
                raise StateError(
                    f"{path}: was made with bundle {printable(metadata.bundle_sha256)}, {bundle.root} is "
                    f"{bundle.sha256}; name the bundle that made it"
                )
            _check_tensor(path, file, bundle, metadata.length)
            values: Floats = file.get_tensor(_TENSOR)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: is damaged ({printable(str(error))}); {_AGAIN}") from error
    if _digest(values) != metadata.sha256:
        raise StateError(f"{path}: is damaged (its values are not those that were written); {_AGAIN}")
    if not np.isfinite(values).all():
        raise StateError(f"{path}: is damaged (it has NaN or infinite values); {_AGAIN}")
    return Latents(values, metadata.length, metadata.bundle_sha256)


def _read_metadata(path: Path, entries: dict[str, str]) -> _Metadata:
    try:
        content = entries[_METADATA]
        version = msgspec.json.decode(content, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise StateError(
                f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}; "
                f"update ttt-video-engine or {_AGAIN}"
            )
        return msgspec.json.decode(content, type=_Metadata)
    except KeyError:
        raise StateError(f"{path}: is no file of latents ({_METADATA} is not in its metadata); {_AGAIN}") from None
    except msgspec.DecodeError as error:
        raise StateError(f"{path}: {_METADATA}: {error}; {_AGAIN}") from error


def _check_tensor(path: Path, file: safe_open, bundle: Bundle, length: str) -> None:
    """Before a byte of it is read. safetensors itself holds the size of the file to this shape."""
    model = bundle.manifest.model
    if length not in bundle.manifest.lengths:
        raise StateError(f"{path}: length is {printable(length)!r}, which {bundle.root} does not have; {_AGAIN}")
    expected = ["F32", [1, *latent_shape(model, model.clip_size(length))]]
    stored: Any = file.get_slice(_TENSOR)  # type: ignore[no-untyped-call]
    found = [stored.get_dtype(), stored.get_shape()]
    if found != expected:
        raise StateError(f"{path}: is damaged ({_TENSOR} is {found}, a video of {length} has {expected}); {_AGAIN}")


def _digest(values: Floats) -> str:
    return hashlib.sha256(values.astype("<f4", copy=False).data).hexdigest()
