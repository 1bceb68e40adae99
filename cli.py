"""The command line, `ttt-video` or `python cli.py`: the one place that turns errors into a line and an exit code.

Everything is imported inside `main`, so that Ctrl-C in the first second is caught too.
"""

import sys

PROGRAM = "ttt-video"


def main() -> None:
    """Runs a command and exits.

    Codes: 0 done, 1 a check failed, 2 wrong input or environment, 70 an error of the program, 130 stopped with Ctrl-C.
    """
    debug = "--debug" in sys.argv
    try:
        sys.exit(_run(sys.argv[1:] or ["--help"], debug))
    except SystemExit:
        raise
    except BrokenPipeError:
        sys.exit(1)
    # BaseException: a panic of a library in Rust is no Exception.
    except BaseException as error:
        # An import that Ctrl-C stops may raise an error of its own instead.
        sys.exit(130 if _from_interrupt(error) else _report_unexpected(error, debug))


def _run(arguments: list[str], debug: bool) -> int:
    """The exit code, after an error is reported on standard error."""
    import typer

    from ttt_video_engine.commands.group import LazyGroup
    from ttt_video_engine.runtime.errors import TTTVideoError

    try:
        return LazyGroup(PROGRAM).main(arguments, PROGRAM, standalone_mode=False) or 0
    except TTTVideoError as error:
        return _report(error, str(error), error.exit_code, debug)
    except typer.TyperException as error:  # a command line that cannot be read
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
    """One line for what nothing else has turned into a message; the trace goes to a temporary file."""
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
    """Whether Ctrl-C is the error, or what led to it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    main()
