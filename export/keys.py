"""What a graph was built from, and why it would be built again. Reads no weights and imports no torch."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import ModelConfig

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "tokenizers")
_SOURCES = ("export/**/*.py", "export/sources/prose.txt", "reference/**/*.py", "runtime/*.py")

Key = dict[str, str]


def environment_key() -> Key:
    """The part of a key that this installation fixes: the code that exports, and its tools."""
    return {"code": code_digest(), **{f"tool {name}": package_version(name) for name in TOOLS}}


def graph_key(
    model: ModelConfig, *, weights: str, dtype: str, opset: int, length: str = "any", inline: bool = False
) -> Key:
    """Everything that could change a graph. Two graphs of equal keys are the same."""
    config = hashlib.sha256(msgspec.json.encode(model, order="deterministic")).hexdigest()
    model_key = {"preset": model.name, "config": config, "weights": weights, "length": length}
    functions = "inlined" if inline else "kept"
    return {**model_key, "precision": dtype, "opset": str(opset), "functions": functions, **environment_key()}


def weights_key(model: ModelConfig, *, origin: str, dtype: str) -> Key:
    """Everything that could change a weight file, without reading it: files of equal keys need not be written again."""
    config = hashlib.sha256(msgspec.json.encode(model, order="deterministic")).hexdigest()
    return {
        "origin": origin,
        "config": config,
        "precision": dtype,
        "code": code_digest(),
        "tool torch": package_version("torch"),
    }


def differences(old: Key, new: Key) -> list[str]:
    """One short reason for each part of a key that differs."""
    return [
        f"{part} changed ({old.get(part, 'none')[:16]} → {new.get(part, 'none')[:16]})"
        for part in sorted(old.keys() | new.keys())
        if old.get(part) != new.get(part)
    ]


def stale_graphs(bundle: Bundle) -> dict[str, list[str]]:
    """Graph → why the export of the same model would build it again here; empty where it would be kept."""
    here = environment_key()
    return {
        name: differences({part: value for part, value in graph.key.items() if part in here}, here)
        for name, graph in bundle.manifest.graphs.items()
    }


def code_digest() -> str:
    """Digest of the source that decides what a graph computes."""
    return source_digest(*_SOURCES)


@cache
def source_digest(*patterns: str) -> str:
    """Digest of the source files that match, by their names in the package."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def package_version(package: str) -> str:
    """The installed version of a package, or that it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
