"""`sample --ray`: the actors that render, and what the command does with them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from queue import SimpleQueue
from time import sleep
from typing import Any

import numpy as np

from ttt_video_engine.commands.replica import Order, Replica, local_bundle
from ttt_video_engine.commands.stopping import StopSignals
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.events import Event, OnEvent, Outcome, RenderWarning, VideoBusy
from ttt_video_engine.runtime.storyboard import Storyboard

BUSY_TRIES = 30
"""Seconds that a worker waits for a video that another process has: it may be one that is about to end."""
_NO_ARRAY = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Cluster:
    """Where the workers are, and how many of which size; None leaves it to the GPUs of the cluster."""

    address: str
    workers: int | None = None
    gpus_per_worker: float | None = None


class RayReplica:
    """An actor. What it has to say are events of the video that it renders."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._replica: Replica | None = None
        self._events = SimpleQueue[Event | None]()
        self._video = ""

    def ready(self) -> None:
        """Raises what is wrong with the order here, such as a missing GPU."""
        bundle = open_bundle(local_bundle(self._order.bundle, self._warn))
        self._replica = Replica(bundle, self._order, self._warn)

    def render(self, board: Storyboard, overwrite: bool) -> Iterator[Event]:
        """The events of a video, without arrays; the last is its outcome."""
        self._events, self._video = SimpleQueue(), board.name
        with ThreadPoolExecutor(1) as pool:
            rendering = pool.submit(self._render, board, overwrite)
            rendering.add_done_callback(lambda _: self._events.put(None))
            while (event := self._events.get()) is not None:
                yield event
            rendering.result()

    def _render(self, board: Storyboard, overwrite: bool) -> None:
        assert self._replica is not None  # `ready` is called first
        for attempt in range(BUSY_TRIES):
            jobs = self._replica.prepare([board], overwrite=overwrite)
            outcomes = self._replica.run(jobs, self._report)
            busy = [outcome for outcome in outcomes.values() if isinstance(outcome, VideoBusy)]
            if not busy:
                return
            if attempt + 1 == BUSY_TRIES:
                self._events.put(busy[0])
            else:
                sleep(1)

    def _report(self, event: Event) -> None:
        if not isinstance(event, VideoBusy):  # until all tries are used
            self._events.put(_without_arrays(event))

    def _warn(self, message: str) -> None:
        self._events.put(RenderWarning(self._video, message))


def render_on_ray(
    cluster: Cluster, order: Order, boards: list[Storyboard], overwrite: bool, on_event: OnEvent, signals: StopSignals
) -> dict[str, Outcome]:
    """As `Pipeline.run`, with workers of a cluster of Ray. Raises BackendError where Ray or the cluster is missing."""
    try:
        from ttt_video_engine.replicas.ray_queue import RayQueue, connected, gpus_per_worker, number_of_workers
    except ImportError as error:
        raise BackendError("ray is not installed; run: pip install 'ttt-video-engine[ray]'") from error
    with connected(cluster.address):
        gpus = gpus_per_worker(cluster.gpus_per_worker, order.engine.gpus)
        workers = number_of_workers(cluster.workers, gpus)
        queue = RayQueue(
            RayReplica, (order.anywhere(),), gpus, on_event, lambda: signals.received is not None, overwrite=overwrite
        )
        return queue.run(boards, workers)


def _without_arrays(event: Event) -> Event:
    """The event with empty arrays: latents and frames do not travel. An error travels as far as it can be pickled."""
    arrays: dict[str, Any] = {
        one.name: _NO_ARRAY for one in fields(event) if isinstance(getattr(event, one.name), np.ndarray)
    }
    return replace(event, **arrays)
