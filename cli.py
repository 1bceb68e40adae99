"""The command line, `ttt-video` or `python cli.py`: the one place that turns errors into a line and an exit code.

Everything is imported inside `main`, so that Ctrl-C in the first second is caught too.
"""

import sys

PROGRAM = "ttt-video"


def main() -> None:
    """Runs a command and exits: 0 done, 1 a check failed, 2 wrong input or environment, 130 stopped with Ctrl-C."""
    try:
        sys.exit(_run(sys.argv[1:] or ["--help"]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _run(arguments: list[str]) -> int:
    """The exit code, after an error is reported on standard error."""
    import typer

    from ttt_video_engine.commands.group import LazyGroup
    from ttt_video_engine.runtime.errors import TTTVideoError

    debug = "--debug" in arguments
    try:
        return LazyGroup(PROGRAM).main(arguments, PROGRAM, standalone_mode=False) or 0
    except TTTVideoError as error:
        return _report(error, str(error), error.exit_code, debug)
    except typer.TyperException as error:  # a command line that cannot be read
        message = f"{' '.join(error.format_message().split())} (see {PROGRAM} --help)"
        return _report(error, message, error.exit_code, debug)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("ttt_video_engine"):
            raise
        extra = "tensorrt" if error.name in ("cuda", "triton") else "export"
        return _report(error, f"{error.name} is not installed; run: pip install 'ttt-video-engine[{extra}]'", 2, debug)


def _report(error: Exception, message: str, exit_code: int, debug: bool) -> int:
    import traceback

    if debug:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
