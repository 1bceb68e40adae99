"""What a file of a bundle was made from, and why it would be made again. Reads no weights and imports no torch."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import msgspec

from ttt_video_engine.export.code import ENGINES, GRAPHS, WEIGHTS, Artefact
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import ModelConfig

TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "safetensors")
"""What a bundle says it was made with."""

Key = dict[str, str]


@cache
def _installed(artefact: Artefact) -> tuple[tuple[str, str], ...]:
    tools = ((f"tool {name}", package_version(name)) for name in artefact.tools)
    return ("code", artefact.digest()), *tools


def graph_key(
    model: ModelConfig, *, weights: str, dtype: str, opset: int, length: str = "any", inline: bool = False
) -> Key:
    """Everything that could change a graph. Two graphs of equal keys are the same."""
    model_key = {"preset": model.name, "config": _digest(model), "weights": weights, "length": length}
    functions = "inlined" if inline else "kept"
    key = {**model_key, "precision": dtype, "opset": str(opset), "functions": functions}
    return key | dict(_installed(GRAPHS))


def weights_key(model: ModelConfig, *, origin: str, dtype: str) -> Key:
    """Everything that could change a weight file, without reading it: files of equal keys need not be written again."""
    return {"origin": origin, "config": _digest(model), "precision": dtype, **dict(_installed(WEIGHTS))}


def engine_environment() -> Key:
    """The part of an engine's key that this installation fixes, but for the package that builds it."""
    return dict(_installed(ENGINES))


def differences(old: Key, new: Key) -> list[str]:
    """One short reason for each part of a key that differs."""
    return [
        f"{part} changed ({old.get(part, 'none')[:16]} → {new.get(part, 'none')[:16]})"
        for part in sorted(old.keys() | new.keys())
        if old.get(part) != new.get(part)
    ]


def stale_graphs(bundle: Bundle) -> dict[str, list[str]]:
    """Graph → why the export of the same model would build it again here; empty where it would be kept."""
    here = dict(_installed(GRAPHS))
    return {
        name: differences({part: value for part, value in graph.key.items() if part in here}, here)
        for name, graph in bundle.manifest.graphs.items()
    }


def package_version(package: str) -> str:
    """The installed version of a package, or that it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(model: ModelConfig) -> str:
    return hashlib.sha256(msgspec.json.encode(model, order="deterministic")).hexdigest()
