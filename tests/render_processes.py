"""Real processes of the command line that start in a millisecond, for tests that need hundreds of them.

One process imports the program and forks for every command. The graphs are those of `stand_in.py`, unless it is told
otherwise. Run as a program, it reads commands from standard input.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    out: str
    err: str


class Processes:
    """Runs commands of `ttt-video`, one at a time. `marks` is a folder that is asked for "mark:..." at each event."""

    def __init__(self, server: "subprocess.Popen[str]", scratch: Path) -> None:
        self._server, self._scratch = server, scratch

    def run(self, *arguments: object, cache: Path, marks: Path | None = None) -> Ended:
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cache": str(cache),
            "marks": None if marks is None else str(marks),
            "scratch": str(self._scratch),
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Ended(code, (self._scratch / "out.txt").read_text(), (self._scratch / "err.txt").read_text())


@contextmanager
def processes(scratch: Path) -> Iterator[Processes]:
    """`scratch` is a folder for what the commands write to their standard streams."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield Processes(server, scratch)
        finally:
            assert server.stdin is not None
            server.stdin.close()


def _serve() -> None:
    _import_all()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _command(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _import_all() -> None:
    """What commands import while they run, so that each finds it in memory."""
    from contextlib import redirect_stderr
    from io import StringIO

    from PIL import Image

    from ttt_video_engine.cli import main

    Image.preinit()
    sys.path.insert(0, str(Path(__file__).parent))
    import stand_in  # noqa: F401

    for command in ("sample", "decode"):
        sys.argv = ["ttt-video", command, "/nowhere", "--bundle", "/nowhere"]
        with redirect_stderr(StringIO()), suppress(SystemExit):
            main()


def _command(request: dict[str, object]) -> None:
    """Becomes the command, and ends with it."""
    code = 70
    try:
        signal.alarm(60)
        for number, name in enumerate(("/dev/null", f"{request['scratch']}/out.txt", f"{request['scratch']}/err.txt")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags), number)
        os.environ["XDG_CACHE_HOME"] = str(request["cache"])
        arguments = request["arguments"]
        assert isinstance(arguments, list)
        sys.argv = ["ttt-video", *arguments]
        _stand_in(request["marks"])
        from ttt_video_engine.cli import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stand_in(marks: object) -> None:
    from stand_in import StandInLoader

    from ttt_video_engine.commands import decode, replica
    from ttt_video_engine.commands.render_display import RenderDisplay
    from ttt_video_engine.runtime.bundle import Bundle
    from ttt_video_engine.runtime.events import Event

    def make_loader(bundle: object, *_: object, **__: object) -> StandInLoader:
        return StandInLoader(bundle)  # type: ignore[arg-type]

    Bundle.check = lambda self: None  # type: ignore[method-assign]  # of graphs that are not loaded
    for module in (replica, decode):
        setattr(module, "make_loader", make_loader)  # noqa: B010  # of a module, which mypy does not let assign
    if marks is None:
        return
    show = RenderDisplay.show

    def marked(display: RenderDisplay, event: Event) -> None:
        os.path.exists(f"{marks}/mark:{type(event).__name__} {getattr(event, 'steps_done', '')}")
        show(display, event)

    RenderDisplay.show = marked  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    _serve()
