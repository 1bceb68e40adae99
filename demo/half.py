"""Renders held-out storyboards with the transformer in half precision:

    python -m demo.half bfloat16 output/judge-3.jsonl --bundle bundles/demo --output-dir output/bfloat16

ONNX Runtime does not compute in bfloat16 on CPUs, PyTorch does. The text encoder and the decoder stay in float32, so
that what differs is the transformer. The same command resumes.
"""

import argparse
from pathlib import Path

from msgspec.structs import replace

from ttt_video_engine.engines.torch.components import component_of
from ttt_video_engine.engines.torch.runner import TorchLoader, TorchRunner
from ttt_video_engine.engines.torch.weights import TORCH_DTYPES, named_by_graph, with_stored_weights
from ttt_video_engine.runtime.bundle import Bundle, open_bundle, transformer_graph_name
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.jobs import in_shard
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.storyboard import load_storyboards


class HalfLoader(TorchLoader):
    """Loads the graphs of a float32 bundle, transformers in `dtype`, on the CPU."""

    def __init__(self, bundle: Bundle, dtype: DType) -> None:
        super().__init__(bundle, device="cpu")
        self._source, self._dtype = bundle, dtype

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "transformer": self._dtype}

    def __call__(self, graph: str) -> TorchRunner:
        manifest = self._source.manifest
        if graph not in map(transformer_graph_name, manifest.lengths):
            return super().__call__(graph)
        entry, component = manifest.graphs[graph], component_of(graph, manifest.model)
        files = (self._source.path(entry.file), self._source.path(entry.weights))
        weights = named_by_graph(*files, component.prefix, manifest.dtype)
        module = with_stored_weights(component.build, weights, self._device).to(TORCH_DTYPES[self._dtype])
        return TorchRunner(graph, module, component, (entry.inputs, entry.outputs), self._device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("storyboards", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--shard", default="1/1")
    arguments = parser.parse_args()
    index, count = (int(part) for part in arguments.shard.split("/"))
    bundle = open_bundle(arguments.bundle)
    boards = [board for board in load_storyboards(arguments.storyboards) if in_shard(board, index, count)]
    settings = replace(bundle.manifest.defaults, num_steps=arguments.num_steps)
    Pipeline(bundle, HalfLoader(bundle, arguments.dtype)).render(boards, settings, arguments.output_dir)


if __name__ == "__main__":
    main()
