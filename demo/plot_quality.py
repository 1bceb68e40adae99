"""Draws what `python -m demo.quality` measured: `python -m demo.plot_quality --output DIR`, the folder of its
quality.json, writes settings.png and ttt.png there."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from matplotlib.figure import Figure

from demo.command_line import output_folder
from demo.quality import BASE, SCORES, Result


def settings_figure(results: Sequence[Result]) -> Figure:
    """A line for each row of three scenes with TTT: passes of the transformer, PSNR, and the scores of the figure."""
    rows = [
        result for result in results if result.row.bundle != "without-ttt" and result.row.num_scenes == BASE.num_scenes
    ]
    places = range(len(rows))
    figure = Figure(figsize=(10, 0.9 + 0.32 * len(rows)), layout="constrained")
    passes, near, scores = figure.subplots(1, 3, sharey=True)
    passes.barh(places, [result.passes for result in rows])
    passes.set_title("passes of the transformer")
    near.barh(places, [result.psnr or 0 for result in rows])
    near.set_title(f"PSNR to {BASE.name}, dB")
    for shift, name in ((-0.2, "figure"), (0.2, "carried")):
        scores.barh([place + shift for place in places], [result.scores[name] for result in rows], 0.4, label=name)
    scores.set_title("scenes with the right figure")
    scores.set_xlim(0, 1)
    figure.legend(loc="outside right upper", fontsize="small")
    passes.set_yticks(places, [result.row.name for result in rows])
    passes.invert_yaxis()
    return figure


def ttt_figure(results: Sequence[Result]) -> Figure:
    """Scores with TTT and with its gates closed, a panel for each number of scenes that has both."""
    pairs = {
        with_ttt.row.num_scenes: (with_ttt, without)
        for with_ttt in results
        for without in results
        if without.row.bundle == "without-ttt"
        and with_ttt.row == replace(without.row, bundle="trained", name=with_ttt.row.name)
    }
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axes, (num_scenes, pair) in zip(
        figure.subplots(1, len(pairs), sharey=True), sorted(pairs.items()), strict=True
    ):
        for shift, label, result in zip((-0.2, 0.2), ("TTT", "gates closed"), pair, strict=True):
            axes.bar([place + shift for place in range(len(SCORES))], result.scores.values(), 0.4, label=label)
        axes.set_xticks(range(len(SCORES)), SCORES, rotation=40)
        axes.set(title=f"{num_scenes} scenes", ylim=(0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def main() -> None:
    folder = output_folder(__doc__)
    results = msgspec.json.decode((folder / "quality.json").read_bytes(), type=list[Result])
    settings_figure(results).savefig(folder / "settings.png", dpi=80)
    ttt_figure(results).savefig(folder / "ttt.png", dpi=80)


if __name__ == "__main__":
    main()
