"""What nothing else catches: one line, a trace in a file, and Ctrl-C that is quiet from the first import on."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ttt_video_engine.commands import inspect as command

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


class PanicException(BaseException):
    """As PyO3 raises for a panic in Rust: no Exception."""


UNEXPECTED = [
    RuntimeError("some\nlines"),
    RecursionError("too deep"),
    MemoryError(),
    KeyError("a"),
    PanicException("p"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException], None]:
    """Lets `inspect` fail, with `tmp_path` as the folder of temporary files."""

    def fail_with(error: BaseException) -> None:
        def fail(path: Path) -> None:
            raise error

        monkeypatch.setattr(command, "open_bundle", fail)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return fail_with


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_what_escapes_is_one_line_and_a_trace_in_a_file(
    run: Run, failing: Callable[[BaseException], None], tmp_path: Path, error: BaseException
) -> None:
    failing(error)
    code, out, err = run("inspect", "a")
    assert (code, out) == (70, "") and err.count("\n") == 1
    assert err.startswith(f"error: {type(error).__name__}")
    (file,) = tmp_path.iterdir()
    assert str(file) in err
    trace = file.read_text("utf-8")
    assert trace.startswith("Traceback") and "fail(path" not in err and "in fail" in trace


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_debug_shows_it_and_leaves_no_file(
    run: Run, failing: Callable[[BaseException], None], tmp_path: Path, error: BaseException
) -> None:
    failing(error)
    code, _, err = run("inspect", "a", "--debug")
    assert code == 70 and err.startswith("Traceback") and err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_without_a_place_for_the_trace_it_is_shown(
    run: Run, failing: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(RuntimeError("a"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    code, _, err = run("inspect", "a")
    assert code == 70 and err.startswith("Traceback") and err.splitlines()[-1] == "error: RuntimeError: a"


def test_ctrl_c_that_a_library_wraps_is_still_ctrl_c(run: Run, failing: Callable[[BaseException], None]) -> None:
    error = ImportError("import failed")
    error.__cause__ = KeyboardInterrupt()
    failing(error)
    code, out, err = run("inspect", "a")
    assert (code, out, err) == (130, "", "")


def test_no_name_breaks_the_line_or_drives_the_terminal(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\nb\x1b[2J\xff")
    code, _, err = run("inspect", folder)
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err
    assert "a\\nb\\x1b[2J\\udcff" in err


_INTERRUPTED = """
import os, signal, sys

module = sys.argv.pop(1)

class Interrupt:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

from ttt_video_engine import cli
sys.meta_path.insert(0, Interrupt())
cli.main()
"""


@pytest.mark.parametrize(
    "module",
    ["typer", "ttt_video_engine.commands.group", "numpy._core.multiarray", "onnxruntime.capi", "msgspec", "av"],
)
def test_ctrl_c_while_modules_load_leaves_no_trace(module: str, tmp_path: Path) -> None:
    """The signal comes when the module is about to be imported. numpy makes an ImportError of it, with a trace."""
    command = [sys.executable, "-c", _INTERRUPTED, module, "sample", "absent.json", "--bundle", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
