"""All-to-all through shared memory, and the operator that ONNX Runtime calls for it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.helper import np_dtype_to_tensor_dtype as onnx_dtype

from ttt_video_engine.engines.exchange import ROOM, Exchange, Meeting
from ttt_video_engine.engines.ort_c import Compute, OperatorRunner
from ttt_video_engine.engines.peer import CONTEXT
from ttt_video_engine.export.graphs.graph import OPSET, read_signature
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import Array
from ttt_video_engine.runtime.ttt_op import COLLECTIVE, DOMAIN


@pytest.fixture(params=[2, 3, 8])
def meeting(request: pytest.FixtureRequest) -> Iterator[Meeting]:
    opened = Meeting(request.param, CONTEXT)
    yield opened
    opened.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", ["one", "room", "more"])
def test_each_gets_its_block_of_everyone(meeting: Meeting, size: str, dtype: str) -> None:
    count, item = len(meeting.places), np.dtype(dtype).itemsize
    room = ROOM // count**2 // item
    shape = (count, 1, {"one": 1, "room": room, "more": 2 * room + 3}[size])
    given = [np.random.default_rng(rank).standard_normal(shape).astype(dtype) for rank in range(count)]
    taken = [np.empty_like(array) for array in given]
    exchanges = [Exchange(place) for place in meeting.places]
    with ThreadPoolExecutor(count) as threads:
        for _ in range(2):  # what was read of the first must not be in the second
            list(threads.map(Exchange.all_to_all, exchanges, given, taken))
            np.testing.assert_array_equal(np.stack(taken), np.stack(given).swapaxes(0, 1))
            given = [array + 1 for array in given]
    assert meeting.bytes_sent == [2 * given[0].nbytes // count * (count - 1)] * count
    for exchange in exchanges:
        exchange.close()


def test_who_has_ended_is_named_at_once() -> None:
    meeting = Meeting(2, CONTEXT)
    exchange = Exchange(meeting.places[0])
    meeting.places[1].links[0].close()
    with pytest.raises(BackendError, match="process 2 of 2"):
        exchange.all_to_all(np.zeros((2, 1)), np.zeros((2, 1)))
    exchange.close()
    meeting.close()


def graph(folder: Path, dtype: str) -> Path:
    """Twice what the operator makes of x, the doubling a function of the operator's own domain."""
    body = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]> Twice (X) => (Y) {{ Y = Add (X, X) }}'
    nodes = [make_node(COLLECTIVE, ["x"], ["y"], domain=DOMAIN), make_node("Twice", ["y"], ["z"], domain=DOMAIN)]
    x, z = (make_tensor_value_info(name, onnx_dtype(np.dtype(dtype)), [2, "batch", 3]) for name in "xz")
    opsets = [make_opsetid("", OPSET), make_opsetid(DOMAIN, 2)]
    functions = [onnx.parser.parse_function(body)]
    model = make_model(make_graph(nodes, "g", [x], [z]), opset_imports=opsets, ir_version=10, functions=functions)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def opened(path: Path, compute: Compute) -> OperatorRunner:
    return OperatorRunner(path, *read_signature(path), (DOMAIN, {COLLECTIVE: compute}), 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_operator_can_be_a_function(dtype: str, tmp_path: Path) -> None:
    def compute(source: Array, target: Array) -> None:
        target[...] = source[::-1]

    with opened(graph(tmp_path, dtype), compute) as runner:
        for batch in (1, 2, 0):
            x = np.random.default_rng(batch).standard_normal((2, batch, 3)).astype(dtype)
            found = runner.run({"x": x})["z"]
            np.testing.assert_array_equal(found, 2 * x[::-1])
            assert found.dtype == dtype
        with pytest.raises(BackendError, match="float64"):
            runner.run({"x": x.astype(np.float64)})
    with pytest.raises(BackendError):
        runner.run({"x": x})


def test_what_it_raises_fails_the_run_alone(tmp_path: Path) -> None:
    answers = iter([ValueError("no answer from 3"), None])

    def compute(source: Array, target: Array) -> None:
        answer = next(answers)
        if answer is not None:
            raise answer
        target[...] = source

    x = np.ones((2, 1, 3), np.float32)
    with opened(graph(tmp_path, "float32"), compute) as runner:
        with pytest.raises(BackendError, match="no answer from 3"):
            runner.run({"x": x})
        np.testing.assert_array_equal(runner.run({"x": x})["z"], 2 * x)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    path = graph(tmp_path, "float32")
    signature = read_signature(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=str(path)):
        OperatorRunner(path, *signature, (DOMAIN, {}), 1)
