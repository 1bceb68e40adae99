"""A graph in a process of its own, which ends with the one that started it. They share the memory of its tensors."""

import math
import signal
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import BackendError, TTTVideoError
from ttt_video_engine.runtime.runner import Runner, TensorSpec

CONTEXT = get_context("spawn")
_ALIGNMENT = 64
_STOP_SECONDS = 5.0

Load = Callable[[], Runner]
"""Loads the graph in the process that calls it; sent to another one, so it must be picklable."""


class Peer:
    """The other process, seen from here: `begin`, then `finish`, for each pass of batch 1.

    `what` says in messages which process it is: "transformer-3s: the process of …".
    """

    def __init__(self, what: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], load: Load) -> None:
        self._what = what
        self._tensors = _Tensors((*inputs, *outputs))
        self._outputs = [spec.name for spec in outputs]
        self._ready = False
        self._connection, theirs = CONTEXT.Pipe()
        job = (theirs, self._tensors.name, inputs, outputs, load)
        self._process = CONTEXT.Process(target=_serve, args=job, daemon=True)
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

    @property
    def handles(self) -> list[Connection | int]:
        """What `multiprocessing.connection.wait` finds ready when `finish` does not have to wait."""
        return [self._connection, self._process.sentinel]

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
        wait(self.handles)
        try:
            if not self._connection.poll():
                raise EOFError
            failure: str | None = self._connection.recv()
        except (EOFError, OSError):
            raise self._has_ended() from None
        if failure is not None:
            raise BackendError(f"{self._what} failed ({failure})")

    def _has_ended(self) -> BackendError:
        self._process.join(_STOP_SECONDS)
        return BackendError(
            f"{self._what} ended with exit code {self._process.exitcode}; run the same command again to resume"
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


def _serve(
    connection: Connection, tensors: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], load: Load
) -> None:
    """The other process: says None when it has loaded and after each pass, or what went wrong, and then ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    shared = _Tensors((*inputs, *outputs), tensors)
    try:
        with load() as runner:
            connection.send(None)
            while True:
                connection.recv()
                found = runner.run({spec.name: shared.arrays[spec.name] for spec in inputs})
                for name, array in found.items():
                    shared.arrays[name][...] = np.asarray(array)
                connection.send(None)
    except (EOFError, BrokenPipeError):
        pass  # the first process has closed the connection, or is gone
    except TTTVideoError as error:
        connection.send(str(error))
    finally:
        shared.close()
