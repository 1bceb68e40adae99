"""The 5B transformer's graphs for every length, traced and checked without a single weight in memory."""

import argparse
import gc
import tempfile
from pathlib import Path
from time import perf_counter

import onnx
import torch
from measure import forget_peak, peak_memory, so_far, table

from ttt_video_engine.export import graph as onnx_graph
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.components import transformer_graph
from ttt_video_engine.export.ttt_op import DOMAIN
from ttt_video_engine.export.weights import lay_out
from ttt_video_engine.reference.initialise import hollow
from ttt_video_engine.reference.stored import held
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, TTTKind
from ttt_video_engine.runtime.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttt", choices=["linear", "mlp"], action="append")
    parser.add_argument("--length", choices=list(SCENES_PER_LENGTH), action="append")
    options = parser.parse_args()
    rows = []
    for ttt in options.ttt or ("linear", "mlp"):
        for length in options.length or SCENES_PER_LENGTH:
            gc.collect()
            forget_peak()
            rows.append(so_far(row(ttt, length)))
    print(
        table(["transformer", "tokens", "TTT nodes", "XQ", "graph bytes", "weight bytes", "seconds", "peak GiB"], rows)
    )


def row(ttt: TTTKind, length: str) -> list[str]:
    model = preset("5B", ttt)
    tokens = model.clip_size(length).num_tokens(model.transformer.patch_size)
    start = perf_counter()
    graph = transformer_graph(hollow(lambda: DiffusionTransformer(model.transformer)), model, length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        weights = lay_out(held(graph.module.state_dict()), path.with_name(WEIGHTS_FILE), torch.float32)
        onnx_graph.save(onnx_graph.trace(graph), path, weights, ttt)  # with onnx's checker
        seconds, size = perf_counter() - start, path.stat().st_size
        proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    shapes = {value.name: shape(value) for value in (*proto.graph.value_info, *proto.graph.input)}
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    config = model.transformer
    clip = ("batch", config.num_heads, tokens // config.mini_batch_size, config.mini_batch_size, config.head_dim)
    for node in nodes:
        for name, expected in zip([*node.input[:4], node.output[0]], [clip, clip, clip, clip[:4], clip], strict=True):
            if shapes[name] != expected:
                raise SystemExit(f"{ttt} {length}: {node.name}: {name} is {shapes[name]}; must be {expected}")
    if len(nodes) != 2 * config.num_layers:
        raise SystemExit(f"{ttt} {length}: {len(nodes)} TTT nodes; must be {2 * config.num_layers}")
    total = sum(length for _, length in weights.places.values())
    cells = [f"5B {ttt} {length}", f"{tokens:,}", f"{len(nodes)}", str(list(clip)).replace("'", "")]
    return [*cells, f"{size:,}", f"{total:,}", f"{seconds:.0f}", f"{peak_memory() / 2**30:.2f}"]


def shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


if __name__ == "__main__":
    main()
