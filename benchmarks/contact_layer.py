"""A step of `first_contact.py`: a layer of the 5B transformer, full width, in the torch engine: time and peak memory.

Modes: engine (the whole graph, as a render runs it), compile (its layer compiled by torch.compile), graph (the layer
alone as a CUDA graph). At 3 s, the engine's output with the kernel is compared to that with the reference's scan.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from contact_rows import add_row
from msgspec.structs import replace
from torch import nn

from ttt_video_engine.engines.torch.compiled import compile_layers
from ttt_video_engine.engines.torch.components import transformer
from ttt_video_engine.engines.torch.runner import TorchRunner, open_device
from ttt_video_engine.engines.torch.scan import find_scan, use_scan
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.transformer import DiffusionTransformer, token_layout
from ttt_video_engine.runtime.bundle import latent_shape
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.runner import TensorSpec

WEIGHT_STD = 0.02
TOLERANCE = 3e-2
"""Of the largest velocity, between two scans of a layer in bfloat16."""
REPETITIONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", default="3s")
    parser.add_argument("--mode", choices=["engine", "compile", "graph"], default="engine")
    options = parser.parse_args()
    for op in ("linear", "mlp"):
        model = preset("5B", op)
        config = replace(model.transformer, num_layers=1)
        size = model.clip_size(options.length)
        module = random_module(lambda config=config: DiffusionTransformer(config))
        scan, name = find_scan(config, "bfloat16", Path("no-cubins"))
        case = {"layer": f"TTT-{op} {options.length}", "tokens": size.num_tokens(config.patch_size), "scan": name}
        if scan is None and options.length != "3s":
            add_row(**case, note="left out: takes too long without a kernel")
            continue
        if options.mode == "graph":
            use_scan(module, scan)
            graph_rows(case, module, size, config)
            continue
        if options.mode == "compile":
            compile_layers(module, scan)
            torch._dynamo.config.suppress_errors = False  # a layer that does not compile is to be seen
        else:
            use_scan(module, scan)
        for batch in (1, 2) if options.mode == "engine" else (2,):
            text = (size.num_scenes, size.text_length, config.text_dim)
            shapes = {"latents": (batch, *latent_shape(model, size)), "text": (batch, *text)}
            random = np.random.default_rng(0)
            inputs = {key: random.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
            inputs["timestep"] = np.full(batch, 499)
            specs = tuple(TensorSpec(key, str(value.dtype), value.shape) for key, value in inputs.items())
            output = TensorSpec("velocity", "float32", shapes["latents"])
            runner = TorchRunner("layer", module, transformer(on_meta_device), (specs, (output,)), open_device("cuda"))
            torch.cuda.reset_peak_memory_stats()
            try:
                first, seconds = timed(lambda runner=runner, inputs=inputs: runner.run(inputs))
            except BackendError as error:
                add_row(**case, batch=batch, note=str(error)[:150], passed=False)
                continue
            velocity = np.asarray(runner.run(inputs)["velocity"])
            row = {**case, "batch": batch, "ms": f"{seconds * 1e3:.1f}", "first ms": f"{first * 1e3:.0f}"}
            row["peak GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
            passed = bool(np.isfinite(velocity).all())
            if options.length == "3s" and batch == 1 and scan is not None and options.mode == "engine":
                plain = random_module(lambda config=config: DiffusionTransformer(config))
                other = TorchRunner(
                    "layer", plain, transformer(on_meta_device), (specs, (output,)), open_device("cuda")
                )
                expected = np.asarray(other.run(inputs)["velocity"])
                error = float(np.abs(velocity - expected).max() / np.abs(expected).max())
                row["error of the kernel"] = f"{error:.1e}"
                passed = passed and error <= TOLERANCE
            add_row(**row, passed=passed)
        del module


def graph_rows(case: dict[str, object], module: nn.Module, size, config) -> None:
    """The layer alone, queued kernel by kernel and as a CUDA graph, batch 2."""
    with torch.inference_mode(), open_device("cuda"):
        options = {"dtype": torch.bfloat16}
        video = torch.empty(2, size.num_frames, config.in_channels, size.height, size.width, **options)
        text = torch.empty(2, size.num_scenes, size.text_length, config.text_dim, **options)
        layout = token_layout(config, video, text)
        x = torch.randn(2, layout.num_tokens, config.model_dim, **options)
        t_emb = torch.randn(2, config.time_embed_dim, **options)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            _, queued = timed(lambda: module.layers[0](x, t_emb, layout))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = module.layers[0](x, t_emb, layout)
            _, launched = timed(graph.replay)
            expected = module.layers[0](x, t_emb, layout)
            torch.cuda.synchronize()
        same = torch.equal(captured, expected)
    add_row(**case, batch=2, **{"ms": f"{queued * 1e3:.2f}", "ms as a graph": f"{launched * 1e3:.2f}"}, passed=same)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first call, and the median of the next."""
    taken = []
    for _ in range(1 + REPETITIONS):
        torch.cuda.synchronize()
        start = perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(perf_counter() - start)
    return taken[0], median(taken[1:])


def random_module(build: Callable[[], nn.Module]) -> nn.Module:
    """The module on the GPU in bfloat16, with the same random weights each time; norm scales are 1."""
    module = on_meta_device(build).to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    for name, weight in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.normal_(mean, WEIGHT_STD, generator=generator)
    return module


if __name__ == "__main__":
    main()
