"""What a TTT plugin says of inputs that do not fit."""

import pytest
from messages import refused_with

from ttt_video_engine.engines.tensorrt.operators import ProjectionsOperator, ScanOperator
from ttt_video_engine.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("position", "shape", "values"),
    [
        (0, (2, 4, 28, 16), ("XQ", "[B, H, NC, CS, F]")),
        (2, (2, 4, 28, 16, 8), ("XV", [2, 4, 28, 16, 16])),
        (3, (2, 4, 28, 1), ("eta", [2, 4, 28, 16])),
        (6, (2, 4, 16, 16), ("W1", [4, 16, 16])),
    ],
)
def test_a_plugin_names_the_input_that_does_not_fit(
    position: int, shape: tuple[int, ...], values: tuple[object, ...]
) -> None:
    clip = (2, 4, 28, 16, 16)
    shapes: list[tuple[int, ...]] = [clip, clip, clip, clip[:4], (4, 16), (4, 16), (4, 16, 16), (4, 1, 16)]
    operator = ScanOperator("linear")
    operator.check("layers.0", shapes)
    operator.check("layers.0", [(-1, *shape[1:]) if len(shape) > 3 else shape for shape in shapes])
    shapes[position] = shape
    with refused_with(BackendError, "ai.ttt::TTTLinear", "layers.0", list(shape), *values):
        operator.check("layers.0", shapes)
    with refused_with(BackendError, "ai.ttt::TTTLinear", "layers.0", 9, "XQ", "XK", "XV", "eta", "W1"):
        operator.check("layers.0", [*shapes, (1,)])


@pytest.mark.parametrize(
    ("position", "shape", "values"),
    [
        (0, (2, 4, 28, 16), ("XQ", "[B, L, D]")),
        (2, (2, 448, 32), ("XV", [2, 448, 64])),
        (3, (2, 448, 64), ("rate_logits", [2, 448, 4])),
        (4, (1,), ("rate_scale", [])),
        (6, (28, 16, 16), ("sin", [28, 16, 8])),
        (7, (448,), ("tokens", "[NC, CS]")),
        (8, (16, 28), ("rate_tokens", [28, 16])),
        (9, (64,), ("norm_weight", "[H, F]")),
        (13, (4, 64, 64), ("W2", [4, 64, 16])),
    ],
)
def test_a_plugin_of_version_2_names_the_input_that_does_not_fit(
    position: int, shape: tuple[int, ...], values: tuple[object, ...]
) -> None:
    clip, angles, table = (2, 448, 64), (28, 16, 8), (28, 16)
    shapes: list[tuple[int, ...]] = [clip, clip, clip, (2, 448, 4), (), angles, angles, table, table]
    shapes += [(4, 16), (4, 16), (4, 16, 64), (4, 1, 64), (4, 64, 16), (4, 1, 16)]
    operator = ProjectionsOperator("mlp")
    operator.check("layers.0", shapes)
    operator.check("layers.0", [(-1, *shape[1:]) if number < 4 else shape for number, shape in enumerate(shapes)])
    shapes[position] = shape
    with refused_with(BackendError, "ai.ttt::TTTMLP", "layers.0", list(shape), *values):
        operator.check("layers.0", shapes)
    with refused_with(BackendError, "ai.ttt::TTTMLP", "layers.0", 16, "XQ", "tokens", "W1"):
        operator.check("layers.0", [*shapes, (1,)])
