"""One transformer over N processes of this machine: each computes a part of the tokens, and of the heads where it must.

The graph for N devices has a collective wherever tokens and heads are exchanged (`export/graphs/shard.py`). ONNX
Runtime gets an operator for it, which sends through memory that the processes share. Branches of guidance run one after
the other.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ttt_video_engine.engines.exchange import Exchange, Meeting, Place
from ttt_video_engine.engines.guidance_pair import TRANSFORMERS
from ttt_video_engine.engines.ort_c import OperatorRunner
from ttt_video_engine.engines.peer import CONTEXT, Peer
from ttt_video_engine.runtime.bundle import RANK, Bundle, sharded_name
from ttt_video_engine.runtime.runner import Array, HostOrDeviceArray, Runner, RunnerLoader, TensorSpec, check_inputs
from ttt_video_engine.runtime.ttt_op import COLLECTIVE, DOMAIN


@dataclass(frozen=True)
class ShardedGraphFile:
    """A graph for several devices, with its signature; `num_threads` are those of each process, 0 for all cores."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    devices: int
    num_threads: int = 0


class ShardedLoader:
    """Loads the transformers of a bundle over `devices` processes, all else with `whole`."""

    def __init__(self, bundle: Bundle, whole: RunnerLoader, devices: int, num_threads: int) -> None:
        self._bundle, self._whole = bundle, whole
        self._devices, self._num_threads = devices, num_threads

    def check(self, graphs: Iterable[str]) -> None:
        self._whole.check(self._name(graph) for graph in graphs)

    def environment(self) -> dict[str, str]:
        return {**self._whole.environment(), "devices": str(self._devices)}

    def __call__(self, graph: str) -> Runner:
        if not graph.startswith(TRANSFORMERS):
            return self._whole(graph)
        entry = self._bundle.graph(self._name(graph))
        path = self._bundle.path(entry.file)
        return ShardedRunner(ShardedGraphFile(path, entry.inputs, entry.outputs, self._devices, self._num_threads))

    def _name(self, graph: str) -> str:
        return sharded_name(graph, self._devices) if graph.startswith(TRANSFORMERS) else graph


class ShardedRunner:
    """A transformer in as many processes as its graph is for."""

    def __init__(self, file: ShardedGraphFile) -> None:
        self._name = file.path.name
        self.inputs = tuple(spec for spec in file.inputs if spec.name != RANK)
        self._start: Callable[[], _Group] = partial(_Group, file, self.inputs)
        self._group: _Group | None = self._start()

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, Array]:
        """As `Runner.run`. Also raises BackendError, at once, where a process fails or has ended; the next run starts
        others."""
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        check_inputs(self._name, self.inputs, arrays)
        self._group = self._group or self._start()
        try:
            rows = [
                self._group.run({name: array[row : row + 1] for name, array in arrays.items()})
                for row in range(len(next(iter(arrays.values()))))
            ]
        except BaseException:
            self._stop()
            raise
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    @property
    def bytes_sent(self) -> list[int]:
        """What each process has sent to the others since it was started."""
        return [] if self._group is None else self._group.meeting.bytes_sent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.stop()


class _Group:
    """The processes, from their start to their end."""

    def __init__(self, file: ShardedGraphFile, inputs: tuple[TensorSpec, ...]) -> None:
        count = file.devices
        with ExitStack() as stack:
            self.meeting = Meeting(count, CONTEXT)
            stack.callback(self.meeting.close)
            self._peers: list[Peer] = []
            for place in self.meeting.places:
                what = f"{file.path.name}: process {place.rank + 1} of {count}"
                self._peers.append(Peer(what, inputs, file.outputs, partial(_Part, file, place)))
                stack.callback(self._peers[-1].stop)
            self.meeting.started()
            self._open = stack.pop_all()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for peer in self._peers:
            peer.begin(inputs)
        results: dict[int, dict[str, Array]] = {}
        while len(results) < len(self._peers):
            left = {rank: peer for rank, peer in enumerate(self._peers) if rank not in results}
            ready = wait([handle for peer in left.values() for handle in peer.handles])
            results |= {
                rank: peer.finish() for rank, peer in left.items() if any(handle in ready for handle in peer.handles)
            }
        return results[0]

    def stop(self) -> None:
        self._open.close()


class _Part:
    """The runner of one of the processes, in it."""

    def __init__(self, file: ShardedGraphFile, place: Place) -> None:
        self._rank = np.array([place.rank], np.int64)
        with ExitStack() as stack:
            exchange = Exchange(place)
            stack.callback(exchange.close)
            operators = {COLLECTIVE: exchange.all_to_all}
            self._runner = stack.enter_context(
                OperatorRunner(file.path, file.inputs, file.outputs, (DOMAIN, operators), file.num_threads)
            )
            self._open = stack.pop_all()

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, Array]:
        return self._runner.run({**inputs, RANK: self._rank})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
