"""`ttt-video parity`: the reference and its graphs against recordings of the public code, or a bundle in Polygraphy."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BackendError, CheckFailed, ConfigError


def parity(
    golden: Annotated[
        Path | None, typer.Option(help="Folder of recordings (.safetensors).", show_default=False)
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder made by export, to compare with Polygraphy.", show_default=False)
    ] = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(help="New folder for inputs and outputs in Polygraphy's format.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold the reference and fresh graphs to recordings of the public code, or a bundle to Polygraphy."""
    if (golden is None) == (bundle is None):
        raise ConfigError("parity takes --golden or --bundle, and not both; give one")
    if (bundle is None) != (polygraphy is None):
        raise ConfigError("--bundle and --polygraphy go together; give both")
    if golden is not None:
        _compare_recordings(golden, json)
    elif bundle is not None and polygraphy is not None:
        _ask_polygraphy(bundle, polygraphy, json)


def _compare_recordings(golden: Path, json: bool) -> None:
    from ttt_video_engine.export.parity.recordings import TOLERANCE, Comparison, compare_recordings

    rows: list[Comparison] = []
    for row in compare_recordings(golden):
        if not json and not rows:
            typer.echo(f"{'recording':<28} {'kind':<12} {'reference':>10} {'onnx':>10}")
        rows.append(row)
        if not json:
            typer.echo(f"{row.recording:<28} {row.kind:<12} {row.reference_error:>10.1e} {row.onnx_error:>10.1e}")
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    failed = [row.recording for row in rows if not max(row.reference_error, row.onnx_error) <= TOLERANCE]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} over {TOLERANCE:.0e}: {', '.join(failed)}")


def _ask_polygraphy(root: Path, output: Path, json: bool) -> None:
    bundle = open_bundle(root)
    bundle.check()
    try:
        import polygraphy  # noqa: F401  # asked for first, so that no other import's failure is taken for its own
    except ImportError as error:
        raise BackendError("polygraphy is not installed; run: pip install 'ttt-video-engine[polygraphy]'") from error
    from ttt_video_engine.export.parity.second_opinion import Opinion, second_opinions

    rows: list[Opinion] = []
    for row in second_opinions(bundle, output):
        if not json and not rows:
            typer.echo(f"{'graph':<20} {'runner':<12} {'error':>10} {'allowed':>10}")
        rows.append(row)
        if not json:
            typer.echo(f"{row.graph:<20} {row.runner:<12} {row.max_error:>10.1e} {row.tolerance:>10.0e}")
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    failed = [f"{row.graph} in {row.runner}" for row in rows if not row.passed]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} not as in ONNX Runtime: {', '.join(failed)}")
