"""A queue of videos that actors of Ray work on. One that dies is replaced, and its video goes on from its last step.

Ray carries storyboards to the actors and events without arrays back. What is rendered lies in the output folder or the
object store, which every actor reaches by itself.
"""

import os
import signal
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ttt_video_engine.runtime.errors import BackendError, ConfigError, StoreUnreachable, TTTVideoError, brief
from ttt_video_engine.runtime.events import (
    Event,
    OnEvent,
    Outcome,
    RenderWarning,
    StepDone,
    StopRendering,
    VideoFailed,
    VideoStarted,
)
from ttt_video_engine.runtime.storyboard import Storyboard

MAX_RETURNS = 3
"""Times that a video goes back to the queue because its worker died."""
MAX_FAILED_STARTS = 3
"""Workers in a row that die before one is ready."""
_TICK = 0.5
"""Seconds until the driver looks whether it is to stop."""


class WorkerDied(TTTVideoError):
    """A worker's process is gone: killed, out of memory, or with its machine."""

    exit_code = 1


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Joins the cluster at an address; "" is the one that Ray finds, or else one that is started here and ended.

    Raises BackendError where there is none at the address.
    """
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere, as without Ray
    of_caller = signal.getsignal(signal.SIGTERM)
    # Ray prints the deaths of workers on standard output, which has the paths of videos alone.
    with redirect_stdout(sys.stderr):
        try:
            ray.init(address=address or None, include_dashboard=False, configure_logging=False, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise BackendError(f"--ray {address}: {brief(error)}; start one with: ray start --head") from error
        signal.signal(signal.SIGTERM, of_caller)  # Ray's own would end the process in the middle of a line
        try:
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises BackendError where nothing listens at HOST:PORT, which Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host:  # "", or one of Ray's words
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BackendError(f"--ray {address}: {brief(error)}; give HOST:PORT as ray start --head prints it") from error


def gpus_per_worker(stated: float | None, needed: int) -> float:
    """GPUs that a worker is given, all of one machine: as stated, else those needed where the cluster has any."""
    if stated is not None:
        return stated
    return needed if ray.cluster_resources().get("GPU", 0) else 0


def number_of_workers(stated: int | None, gpus: float) -> int:
    """Workers: as stated, else one for each GPU share of the cluster. Raises ConfigError for more than it has."""
    there = ray.cluster_resources().get("GPU", 0)
    most = int(there / gpus) if gpus else 0
    if gpus and (stated or 1) > most:
        raise ConfigError(f"{stated or 1} workers of {gpus:g} GPUs are asked for, and the cluster has {there:g} GPUs")
    return stated or most or 1


@dataclass(eq=False)
class _Worker:
    """An actor, and what it is to answer: that it is ready, or the next event of its video."""

    actor: Any
    answer: Any
    board: Storyboard | None = None
    steps: int = 0


@dataclass(eq=False)
class RayQueue:
    """Videos that actors of a class work on. `arguments` make one: small, as paths, URIs and settings are.

    An actor has `ready()`, which raises where it cannot render, and `render(storyboard, overwrite)`, a generator of
    events of which the last is the video's outcome.
    """

    actor_class: type
    arguments: tuple[Any, ...]
    gpus: float
    emit: OnEvent
    stop: Callable[[], bool]
    overwrite: bool = False
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _waiting: deque[Storyboard] = field(default_factory=deque)
    _workers: list[_Worker] = field(default_factory=list)
    _returns: Counter[str] = field(default_factory=Counter)
    _failed_starts: int = 0

    def run(self, boards: Iterable[Storyboard], workers: int) -> dict[str, Outcome]:
        """Returns the outcome of each video, by name; a video without one was interrupted by `stop`.

        Raises what an actor's `ready` raised, StoreUnreachable, and WorkerDied where no worker starts.
        """
        self._waiting.extend(boards)
        try:
            for _ in range(min(workers, len(self._waiting))):
                self._start()
            while self._waiting or any(worker.board for worker in self._workers):
                if self.stop():
                    break
                answers = {worker.answer: worker for worker in self._workers if worker.answer is not None}
                ray.wait(list(answers), timeout=_TICK)
                # All that are there, so that no worker waits for the events of those before it.
                for answer in ray.wait(list(answers), num_returns=len(answers), timeout=0)[0]:
                    self._advance(answers[answer])
        except StopRendering:
            pass
        finally:
            for worker in self._workers:
                _kill(worker)
        return self.outcomes

    def _start(self) -> None:
        # No CPUs are asked for: on a machine with fewer than workers, some would wait for ever.
        sized = ray.remote(num_cpus=0, num_gpus=self.gpus, max_restarts=0, scheduling_strategy="SPREAD")
        actor: Any = sized(self.actor_class).remote(*self.arguments)
        self._workers.append(_Worker(actor, actor.ready.remote()))

    def _advance(self, worker: _Worker) -> None:
        """Takes an answer of a worker."""
        try:
            if worker.board is None:
                ray.get(worker.answer)
                self._failed_starts = 0
                self._next(worker)
                return
            event = ray.get(next(worker.answer))
        except StopIteration:
            self._next(worker)
        except RayTaskError as error:
            self._raised(worker, error)
        except RayError as error:
            self._died(worker, error)
        else:
            self._tell(worker, event)

    def _next(self, worker: _Worker) -> None:
        """Gives a worker the next video, if there is one."""
        worker.board, worker.answer, worker.steps = None, None, 0
        if self._waiting:
            worker.board = board = self._waiting.popleft()
            overwrite = self.overwrite and not self._returns[board.name]
            worker.answer = worker.actor.render.options(num_returns="streaming").remote(board, overwrite)

    def _tell(self, worker: _Worker, event: Event) -> None:
        if isinstance(event, VideoStarted | StepDone):
            worker.steps = event.steps_done
        if isinstance(event, Outcome):
            self.outcomes[event.video] = event
        self.emit(event)

    def _raised(self, worker: _Worker, error: RayTaskError) -> None:
        """An exception in a worker: of its video, unless nothing else can be rendered either."""
        cause = error.cause if isinstance(error.cause, Exception) else error
        if worker.board is None or isinstance(cause, StoreUnreachable):
            raise cause
        self._tell(worker, VideoFailed(worker.board.name, "start", cause))
        self._next(worker)

    def _died(self, worker: _Worker, error: RayError) -> None:
        """Replaces a worker that is gone, and queues its video again unless it has cost too many."""
        self._workers.remove(worker)
        _kill(worker)
        reason = brief(error, 120)
        if (board := worker.board) is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise WorkerDied(f"{self._failed_starts} workers died before they were ready: {reason}")
        elif board.name in self.outcomes:
            pass  # it died after its last event
        elif self._returns[board.name] == MAX_RETURNS:
            died = WorkerDied(
                f"its worker died {MAX_RETURNS + 1} times, the last time after step {worker.steps}: {reason}"
            )
            self._tell(worker, VideoFailed(board.name, "worker", died))
        else:
            self._returns[board.name] += 1
            self._waiting.appendleft(board)
            message = (
                f"{board.name}: its worker died; what it did after step {worker.steps} is done again by another "
                f"({self._returns[board.name]} of {MAX_RETURNS}): {reason}"
            )
            self.emit(RenderWarning(board.name, message))
        if not self._waiting:
            return
        idle = next((other for other in self._workers if other.answer is None), None)
        if idle is None:
            self._start()
        else:
            self._next(idle)


def _kill(worker: _Worker) -> None:
    with suppress(RayError, ValueError):
        ray.kill(worker.actor, no_restart=True)
