"""The commands by name. Help of the whole program needs their names only, so that it is quick."""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "export": "Export a model to ONNX graphs, each held to the PyTorch reference, and to TensorRT engines.",
    "sample": "Render the videos of a storyboard file.",
    "decode": "Decode the latents that a render keeps, to an mp4 or to PNG files.",
    "check": "Say what of a storyboard file would be cut or cannot be rendered, before it is.",
    "plan": "Say what a model needs before it is built, whether it fits, and with which settings.",
    "devices": "Show what can run graphs on this machine, and why the rest cannot.",
    "parity": "Hold the reference and fresh graphs to recordings of the public code, or a bundle to Polygraphy.",
    "inspect": "Show what a bundle holds, whether it is whole, and what would be rebuilt.",
}


_VALUE_IS_OPTIONAL = ("--ray",)
"""Options that may stand alone, which typer does not know: their value is then empty."""


class LazyGroup(TyperGroup):
    """Imports the module of a command when that command is called."""

    def __init__(self, name: str) -> None:
        stubs: Any = {command: TyperCommand(command, help=text) for command, text in COMMANDS.items()}
        super().__init__(name=name, commands=stubs, help="From a storyboard to a video with TTT-Video models.")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        rest = [
            f"{one}=" if one in _VALUE_IS_OPTIONAL and after.startswith("-") else one
            for one, after in pairwise([*rest, "-"])
        ]
        return name, name and load_command(name), rest


def load_command(name: str) -> Any:
    """The command whose function is `commands.NAME.NAME`."""
    with _interrupt_ends_at_once():
        module = importlib.import_module(f"ttt_video_engine.commands.{name}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=COMMANDS[name])(getattr(module, name))
    return typer.main.get_command(app)


@contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """While modules load there is nothing to tidy up, and some, such as numpy, print a trace of their own on Ctrl-C."""
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
    if raises:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
