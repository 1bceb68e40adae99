"""What a message must name, whatever its wording; and the one place for the few words that tests do look for."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

# What stands for what in a report of the export. To reword a line of it, change its marker here.
NEW = "new"
CHANGED = "changed"
UNCHANGED = "unchanged"
NOTHING_CHANGED = "nothing has changed"
WEIGHTS_WRITTEN = "bytes of weights"
PARITY = "parity"
RESUMED = "is resumed"
BUILT_BEFORE = "was built by"
DROPPED = "dropped"
ENGINE_WRITTEN = "bytes in"

# Of `inspect` and `plan`.
UP_TO_DATE = "up to date"
REBUILD = "rebuild"
FITS = "fits"
FITS_NOT = "does not fit"
UNMEASURED = "measured"
SWAP = "swap"

# What a setting is called.
GUIDANCE_SCALE = "guidance scale"

# Of standard error.
ERROR = "error: "
WARNING = "warning: "
TRACE = "Traceback (most recent call last)"

_NUMBER = re.compile(
    r"(?<![\w/])(?<![^\W\d]-)(?<!\w\.)(?<!\d,)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?(?!\w|,\d|\.\w|[-/][^\W\d])"
    r"|(?<!\w)-?(?:nan|inf)(?!\w)"
)


def line(number: int) -> str:
    """Where in a file, as messages write it."""
    return f"line {number}"


def column(number: int) -> str:
    return f"column {number}"


def video(number: int) -> str:
    return f"video {number}"


def scene(number: int) -> str:
    return f"scene {number}"


def numbers(message: str) -> list[float]:
    """The numbers in a message in order, but for those in the names of files, weights and options."""
    return [float(number.replace(",", "")) for number in _NUMBER.findall(message)]


def holds(message: str, value: object) -> bool:
    """Whether a message holds a value as a whole: 3 is not in 13, `text` not in `neg_text`, `a/b` not in `a/b/c`.

    A number is found however it is written: 1000 as 1,000 and 0.0001 as 1e-04. Numbers in the names of files,
    weights and options do not count.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = numbers(message)
        return float(value) in found or (value != value and any(number != number for number in found))
    text = str(value)
    before = r"(?<![\w-])(?<!\w\.)" if text[0].isalnum() or text[0] in "_-" else ""
    after = r"(?!\w|[-./]\w)" if text[-1].isalnum() or text[-1] == "_" else ""
    return re.search(before + re.escape(text) + after, message) is not None


def names(message: str, *values: object) -> None:
    """Fails unless a message is one line that holds every value."""
    assert len(message.splitlines()) == 1, f"not one line: {message!r}"
    missing = [value for value in values if not holds(message, value)]
    if missing:
        pytest.fail(f"{missing} not named in: {message}")


def where(lines: Iterable[str], marker: str) -> list[str]:
    """The lines that hold a marker."""
    return [line for line in lines if holds(line, marker)]


def subjects(lines: Iterable[str], marker: str) -> list[str]:
    """What the lines are about that hold a marker: what stands before their first colon."""
    return [line.partition(":")[0] for line in where(lines, marker)]


@contextmanager
def refused_with(kind: type[Exception], *values: object) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expects an error of a class whose message is one line that names every value."""
    with pytest.raises(kind) as caught:
        yield caught
    names(str(caught.value), *values)


def refusal(result: tuple[int, str, str], exit_code: int = 2) -> str:
    """The message of a command that refused: nothing but one line on standard error."""
    code, out, err = result
    assert (code, out) == (exit_code, ""), err
    assert err.startswith(ERROR) and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix(ERROR).rstrip("\n")


def last_refusal(err: str) -> str:
    """The message of a command that failed at work: one error, after the lines of progress."""
    assert not holds(err, TRACE), err
    (found,) = [line for line in err.splitlines() if line.startswith(ERROR)]
    assert err.endswith(f"{found}\n"), err
    return found.removeprefix(ERROR)
