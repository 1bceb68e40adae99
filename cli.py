"""The command line, `ttt-video` or `python cli.py`. Turns errors into one line and an exit code.

All imports are inside `main`, so that Ctrl-C during an import is also caught.
"""

import sys
from typing import TextIO, cast

PROGRAM = "ttt-video"


def main() -> None:
    """Runs a command and exits.

    Exit codes: 0 success, 1 a check failed, 2 wrong input or environment, 70 a bug, 130 interrupted with Ctrl-C.
    """
    debug, before = "--debug" in sys.argv, sys.stderr
    try:
        _keep_running_without_stderr()
        sys.exit(_run(sys.argv[1:] or ["--help"], debug))
    except SystemExit:
        raise
    except BrokenPipeError:
        sys.exit(1)
    # BaseException: a panic of a Rust library is not an Exception.
    except BaseException as error:
        # An import that Ctrl-C interrupts may raise another error.
        sys.exit(130 if _from_interrupt(error) else _report_unexpected(error, debug))
    finally:
        sys.stderr = before


def _keep_running_without_stderr() -> None:
    """A standard error that is full, or that nobody reads, must neither end a command nor change its exit code."""
    from ttt_video_engine.commands.streams import LossyStream

    sys.stderr = cast("TextIO", LossyStream(sys.stderr))


def _run(arguments: list[str], debug: bool) -> int:
    """Runs a command and returns the exit code. Prints an error on standard error."""
    import typer

    from ttt_video_engine.commands.group import LazyGroup
    from ttt_video_engine.runtime.errors import TTTVideoError

    try:
        return LazyGroup(PROGRAM).main(arguments, PROGRAM, standalone_mode=False) or 0
    except TTTVideoError as error:
        return _report(error, str(error), error.exit_code, debug)
    except typer.TyperException as error:  # an invalid command line
        message = f"{' '.join(error.format_message().split())} (see {PROGRAM} --help)"
        return _report(error, message, error.exit_code, debug)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ttt_video_engine"):
            raise
        extra = "tensorrt" if error.name in ("cuda", "triton") else "export"
        return _report(error, f"{error.name} is not installed; run: pip install 'ttt-video-engine[{extra}]'", 2, debug)


def _report(error: BaseException, message: str, exit_code: int, debug: bool) -> int:
    import traceback

    from ttt_video_engine.runtime.errors import printable

    if debug:
        traceback.print_exception(error)
    print(f"error: {printable(message)}", file=sys.stderr)
    return exit_code


def _report_unexpected(error: BaseException, debug: bool) -> int:
    """Prints one line about an unexpected error, and writes its traceback to a temporary file."""
    import tempfile
    import traceback

    message = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, MemoryError):
        message += f" (memory is full; {PROGRAM} plan says what a model needs)"
    if not debug:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix=f"{PROGRAM}-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
            ) as file:
                traceback.print_exception(error, file=file)
            message += f"; the trace is in {file.name}"
        except OSError:
            debug = True
    return _report(error, message, 70, debug)


def _from_interrupt(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C is the error, or caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a chain of causes may be a circle
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
