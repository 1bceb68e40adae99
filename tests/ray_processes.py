"""The command line with workers of Ray that run the stand-in, at a pace at which one can be killed within a step.

Run as a program, it is `ttt-video`. Ray's processes import it by name, so its folder must be on their PYTHONPATH. Each
notes the steps that it begins in a file beside the text cache, so that a step that is done twice is seen.
"""

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stand_in import StandInLoader

from ttt_video_engine.commands import ray_render, replica
from ttt_video_engine.commands.ray_render import RayReplica
from ttt_video_engine.runtime.errors import StoreUnreachable
from ttt_video_engine.runtime.events import Event, RenderWarning, VideoSkipped
from ttt_video_engine.runtime.storyboard import Storyboard
from ttt_video_engine.runtime.user_cache import cache_folder

SECONDS = 0.3
"""A step takes about so long."""


def steps_begun() -> Counter[str]:
    """How often each step was begun, by a digest of its inputs."""
    return Counter(_notes().read_text().split())


def _notes() -> Path:
    cache = cache_folder("steps-begun")
    assert cache is not None
    return cache


class SlowLoader(StandInLoader):
    def __call__(self, graph: str) -> Any:
        runner = super().__call__(graph)
        if graph.startswith("transformer"):
            real = runner.run

            def run(inputs: Any) -> Any:
                digest = hashlib.sha256(b"".join(inputs[name].tobytes() for name in sorted(inputs)))
                with _notes().open("a") as file:
                    file.write(f"{digest.hexdigest()}\n")
                time.sleep(SECONDS)
                return real(inputs)

            runner.run = run  # type: ignore[method-assign]
        return runner


class SlowReplica(RayReplica):
    def ready(self) -> None:
        use_stand_in()
        super().ready()

    def render(self, board: Storyboard, overwrite: bool) -> Iterator[Event]:
        if board.name == "deadly":
            os._exit(1)
        if board.name == "broken":
            raise RuntimeError("not of this program")
        yield from super().render(board, overwrite)


class WithoutStore:
    """An actor whose object store is gone."""

    def ready(self) -> None: ...

    def render(self, board: Storyboard, overwrite: bool) -> Iterator[Event]:
        yield RenderWarning(board.name, "does not answer")
        raise StoreUnreachable("s3://films: has not answered")


class DiesAfterwards:
    """An actor that dies between the outcome of a video and its end."""

    def ready(self) -> None: ...

    def render(self, board: Storyboard, overwrite: bool) -> Iterator[Event]:
        yield VideoSkipped(board.name, "there")
        time.sleep(SECONDS)  # until the event has left
        os._exit(1)


def use_stand_in() -> None:
    def make_loader(bundle: Any, *_: object, **__: object) -> SlowLoader:
        return SlowLoader(bundle)

    setattr(replica, "make_loader", make_loader)  # noqa: B010  # of a module, which mypy does not let assign
    setattr(ray_render, "RayReplica", SlowReplica)  # noqa: B010


if __name__ == "__main__":
    import ray_processes  # by its name, which the workers know, and not as __main__

    from ttt_video_engine.cli import main

    ray_processes.use_stand_in()
    sys.argv[0] = "ttt-video"
    main()
