"""Errors raised on purpose. Each message is one line: what is wrong, where, and what to do.

Only `cli.py` prints them; it exits with their `exit_code`.
"""

import difflib
from collections.abc import Iterable

EXPORT_AGAIN = "export the bundle again"
"""The cure for a bundle that is damaged, too old, or from another program."""


def export_for_gpu(gpu: str) -> str:
    """The cure for TensorRT engines that are missing, damaged or too old."""
    return f"run: ttt-video export --engine tensorrt --gpu {gpu}"


class TTTVideoError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 2


class ConfigError(TTTVideoError, ValueError):
    """A size or setting that the model cannot have. Also a ValueError, so that msgspec adds the path of the field."""


class StoryboardError(TTTVideoError):
    """A storyboard that cannot be rendered. The message names file, line, video, scene and field."""


class BundleError(TTTVideoError):
    """A bundle that is incomplete, damaged, too new, or unsuitable for the command."""


class CheckpointError(TTTVideoError):
    """Weights that do not fit the model, or a file whose content does not match its format."""


class BackendError(TTTVideoError):
    """A backend that is missing, a graph that does not load or run, or inputs that do not match it."""


class OutputError(TTTVideoError):
    """A file or folder that cannot be written: it exists already, or the disk is full."""


class DamagedFile(TTTVideoError):
    """A file of a render that is not as it was written, or belongs to another render."""


class RenderBusy(TTTVideoError):
    """A video that another process renders; names that process."""


class StoreUnreachable(TTTVideoError):
    """An object store that did not answer in all of its retries. Nothing is wrong with the input: run again."""

    exit_code = 1


class NumericsError(TTTVideoError):
    """NaN or infinite values in a tensor: the precision is too narrow for the model."""

    exit_code = 1


class CheckFailed(TTTVideoError):
    """A check that failed, such as a parity error above the tolerance."""

    exit_code = 1


def printable(text: str) -> str:
    """`text` on one line. Characters that a terminal interprets, such as line breaks, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(error: object, length: int = 200) -> str:
    """What a library says of a file, on one line: such a message may quote the file at any length."""
    text = " ".join(str(error)[: 10 * length].split())
    return text if len(text) <= length else f"{text[:length]}…"


def hint(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the most similar known name, or all names where none is similar."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
