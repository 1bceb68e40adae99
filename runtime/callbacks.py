"""How long work tells its caller where it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(stage, done, total), called at the start of a stage and after every part of it."""

Report = Callable[[str], None]
"""Called with one line about what was done and why."""
