"""Callbacks that report the progress of long work."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(stage, done, total): called at the start of a stage and after each of its parts."""

Report = Callable[[str], None]
"""Called with one line of text: what was done, and why."""
