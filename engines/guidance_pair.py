"""Both branches of guidance at once: the positive one here, the negative one in a second process.

A transformer that is loaded here takes a batch of both branches, negative first, as any transformer does. The negative
half goes to a process of its own with the same graph, on the second GPU where there are GPUs, and only its velocity
comes back. Tensors go through memory that the two share. Both halves are passes of batch 1, so the velocities are those
of one process with `low_memory`, to the last bit.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from ttt_video_engine.engines.peer import Peer
from ttt_video_engine.runtime.bundle import Bundle, GraphEntry
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.runner import HostOrDeviceArray, Runner, RunnerLoader

TRANSFORMERS = "transformer-"
"""Prefix of the graphs that run in pairs."""
GPUS = "CUDA_VISIBLE_DEVICES"

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
        what, load = f"{graph}: the process of the negative branch", partial(_load_there, half, graph, gpu)
        self._start: Callable[[], Peer] = partial(Peer, what, entry.inputs, entry.outputs, load)
        self._peer: Peer | None = self._start()  # before the graph is loaded here: both load at once
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


def _load_there(half: MakeLoader, graph: str, gpu: str) -> Runner:
    """Loads a graph in the second process, on the GPU that is its own."""
    os.environ[GPUS] = gpu
    return half()(graph)
