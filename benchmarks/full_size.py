"""Traces and checks the graphs of the 5B model for every length and both kinds of TTT, without weights in memory."""

import argparse
import gc
import tempfile
from pathlib import Path
from time import perf_counter

import onnx
import torch
from measure import peak_memory, print_row, reset_peak, table
from torch import nn

from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import Graph, save, trace
from ttt_video_engine.export.graphs.weights import lay_out
from ttt_video_engine.reference.checkpoints.lazy import lazy_state
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, ModelConfig, TTTChoice
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.ttt_op import DOMAIN, num_scans

DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttt", choices=["linear", "mlp", "none"], action="append")
    parser.add_argument("--length", choices=list(SCENES_PER_LENGTH), action="append")
    options = parser.parse_args()
    rows = []
    kinds: list[TTTChoice] = options.ttt or ["linear", "mlp", "none"]
    for ttt in kinds:
        model = preset("5B", ttt)
        rows += component_rows(
            model, with_placeholder_weights(lambda m=model: DiffusionTransformer(m.transformer), DTYPE), options.length
        )  # type: ignore[misc]
    model = preset("5B")
    if options.length is None:
        rows += component_rows(model, with_placeholder_weights(lambda: TextEncoder(model.text_encoder), DTYPE))
        rows += component_rows(model, with_placeholder_weights(lambda: VaeDecoder(model.vae), DTYPE))
    print(table(["graph", "tokens", "TTT nodes", "XQ", "graph bytes", "weight bytes", "seconds", "peak GiB"], rows))


def component_rows(model: ModelConfig, module: nn.Module, lengths: list[str] | None = None) -> list[list[str]]:
    return [
        print_row(row(model, graph)) for graph in component_graphs(module, model, lengths or list(SCENES_PER_LENGTH))
    ]


def row(model: ModelConfig, graph: Graph) -> list[str]:
    """Saves a graph, which runs onnx's checker, infers its shapes, and checks the shapes of its TTT nodes."""
    gc.collect()
    reset_peak()
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        weights = lay_out(lazy_state(graph.module.state_dict()), path.with_name(WEIGHTS_FILE), DTYPE)
        save(trace(graph), path, weights, graph.ttt)
        seconds, size = perf_counter() - start, path.stat().st_size
        proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    name, cells = graph.name, ["", "", ""]
    if graph.component == "transformer":
        name, cells = f"{graph.name}, {model.transformer.ttt}", check_scans(model, graph, proto)
    return [name, *cells, f"{size:,}", f"{weights.size:,}", f"{seconds:.0f}", f"{peak_memory() / 2**30:.2f}"]


def check_scans(model: ModelConfig, graph: Graph, proto: onnx.ModelProto) -> list[str]:
    """The cells of the columns tokens, TTT nodes and XQ. Raises SystemExit if the shapes of a node are wrong."""
    config, size = model.transformer, model.clip_size(graph.length)
    tokens = size.num_tokens(config.patch_size)
    shapes = {value.name: shape(value) for value in (*proto.graph.value_info, *proto.graph.input)}
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    wanted = num_scans(config, size, graph.op_version) if config.ttt_kind else 0
    if len(nodes) != wanted:
        raise SystemExit(f"{graph.name}: {len(nodes)} TTT nodes; must be {wanted}")
    mini_batches = tokens // config.mini_batch_size
    parts = max(1, len(nodes) // (2 * config.num_layers))
    for number, node in enumerate(nodes):
        first, end = (mini_batches * place // parts for place in (number % parts, number % parts + 1))
        rows = ("batch", (end - first) * config.mini_batch_size)
        clip, logits = (*rows, config.model_dim), (*rows, config.num_heads)
        for name, expected in zip([*node.input[:4], node.output[0]], [clip, clip, clip, logits, clip], strict=True):
            if shapes[name] != expected:
                raise SystemExit(f"{graph.name}: {node.name}: {name} is {shapes[name]}; must be {expected}")
    read = shapes[nodes[0].input[0]] if nodes else ()
    return [f"{tokens:,}", f"{len(nodes)}", str(list(read)).replace("'", "") if nodes else ""]


def shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


if __name__ == "__main__":
    main()
