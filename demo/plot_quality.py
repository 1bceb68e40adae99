"""Draws what `python -m demo.quality` measured: `python -m demo.plot_quality --output DIR`, the folder of its
quality.json, writes passes.png and ttt.png there."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from matplotlib.figure import Figure

from demo.command_line import output_folder
from demo.quality import BASE, SCORES, Result


def passes_figure(results: Sequence[Result]) -> Figure:
    """Passes of the transformer against nearness to the video of 50 steps, a point for each row of three scenes."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        if result.psnr is not None and result.row.ttt:
            axes.plot(result.passes, result.psnr, "o", color="tab:blue")
            axes.annotate(result.row.name, (result.passes, result.psnr), xytext=(6, -3), textcoords="offset points")
    axes.set(xlabel="passes of the transformer", ylabel=f"PSNR to {BASE.name}, dB", title="Fewer passes")
    axes.margins(x=0.2)
    return figure


def ttt_figure(results: Sequence[Result]) -> Figure:
    """Scores with TTT and with its gates closed, a panel for each number of scenes that has both."""
    pairs = {
        with_ttt.row.num_scenes: (with_ttt, without)
        for with_ttt in results
        for without in results
        if not without.row.ttt and with_ttt.row == replace(without.row, ttt=True, name=with_ttt.row.name)
    }
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axes, (num_scenes, pair) in zip(
        figure.subplots(1, len(pairs), sharey=True), sorted(pairs.items()), strict=True
    ):
        for shift, label, result in zip((-0.2, 0.2), ("TTT", "gates closed"), pair, strict=True):
            axes.bar([place + shift for place in range(len(SCORES))], result.scores.values(), 0.4, label=label)
        axes.set_xticks(range(len(SCORES)), SCORES, rotation=40)
        axes.set(title=f"{num_scenes} scenes", ylim=(0, 1))
    axes.legend()
    return figure


def main() -> None:
    folder = output_folder(__doc__)
    results = msgspec.json.decode((folder / "quality.json").read_bytes(), type=list[Result])
    passes_figure(results).savefig(folder / "passes.png", dpi=80)
    ttt_figure(results).savefig(folder / "ttt.png", dpi=80)


if __name__ == "__main__":
    main()
