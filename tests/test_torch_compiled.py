"""Compiled layers of `--engine torch`: compiled whole, once, equal to the reference, or run as they are.

No GPU compiles here: TorchDynamo traces the layers for a backend that runs what was traced.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from ttt_video_engine.engines.torch.compiled import cannot_compile, compile_layers
from ttt_video_engine.engines.torch.components import transformer
from ttt_video_engine.engines.torch.runner import TorchRunner
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt import ttt_linear
from ttt_video_engine.runtime.bundle import latent_shape
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.runner import TensorSpec

MODEL = tiny("linear")
CONFIG = replace(MODEL.transformer, num_layers=4)
SIZE = MODEL.clip_size("9s")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    before = torch._dynamo.config.suppress_errors
    yield
    torch._dynamo.config.suppress_errors = before


def velocities(compiling: Callable[[DiffusionTransformer], None], steps: int = 2) -> list[np.ndarray[Any, Any]]:
    """Of some steps, with the same weights and inputs each time this is called."""
    generator = torch.Generator().manual_seed(0)
    module = DiffusionTransformer(CONFIG).eval().requires_grad_(False)
    for weight in module.parameters():
        weight.normal_(0, 0.1, generator=generator)
    compiling(module)
    shapes = {
        "latents": (2, *latent_shape(MODEL, SIZE)),
        "text": (2, SIZE.num_scenes, SIZE.text_length, CONFIG.text_dim),
    }
    inputs = {name: torch.randn(shape, generator=generator).numpy() for name, shape in shapes.items()}
    inputs["timestep"] = np.array([979, 499])
    specs = tuple(TensorSpec(name, str(value.dtype), value.shape) for name, value in inputs.items())  # type: ignore[arg-type]
    outputs = (TensorSpec("velocity", "float32", shapes["latents"]),)
    component = transformer(lambda: module)
    with TorchRunner("transformer-9s", module, component, (specs, outputs), torch.device("cpu")) as runner:
        return [np.asarray(runner.run(inputs)["velocity"]) for _ in range(steps)]


def test_all_layers_are_one_program_that_calls_the_scan() -> None:
    programs, scans = [], []

    def backend(program: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        programs.append(program)
        return program.forward

    def scan(*inputs: Tensor) -> Tensor:
        scans.append(inputs[0].shape)
        return ttt_linear(*inputs)

    (expected,) = velocities(lambda module: None, steps=1)
    for found in velocities(lambda module: compile_layers(module, scan, backend=backend)):
        np.testing.assert_array_equal(found, expected)
    assert len(programs) == 1
    assert len(scans) == 2 * CONFIG.num_layers * 2  # both directions of each layer, two steps


def test_layers_that_do_not_compile_run_as_they_are() -> None:
    def backend(program: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no such instruction")

    (expected,) = velocities(lambda module: None, steps=1)
    for found in velocities(lambda module: compile_layers(module, ttt_linear, backend=backend)):
        np.testing.assert_array_equal(found, expected)


def test_what_keeps_layers_from_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert "GPU" in cannot_compile(torch.device("cpu"), ttt_linear, has_ttt=True)
    assert "scan" in cannot_compile(gpu, None, has_ttt=True)
    monkeypatch.setenv("PATH", "")
    assert cannot_compile(gpu, None, has_ttt=False)
    assert cannot_compile(gpu, ttt_linear, has_ttt=True)
