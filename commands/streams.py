"""Standard output and error that may be closed or full: lines that cannot be written are dropped."""

import os
from contextlib import suppress
from io import StringIO
from typing import Any, TextIO


class LossyStream:
    """A text stream whose writes never fail. `failed` says that something was dropped.

    `stream` is None where the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._missing = stream is None
        self._stream = StringIO() if stream is None else stream
        self.failed = False

    def write(self, text: str) -> int:
        """Writes at once."""
        self.failed |= self._missing
        if self._missing:
            return len(text)
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Nothing is left to write."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self) -> None:
        self.failed = True
        # What the stream still holds would fail again when Python exits.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
