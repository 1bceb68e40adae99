"""Draws a training from its logs: `python -m demo.plots --output DIR` writes loss.png and timesteps.png there.

A part that was not trained there has no log, and no curve.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demo.command_line import output_folder

_BINS = (0, 200, 400, 600, 700, 800, 900, 1000)
"""Borders between groups of timesteps."""
_POINTS = 60
"""Of a curve: each is a mean over a share of the run."""

Entry = dict[str, Any]


def read_log(path: Path) -> list[Entry]:
    """The steps of a log in order. A step that was done again after a restart counts once, as it was done last.

    None of a log that is missing.
    """
    if not path.is_file():
        return []
    entries = (json.loads(line) for line in path.read_text().splitlines())
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def loss_figure(transformer: Sequence[Entry], decoder: Sequence[Entry]) -> Figure:
    """The loss of the transformer and the PSNR of the decoder, step by step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = iter(figure.subplots(1, bool(transformer) + bool(decoder), squeeze=False)[0])
    if transformer:
        axes = next(panels)
        axes.plot(*_smooth([(entry["step"], float(np.mean(entry["losses"]))) for entry in transformer]))
        axes.set(xlabel="step", ylabel="velocity loss", title="Transformer", yscale="log")
    if decoder:
        axes = next(panels)
        axes.plot(*_smooth([(entry["step"], entry["psnr"]) for entry in decoder]))
        axes.set(xlabel="step", ylabel="PSNR, dB", title="Decoder")
    return figure


def timestep_figure(transformer: Sequence[Entry]) -> Figure:
    """The loss of the transformer, one curve for each group of timesteps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for low, high in itertools.pairwise(_BINS):
        points = [
            (entry["step"], loss)
            for entry in transformer
            for timestep, loss in zip(entry["timesteps"], entry["losses"], strict=True)
            if low <= timestep < high
        ]
        axes.plot(*_smooth(points), label=f"{low} … {high - 1}")
    axes.set(xlabel="step", ylabel="velocity loss", yscale="log", title="Transformer, by timestep")
    axes.legend(fontsize="small")
    return figure


def _smooth(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Means of steps and values over equal shares of the points."""
    shares = np.array_split(np.array(points), min(_POINTS, len(points)))
    return [float(share[:, 0].mean()) for share in shares], [float(share[:, 1].mean()) for share in shares]


def main() -> None:
    folder = output_folder(__doc__)
    transformer, decoder = read_log(folder / "transformer.jsonl"), read_log(folder / "vae.jsonl")
    loss_figure(transformer, decoder).savefig(folder / "loss.png", dpi=80)
    if transformer:
        timestep_figure(transformer).savefig(folder / "timesteps.png", dpi=80)


if __name__ == "__main__":
    main()
