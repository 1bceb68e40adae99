"""All-to-all between processes on one machine, through memory that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import Array

ROOM = 16 << 20
"""Bytes of shared memory for what goes between processes at a time: containers have 64 MiB, unless told otherwise."""


@dataclass(frozen=True)
class Place:
    """A process's place in an exchange; picklable while a process is started. `links` go to each of the others."""

    rank: int
    memory: str
    links: Mapping[int, Connection]

    @property
    def count(self) -> int:
        """Number of processes."""
        return len(self.links) + 1


class Exchange:
    """What one process has of an exchange. All processes must call it for the same tensors in the same order."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._memory = SharedMemory(place.memory)
        self._sent, self._blocks = _layout(self._memory, place.count)

    def all_to_all(self, source: Array, target: Array) -> None:
        """Sends block i of the first axis of `source` to process i, and fills block i of `target` with what it sent.

        Raises BackendError, at once, where a process has ended.
        """
        rank, count = self._place.rank, self._place.count
        given, taken = (array.view(np.uint8).reshape(count, -1) for array in (source, target))
        room = self._blocks.shape[2]
        for start in range(0, given.shape[1], room):
            chunk = given[:, start : start + room]
            size = chunk.shape[1]
            self._blocks[rank, :, :size] = chunk
            self._meet()
            taken[:, start : start + size] = self._blocks[:, rank, :size]
            self._meet()  # only then may the others write over what was read here
        self._sent[rank] += given.nbytes // count * (count - 1)

    def close(self) -> None:
        del self._sent, self._blocks  # the memory cannot be closed under them
        self._memory.close()

    def _meet(self) -> None:
        """Until all processes are here. A message orders what was written before it, which memory alone does not."""
        for other, link in self._place.links.items():
            try:
                link.send_bytes(b"")
            except OSError:
                raise _ended(other, self._place.count) from None
        for other, link in self._place.links.items():
            try:
                link.recv_bytes()
            except (EOFError, OSError):
                raise _ended(other, self._place.count) from None


class Meeting:
    """The memory and the links of an exchange between `count` processes, and their places.

    `started` closes the links here, so that a process that ends is seen by the others.
    """

    def __init__(self, count: int, context: SpawnContext) -> None:
        self._memory = SharedMemory(create=True, size=count * 8 + ROOM)
        self._sent, blocks = _layout(self._memory, count)
        del blocks
        links: list[dict[int, Connection]] = [{} for _ in range(count)]
        for first in range(count):
            for second in range(first + 1, count):
                links[first][second], links[second][first] = context.Pipe()
        self.places = [Place(rank, self._memory.name, links[rank]) for rank in range(count)]

    @property
    def bytes_sent(self) -> list[int]:
        """What each process has sent to others."""
        return [int(sent) for sent in self._sent]

    def started(self) -> None:
        for place in self.places:
            for link in place.links.values():
                link.close()

    def close(self) -> None:
        self.started()
        del self._sent
        self._memory.close()
        self._memory.unlink()


def _layout(memory: SharedMemory, count: int) -> tuple[Array, Array]:
    """Bytes sent by each process [count] int64, and room for the blocks from each to each, [count, count, bytes]."""
    sent: Array = np.ndarray(count, np.int64, memory.buf)
    blocks: Array = np.ndarray((count, count, ROOM // count**2), np.uint8, memory.buf, sent.nbytes)
    return sent, blocks


def _ended(other: int, count: int) -> BackendError:
    return BackendError(f"process {other + 1} of {count} has ended; run the same command again to resume")
