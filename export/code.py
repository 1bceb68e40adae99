"""Lists the code that determines what an export writes. Content keys hold a digest of it.

A file is reused while this code is unchanged. So an artefact's sources are exactly the modules that determine its
bytes: a change to a report must not rewrite 14 GB of weights. A test follows the imports of the `entry_points` and
checks that every module is listed in `sources`, or in `excluded` with a reason. The tokenizer is not listed: every
export makes it and compares its content.
"""

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent

_MANIFEST = "fields and checks of the manifest"
_EXECUTION = "runs a graph or reports on the run"
_NEVER_DECIDES = {
    "export/graphs/journal.py": "progress of a file; the file is read back and verified",
    "runtime/callbacks.py": "reports progress",
    "runtime/errors.py": "messages",
    "runtime/files.py": "writes files atomically",
    "runtime/graph_files.py": _MANIFEST,
    "runtime/runner.py": _EXECUTION,
    "runtime/settings.py": _MANIFEST,
    "runtime/user_cache.py": "location of caches",
    "runtime/verified.py": "which files were verified before",
}
_CHECKPOINT_READERS = (
    "damage",
    "distributed",
    "distributed_table",
    "lazy",
    "safetensors_files",
    "shards",
    "tensors",
    "torch_files",
)


@dataclass(frozen=True, eq=False)
class Artefact:
    """A kind of file, and what determines its bytes.

    `entry_points` are the modules that write it. `sources` are glob patterns of the modules that determine its bytes,
    `tools` the packages that do. `excluded` maps every other module that is imported to the reason why it does not.
    """

    entry_points: tuple[str, ...]
    sources: tuple[str, ...]
    tools: tuple[str, ...]
    excluded: Mapping[str, str]

    def files(self, package: Path = PACKAGE) -> list[Path]:
        """The source files, sorted."""
        return sorted({path for pattern in self.sources for path in package.glob(pattern)})

    def digest(self, package: Path = PACKAGE) -> str:
        """SHA-256 of the names and the code of the sources. Comments and docstrings do not count."""
        digest = hashlib.sha256()
        for path in self.files(package):
            digest.update(
                f"{path.relative_to(package).as_posix()}\0{_normalised_source(path.read_text('utf-8'))}\0".encode()
            )
        return digest.hexdigest()


WEIGHTS = Artefact(
    entry_points=("export/graphs/components.py", "export/graphs/weights.py", "export/sources/source.py"),
    sources=(
        "export/graphs/components.py",  # names and order of weights
        "export/graphs/quantize.py",
        "export/graphs/weights.py",
        "export/sources/source.py",
        "reference/attention.py",
        "reference/checkpoints/*.py",
        "reference/initialise.py",
        "reference/text_encoder.py",
        "reference/transformer.py",
        "reference/ttt_layer.py",
        "reference/vae.py",
        "runtime/config.py",
        "runtime/dtypes.py",
        "runtime/quantization.py",
    ),
    tools=("safetensors", "torch", "transformers"),
    excluded={
        **_NEVER_DECIDES,
        "export/graphs/attention_op.py": "graphs",
        "export/graphs/graph.py": "traces graphs with placeholder weights",
        "export/graphs/order.py": "graphs",
        "export/graphs/parts.py": "graphs",
        "export/graphs/projections_body.py": "graphs",
        "export/graphs/projections_op.py": "graphs",
        "export/graphs/repeat.py": "graphs",
        "export/graphs/scan_parts.py": "graphs",
        "export/graphs/shard.py": "graphs",
        "export/graphs/timestep.py": "graphs",
        "export/graphs/ttt_op.py": "graphs",
        "export/graphs/ttt_steps.py": "graphs",
        "export/sources/stored_scale.py": "sets a field of the model's config",
        "export/sources/tokenizer.py": "the tokenizer",
        "planning/shapes.py": "decides which models can be seeded",
        "reference/layout.py": "order of tokens; has no weights",
        "reference/rope.py": "rotary angles; has no weights",
        "reference/ttt.py": "the scan; its weights are the layer's",
        "runtime/bundle.py": _MANIFEST,
        "runtime/presets.py": "sizes; the key has the model's config",
        "runtime/storyboard.py": "the tokenizer",
        "runtime/tokenizer.py": "the tokenizer",
        "runtime/tokenizer_file.py": "the tokenizer",
        "runtime/ttt_op.py": "graphs",
    },
)

GRAPHS = Artefact(
    entry_points=("export/graphs/components.py", "export/graphs/graph.py"),
    sources=(
        "export/graphs/attention_op.py",
        "export/graphs/components.py",
        "export/graphs/graph.py",
        "export/graphs/order.py",
        "export/graphs/parts.py",
        "export/graphs/projections_*.py",
        "export/graphs/quantize.py",
        "export/graphs/repeat.py",
        "export/graphs/scan_parts.py",
        "export/graphs/shard.py",
        "export/graphs/timestep.py",
        "export/graphs/ttt_op.py",
        "export/graphs/ttt_steps.py",
        "export/graphs/weights.py",  # offsets of the weights
        "reference/*.py",
        "runtime/bundle.py",  # names and shapes of inputs
        "runtime/config.py",
        "runtime/dtypes.py",
        "runtime/quantization.py",
        "runtime/ttt_op.py",
    ),
    tools=("onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
    excluded={
        **_NEVER_DECIDES,
        **{f"reference/checkpoints/{name}.py": "values of weights; a graph holds none" for name in _CHECKPOINT_READERS},
    },
)

ENGINES = Artefact(
    entry_points=("export/engines.py", "engines/tensorrt/builder.py"),
    sources=(
        "engines/kernels/compile*.py",
        "engines/kernels/cubin.py",
        "engines/kernels/sizes.py",
        "engines/kernels/tiles.py",
        "engines/kernels/ttt_*.py",
        "engines/tensorrt/builder.py",
        "engines/tensorrt/engine.py",
        "engines/tensorrt/operators.py",
        "engines/tensorrt/package.py",
        "engines/tensorrt/plugin.py",
        "export/engines.py",  # profiles
        "runtime/dtypes.py",
        "runtime/ttt_op.py",
    ),
    tools=("triton",),  # the key has the TensorRT package as a part of its own
    excluded={
        **_NEVER_DECIDES,
        "engines/cuda.py": _EXECUTION,
        "engines/kernels/launch.py": "launches a compiled kernel",
        "engines/tensorrt/memory.py": _EXECUTION,
        "export/code.py": "computes keys",
        "export/keys.py": "computes keys",
        "export/stage.py": "manages the stage",
        "export/swap.py": "manages the stage",
        "planning/fit.py": "warnings",
        "planning/flops.py": "warnings",
        "planning/measured.py": "warnings",
        "planning/memory.py": "warnings, and the workspace's limit, which an engine that is built stays below",
        "planning/report.py": "warnings",
        "planning/shapes.py": "warnings",
        "planning/table.py": "warnings",
        "runtime/bundle.py": _MANIFEST,
        "runtime/config.py": "sizes; the graph has them",
        "runtime/presets.py": "sizes; the graph has them",
        "runtime/quantization.py": "quantised bundles have no engines",
    },
)


@cache
def _normalised_source(source: str) -> str:
    """Python source without comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_docstring(part)]  # type: ignore[attr-defined]  # it has a body
    return ast.unparse(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
