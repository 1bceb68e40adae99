"""`ttt-video parity`: compares reference and engine with recordings of the public code, or a bundle in Polygraphy."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.planning.table import text_table
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BackendError, CheckFailed, ConfigError
from ttt_video_engine.runtime.settings import BackendName


def parity(
    golden: Annotated[
        Path | None, typer.Option(help="Folder of recordings (.safetensors).", show_default=False)
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder made by export, to compare with Polygraphy.", show_default=False)
    ] = None,
    engine: Annotated[
        BackendName, typer.Option(help="What runs recordings beside the reference: onnxruntime or torch.")
    ] = "onnxruntime",
    polygraphy: Annotated[
        Path | None,
        typer.Option(help="New folder for inputs and outputs in Polygraphy's format.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare reference and new graphs with recordings of the public code, or a bundle with Polygraphy."""
    if (golden is None) == (bundle is None):
        raise ConfigError("parity needs either --golden or --bundle; give one of them")
    if (bundle is None) != (polygraphy is None):
        raise ConfigError("--bundle and --polygraphy go together; give both")
    if engine == "tensorrt":
        raise ConfigError("--engine tensorrt: recordings have no engines; give onnxruntime or torch")
    if engine != "onnxruntime" and golden is None:
        raise ConfigError(f"--engine {engine} is for --golden: leave out one of the two")
    if golden is not None:
        _compare_recordings(golden, engine, json)
    elif bundle is not None and polygraphy is not None:
        _compare_in_polygraphy(bundle, polygraphy, json)


def _compare_recordings(golden: Path, engine: Literal["onnxruntime", "torch"], json: bool) -> None:
    from ttt_video_engine.export.parity.recordings import TOLERANCE, compare_recordings

    rows = list(compare_recordings(golden, engine=engine))
    column = {"onnxruntime": "onnx", "torch": "torch"}[engine]
    if json:
        found = [
            {
                "recording": row.recording,
                "kind": row.kind,
                "reference_error": row.reference_error,
                f"{column}_error": row.engine_error,
            }
            for row in rows
        ]
        typer.echo(msgspec.json.encode(found).decode())
    else:
        header = ("recording", "kind", "reference", column)
        cells = ((row.recording, row.kind, f"{row.reference_error:.1e}", f"{row.engine_error:.1e}") for row in rows)
        typer.echo("\n".join(text_table([header, *cells], numbers=(2, 3))))
    failed = [row.recording for row in rows if not max(row.reference_error, row.engine_error) <= TOLERANCE]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} over {TOLERANCE:.0e}: {', '.join(failed)}")


def _compare_in_polygraphy(root: Path, output: Path, json: bool) -> None:
    bundle = open_bundle(root)
    bundle.check()
    try:
        import polygraphy  # noqa: F401  # imported first, so that the failure of another import is not reported as its own
    except ImportError as error:
        raise BackendError("polygraphy is not installed; run: pip install 'ttt-video-engine[polygraphy]'") from error
    from ttt_video_engine.export.parity.second_opinion import second_opinions

    rows = list(second_opinions(bundle, output))
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    else:
        header = ("graph", "runner", "error", "allowed")
        cells = ((row.graph, row.runner, f"{row.max_error:.1e}", f"{row.tolerance:.0e}") for row in rows)
        typer.echo("\n".join(text_table([header, *cells], numbers=(2, 3))))
    failed = [f"{row.graph} in {row.runner}" for row in rows if not row.passed]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} differ from ONNX Runtime: {', '.join(failed)}")
