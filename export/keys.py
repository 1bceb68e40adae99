"""Content keys: what each file of a bundle was built from. A file is rebuilt when its key changes.

Computing a key reads no weights and imports no torch.
"""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import msgspec

from ttt_video_engine.export.code import ENGINES, GRAPHS, WEIGHTS, Artefact
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.ttt_op import OpVersion

TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "safetensors")
"""The packages whose versions a bundle records."""

Key = dict[str, str]
"""Name of an input → its value, digest or version."""


@cache
def _code_and_tools(artefact: Artefact) -> tuple[tuple[str, str], ...]:
    tools = ((f"tool {name}", package_version(name)) for name in artefact.tools)
    return ("code", artefact.digest()), *tools


def graph_key(
    model: ModelConfig,
    *,
    weights: str,
    dtype: str,
    opset: int,
    length: str = "any",
    inline: bool = False,
    quantize: Quantization = "none",
    op_version: OpVersion | None = None,
    devices: int = 1,
) -> Key:
    """The key of a graph: everything that could change it. Graphs with equal keys are identical.

    `op_version` is that of the TTT nodes, None where there are none. `devices` run the graph together.
    """
    model_key = {"preset": model.name, "config": _digest(model), "weights": weights, "length": length}
    functions = "inlined" if inline else "kept"
    key = {**model_key, "precision": dtype, "opset": str(opset), "functions": functions}
    operator = {} if op_version is None else {"operator": f"version {op_version}"}
    together = {} if devices == 1 else {"devices": str(devices)}
    return key | operator | together | _quantized(quantize) | dict(_code_and_tools(GRAPHS))


def weights_key(model: ModelConfig, *, origin: str, dtype: str, quantize: Quantization = "none") -> Key:
    """The key of a weight file: everything that could change it. A file with an equal key is reused."""
    key = {"origin": origin, "config": _digest(model), "precision": dtype}
    return key | _quantized(quantize) | dict(_code_and_tools(WEIGHTS))


def engine_environment() -> Key:
    """The code and tool versions in an engine's key, without the TensorRT package, which depends on the GPU."""
    return dict(_code_and_tools(ENGINES))


def key_changes(old: Key, new: Key) -> list[str]:
    """One short reason for each part of a key that differs; empty if the keys are equal."""
    return [
        f"{part} changed ({old.get(part, 'none')[:16]} → {new.get(part, 'none')[:16]})"
        for part in sorted(old.keys() | new.keys())
        if old.get(part) != new.get(part)
    ]


def stale_graphs(bundle: Bundle) -> dict[str, list[str]]:
    """Graph → why an export of the same model would rebuild it with this installation; empty if it would be reused."""
    current = dict(_code_and_tools(GRAPHS))
    return {
        name: key_changes({part: value for part, value in graph.key.items() if part in current}, current)
        for name, graph in bundle.manifest.graphs.items()
    }


def package_version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _quantized(quantize: Quantization) -> Key:
    """Nothing for what is not quantised, whose keys are as they were before there was a choice."""
    return {} if quantize == "none" else {"quantization": quantize}


def _digest(model: ModelConfig) -> str:
    return hashlib.sha256(msgspec.json.encode(model, order="deterministic")).hexdigest()
