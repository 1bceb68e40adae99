"""Both branches of guidance at once: the positive one here, the negative one in a second process.

A transformer that is loaded here takes a batch of both branches, negative first, as any transformer does. The negative
half goes to a process of its own with the same graph, on the second GPU where there are GPUs, and only its velocity
comes back. Tensors go through memory that the two share. Both halves are passes of batch 1, so the velocities are those
of one process with `low_memory`, to the last bit.
"""

import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.bundle import Bundle, GraphEntry
from ttt_video_engine.runtime.errors import BackendError, ConfigError, TTTVideoError
from ttt_video_engine.runtime.runner import HostOrDeviceArray, Runner, RunnerLoader, TensorSpec

TRANSFORMERS = "transformer-"
"""Prefix of the graphs that run in pairs."""
GPUS = "CUDA_VISIBLE_DEVICES"
_ALIGNMENT = 64
_STOP_SECONDS = 5.0

MakeLoader = Callable[[], RunnerLoader]
"""Makes the loader of a half in the process that calls it; sent to the second one, so it must be picklable."""


def second_gpu() -> str:
    """What the second process is to see of the GPUs. Raises ConfigError where this process may see only one."""
    visible = os.environ.get(GPUS, "0,1").split(",")
    if len(visible) < 2:
        raise ConfigError(f"--guidance-parallel takes two GPUs; {GPUS} names {len(visible)}: name two, or leave it out")
    return visible[1]


class PairLoader:
    """Loads the transformers of a bundle as pairs, with `half` in each of the two processes; all else with `whole`."""

    def __init__(self, bundle: Bundle, whole: RunnerLoader, half: MakeLoader) -> None:
        self._bundle, self._whole, self._half = bundle, whole, half
        self._gpu = second_gpu()

    def check(self, graphs: Iterable[str]) -> None:
        self._whole.check(graphs)

    def environment(self) -> dict[str, str]:
        return {**self._whole.environment(), "guidance": "parallel"}

    def __call__(self, graph: str) -> Runner:
        if not graph.startswith(TRANSFORMERS):
            return self._whole(graph)
        return _PairedRunner(graph, self._bundle.graph(graph), self._half, self._gpu)


class _PairedRunner:
    """A transformer of which the first of two rows of a batch runs in the second process."""

    def __init__(self, graph: str, entry: GraphEntry, half: MakeLoader, gpu: str) -> None:
        self._start: Callable[[], _Peer] = partial(_Peer, graph, entry, half, gpu)
        self._peer: _Peer | None = self._start()  # before the graph is loaded here: both load at once
        with ExitStack() as stack:
            stack.callback(self._stop)
            self._here = stack.enter_context(half()(graph))
            self._open = stack.pop_all()

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> Mapping[str, HostOrDeviceArray]:
        """As `Runner.run`. Also raises BackendError, at once, where the second process fails or has ended; the next run
        starts another."""
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        if len(arrays["latents"]) == 1:
            return self._here.run(arrays)
        self._peer = self._peer or self._start()
        try:
            self._peer.begin({name: array[:1] for name, array in arrays.items()})
            positive = self._here.run({name: array[1:] for name, array in arrays.items()})
            negative = self._peer.finish()
        except BaseException:
            self._stop()
            raise
        return {name: np.concatenate([negative[name], np.asarray(half)]) for name, half in positive.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _stop(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.stop()


class _Peer:
    """The second process, seen from the first: `begin`, then `finish`, for each pass."""

    def __init__(self, graph: str, entry: GraphEntry, half: MakeLoader, gpu: str) -> None:
        self._graph = graph
        self._tensors = _Tensors((*entry.inputs, *entry.outputs))
        self._outputs = [spec.name for spec in entry.outputs]
        self._ready = False
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        job = (theirs, self._tensors.name, graph, entry, half, gpu)
        self._process = context.Process(target=_serve, args=job, daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Hands over the inputs, once the process has loaded its graph."""
        if not self._ready:
            self._await()
            self._ready = True
        for name, array in inputs.items():
            self._tensors.arrays[name][...] = array
        try:
            self._connection.send("run")
        except OSError:
            raise self._has_ended() from None

    def finish(self) -> dict[str, NDArray[Any]]:
        """The outputs of the pass that was begun."""
        self._await()
        return {name: self._tensors.arrays[name].copy() for name in self._outputs}

    def stop(self) -> None:
        """Ends the process: one that is idle by itself, when it is told, any other is killed."""
        self._connection.close()
        self._process.join(0 if not self._ready else _STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._tensors.close()

    def _await(self) -> None:
        """Until the process says that it is done. Raises BackendError where it fails or ends instead."""
        wait([self._connection, self._process.sentinel])
        try:
            if not self._connection.poll():
                raise EOFError
            failure: str | None = self._connection.recv()
        except (EOFError, OSError):
            raise self._has_ended() from None
        if failure is not None:
            raise BackendError(f"{self._graph}: the process of the negative branch failed ({failure})")

    def _has_ended(self) -> BackendError:
        self._process.join(_STOP_SECONDS)
        return BackendError(
            f"{self._graph}: the process of the negative branch ended with exit code {self._process.exitcode}; "
            "run the same command again to resume"
        )


class _Tensors:
    """The inputs and outputs of a graph at batch 1, in memory that processes share: new, or that of a name."""

    def __init__(self, specs: Iterable[TensorSpec], name: str | None = None) -> None:
        shapes = {spec.name: tuple(1 if isinstance(axis, str) else axis for axis in spec.shape) for spec in specs}
        dtypes = {spec.name: np.dtype(spec.array_dtype) for spec in specs}
        offsets, size = {}, 0
        for key, shape in shapes.items():
            offsets[key] = size
            size += -(-math.prod(shape) * dtypes[key].itemsize // _ALIGNMENT) * _ALIGNMENT
        self._memory = SharedMemory(name, create=name is None, size=size)
        self._owned = name is None
        self.name = self._memory.name
        self.arrays: dict[str, NDArray[Any]] = {
            key: np.ndarray(shape, dtypes[key], self._memory.buf, offsets[key]) for key, shape in shapes.items()
        }

    def close(self) -> None:
        self.arrays.clear()  # the memory cannot be closed under them
        self._memory.close()
        if self._owned:
            self._memory.unlink()


def _serve(connection: Connection, tensors: str, graph: str, entry: GraphEntry, half: MakeLoader, gpu: str) -> None:
    """The second process: says None when it has loaded and after each pass, or what went wrong, and then ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    os.environ[GPUS] = gpu
    shared = _Tensors((*entry.inputs, *entry.outputs), tensors)
    try:
        with half()(graph) as runner:
            connection.send(None)
            while True:
                connection.recv()
                outputs = runner.run({spec.name: shared.arrays[spec.name] for spec in entry.inputs})
                for name, array in outputs.items():
                    shared.arrays[name][...] = np.asarray(array)
                connection.send(None)
    except (EOFError, BrokenPipeError):
        pass  # the first process has closed the connection, or is gone
    except TTTVideoError as error:
        connection.send(str(error))
    finally:
        shared.close()
