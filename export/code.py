"""Which code decides what an export writes: the one place that says so.

Files are kept while their code is the same. So an artefact's sources are all modules that decide its bytes, and no
others: 14 GB of weights are not written again for a change in a report. A test walks the imports of the `makers` and
holds that every module it meets is among the sources or, with the reason, aside. The tokenizer is not here: it is made
by every export and compared by its content.
"""

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent

_MANIFEST = "what the manifest holds and how it is checked"
_RUNS = "what runs a graph or says how it went"
_NO_BYTES = {
    "export/graphs/journal.py": "how much of a file is on the disk; what is written is read back",
    "runtime/callbacks.py": "how progress is told",
    "runtime/errors.py": "messages",
    "runtime/files.py": "how files are put on the disk",
    "runtime/graph_files.py": _MANIFEST,
    "runtime/runner.py": _RUNS,
    "runtime/settings.py": _MANIFEST,
    "runtime/user_cache.py": "where caches lie",
    "runtime/verified.py": "which files were read before",
}
_READERS = (
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
    """A kind of file, and what decides its bytes: patterns of `sources` and the `tools`, by their package names.

    `makers` make it. `aside` are modules that they import which decide nothing of it, each with the reason.
    """

    makers: tuple[str, ...]
    sources: tuple[str, ...]
    tools: tuple[str, ...]
    aside: Mapping[str, str]

    def files(self, package: Path = PACKAGE) -> list[Path]:
        """The sources, by name."""
        return sorted({path for pattern in self.sources for path in package.glob(pattern)})

    def digest(self, package: Path = PACKAGE) -> str:
        """Digest of the code of the sources, by their names in the package; comments and docstrings are not code."""
        digest = hashlib.sha256()
        for path in self.files(package):
            digest.update(f"{path.relative_to(package).as_posix()}\0{_code(path.read_text('utf-8'))}\0".encode())
        return digest.hexdigest()


WEIGHTS = Artefact(
    makers=("export/graphs/components.py", "export/graphs/weights.py", "export/sources/source.py"),
    sources=(
        "export/graphs/components.py",  # names and order
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
    ),
    tools=("safetensors", "torch", "transformers"),
    aside={
        **_NO_BYTES,
        "export/graphs/graph.py": "graphs, whose weights are placeholders",
        "export/graphs/repeat.py": "graphs",
        "export/graphs/ttt_op.py": "graphs",
        "export/sources/stored_scale.py": "a size, which is in the model's config",
        "export/sources/tokenizer.py": "the tokenizer",
        "planning/shapes.py": "which models can be seeded",
        "reference/layout.py": "the order of tokens; has no weights",
        "reference/rope.py": "angles; has no weights",
        "reference/ttt.py": "the scan; its weights are the layer's",
        "runtime/bundle.py": _MANIFEST,
        "runtime/presets.py": "sizes, which are in the model's config",
        "runtime/storyboard.py": "the tokenizer",
        "runtime/tokenizer.py": "the tokenizer",
        "runtime/tokenizer_file.py": "the tokenizer",
        "runtime/ttt_op.py": "graphs",
    },
)

GRAPHS = Artefact(
    makers=("export/graphs/components.py", "export/graphs/graph.py"),
    sources=(
        "export/graphs/components.py",
        "export/graphs/graph.py",
        "export/graphs/repeat.py",
        "export/graphs/ttt_op.py",
        "export/graphs/weights.py",  # where each weight lies
        "reference/*.py",
        "runtime/bundle.py",  # names and shapes of inputs
        "runtime/config.py",
        "runtime/dtypes.py",
        "runtime/ttt_op.py",
    ),
    tools=("onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
    aside={
        **_NO_BYTES,
        **{f"reference/checkpoints/{name}.py": "values of weights, which no graph holds" for name in _READERS},
    },
)

ENGINES = Artefact(
    makers=("export/engines.py", "engines/tensorrt/builder.py"),
    sources=(
        "engines/kernels/compile.py",
        "engines/kernels/cubin.py",
        "engines/kernels/tiles.py",
        "engines/kernels/ttt_*.py",
        "engines/tensorrt/builder.py",
        "engines/tensorrt/engine.py",
        "engines/tensorrt/package.py",
        "engines/tensorrt/plugin.py",
        "export/engines.py",  # profiles
        "runtime/dtypes.py",
        "runtime/ttt_op.py",
    ),
    tools=("triton",),  # beside the package that builds, which is a part of the key of its own
    aside={
        **_NO_BYTES,
        "engines/cuda.py": _RUNS,
        "engines/kernels/launch.py": "launches a kernel that is there",
        "engines/tensorrt/checks.py": _RUNS,
        "export/code.py": "what goes into keys",
        "export/keys.py": "what goes into keys",
        "export/stage.py": "where files wait",
        "export/swap.py": "where files wait",
        "planning/fit.py": "warnings",
        "planning/flops.py": "warnings",
        "planning/memory.py": "warnings",
        "planning/report.py": "warnings",
        "planning/shapes.py": "warnings",
        "planning/table.py": "warnings",
        "runtime/bundle.py": _MANIFEST,
        "runtime/config.py": "sizes, which are those of the graph",
        "runtime/presets.py": "sizes, which are those of the graph",
    },
)


@cache
def _code(source: str) -> str:
    """Source as Python understands it: without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]  # it has one
    return ast.unparse(tree)


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
