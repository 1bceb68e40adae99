"""The finished latents of a video in a safetensors file, so that it can be decoded again without the transformer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ttt_video_engine.runtime.bundle import Bundle, latent_shape
from ttt_video_engine.runtime.errors import OutputError, StateError, printable
from ttt_video_engine.runtime.files import atomic_write

LATENTS = "latents.safetensors"
FORMAT_VERSION = 1
_TENSOR = "latents"
_METADATA = ("format_version", "bundle_sha256", "length", "sha256")
_AGAIN = "render the video again"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Latents:
    """Latents [1, T, C, H, W] of a video of a length such as "9s", and the digest of the bundle that made them."""

    values: Floats
    length: str
    bundle_sha256: str


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
    metadata = (str(FORMAT_VERSION), latents.bundle_sha256, latents.length, _digest(values))
    with atomic_write(target) as partial:
        save_file({_TENSOR: values}, partial, dict(zip(_METADATA, metadata, strict=True)))


def read_latents(path: Path, bundle: Bundle) -> Latents:
    """Latents that this bundle made, checked before and after they are read.

    Raises StateError where the file is missing, too new, made with another bundle, or not as it was written. A file
    that states another size than that of its length is not read.
    """
    if not path.is_file():
        raise StateError(f"{path}: is missing or no file; name the folder of a render that is denoised")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _check_metadata(path, file.metadata() or {})
            digest, length, sha256 = (metadata[name] for name in _METADATA[1:])
            if digest != bundle.sha256:
                raise StateError(
                    f"{path}: was made with bundle {printable(digest)}, {bundle.root} is {bundle.sha256}; "
                    "name the bundle that made it"
                )
            _check_tensor(path, file, bundle, length)
            values: Floats = file.get_tensor(_TENSOR)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: is damaged ({printable(str(error))}); {_AGAIN}") from error
    if _digest(values) != sha256:
        raise StateError(f"{path}: is damaged (its values are not those that were written); {_AGAIN}")
    if not np.isfinite(values).all():
        raise StateError(f"{path}: is damaged (it has NaN or infinite values); {_AGAIN}")
    return Latents(values, length, digest)


def _check_metadata(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    for name in _METADATA:
        if name not in metadata:
            raise StateError(f"{path}: is no file of latents ({name} is missing in its metadata); {_AGAIN}")
    version = metadata["format_version"]
    if version != str(FORMAT_VERSION):
        raise StateError(
            f"{path}: format_version is {printable(version)}, this program reads {FORMAT_VERSION}; "
            f"update ttt-video-engine or {_AGAIN}"
        )
    return metadata


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
