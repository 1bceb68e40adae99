"""What can go wrong, as a few classes: the message is one line that says what, where and what to do.

`cli.py` is the one place that turns them into output; `exit_code` is what it ends with.
"""

import difflib
from collections.abc import Iterable

EXPORT_AGAIN = "export the bundle again"
"""What to do where a bundle is damaged, too old, or not of this program."""


def export_for_gpu(gpu: str) -> str:
    """What to do where TensorRT's engines for a GPU are missing, damaged or too old."""
    return f"run: ttt-video export --engine tensorrt --gpu {gpu}"


class TTTVideoError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 2


class ConfigError(TTTVideoError, ValueError):
    """A size or setting that the model cannot have. A ValueError too, so that msgspec adds the path of the field."""


class StoryboardError(TTTVideoError):
    """A storyboard that cannot be rendered; names file, line, video, scene and field."""


class BundleError(TTTVideoError):
    """A bundle that is incomplete, damaged, too new, or not made for what is asked of it."""


class CheckpointError(TTTVideoError):
    """Weights that do not fit the model, or a file that is not what it claims to be."""


class BackendError(TTTVideoError):
    """A graph that does not load, or inputs that do not match it."""


class OutputError(TTTVideoError):
    """A place that cannot be written: it exists already, or the disk is full."""


class DamagedFile(TTTVideoError):
    """A file of a render that is not as it was written, or belongs to another render."""


class RenderBusy(TTTVideoError):
    """A video that another process renders; names that process."""


class NumericsError(TTTVideoError):
    """NaN or infinite values in a tensor: the precision is too narrow for the model."""

    exit_code = 1


class CheckFailed(TTTVideoError):
    """A check that ran and did not hold, such as parity over tolerance."""

    exit_code = 1


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would act on, such as line breaks and control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def hint(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the nearest known one, or all of them where none is near."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
