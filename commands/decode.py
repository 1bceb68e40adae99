"""`ttt-video decode`: from the latents that a render keeps to an mp4 or to PNG files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from ttt_video_engine.commands.loaders import GpuMemoryOption, ProviderOption, make_loader
from ttt_video_engine.commands.options import BundleOption, Debug, codec_option, crf_option
from ttt_video_engine.commands.progress import ProgressDisplay
from ttt_video_engine.runtime.bundle import VAE_FIRST, VAE_NEXT, Bundle, latent_shape, open_bundle
from ttt_video_engine.runtime.callbacks import Progress
from ttt_video_engine.runtime.demo_bundle import bundle_folder
from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import check_folder
from ttt_video_engine.runtime.frame_range import FrameRange
from ttt_video_engine.runtime.png_sequence import check_png_folder, write_pngs
from ttt_video_engine.runtime.render_folder import VIDEO
from ttt_video_engine.runtime.run_record import RECORD, RunRecord, read_record
from ttt_video_engine.runtime.settings import BackendName, Codec, Settings
from ttt_video_engine.runtime.stages import Floats
from ttt_video_engine.runtime.stages import decode as decode_windows
from ttt_video_engine.runtime.step_state import LATENTS, load_latents
from ttt_video_engine.runtime.video import VideoFormat, with_crf, write_video

Windows = Iterator[NDArray[np.uint8]]


def decode(
    run: Annotated[Path, typer.Argument(help=f"Folder of a render, with {LATENTS}.", show_default=False)],
    bundle: BundleOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The mp4; replaced where it exists.", show_default=f"RUN/{VIDEO}, or a name beside it"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the mp4.", show_default="the render's")
    ] = None,
    codec: Annotated[Codec | None, codec_option("the render's")] = None,
    crf: Annotated[int | None, crf_option("the render's; of another codec 18, 20 or 30")] = None,
    frames: Annotated[
        str | None, typer.Option(help="START:END: these frames only, as a slice of Python.", show_default="all")
    ] = None,
    png_sequence: Annotated[
        Path | None, typer.Option(help="New or empty folder for PNG files, in place of an mp4.", show_default=False)
    ] = None,
    engine: Annotated[BackendName, typer.Option(help="What runs the graphs.")] = "onnxruntime",
    provider: ProviderOption = None,
    gpu_memory: GpuMemoryOption = None,
    debug: Debug = False,
) -> None:
    """Decode the latents that a render keeps, to an mp4 or to PNG files."""

    if png_sequence is not None:
        _refuse_mp4_options({"--output": output, "--fps": fps, "--crf": crf, "--codec": codec})
    opened = open_bundle(bundle_folder(bundle))
    record, model = _record(run, opened), opened.manifest.model
    settings = record.settings
    video_format = _video_format(settings, fps, codec, crf)
    loader = make_loader(opened, engine, provider, gpu_memory, low_memory=settings.low_memory)
    latents = _latents(run, opened, record)
    size = model.clip_size(record.length)
    wanted = FrameRange.parse(frames or ":", model.num_video_frames(size))
    target = png_sequence or output or run / _name(settings, video_format, None if frames is None else wanted)
    if png_sequence is not None:
        check_png_folder(png_sequence)
    else:
        _check_target(target)
    opened.check()
    loader.check([VAE_FIRST, VAE_NEXT])
    with ProgressDisplay() as display:
        windows = decode_windows(opened, loader, latents)
        counted = _count(windows, wanted.num_windows(model, size), display.update)
        if png_sequence is not None:
            write_pngs(target, wanted.select(counted), wanted.start)
        else:
            write_video(target, wanted.select(counted), video_format, width=model.width, height=model.height)
    typer.echo(f"{'video' if png_sequence is None else 'frames'}: {target}")


def _record(run: Path, bundle: Bundle) -> RunRecord:
    """What the render was begun with. Raises OutputError where the folder has none, or names another bundle."""
    record = read_record(run)
    if record is None:
        raise OutputError(f"{run}: is not the folder of a render ({RECORD} is missing)")
    if record.bundle.sha256 != bundle.sha256:
        raise OutputError(
            f"{run}: was rendered with bundle {record.bundle.sha256}, {bundle.root} is {bundle.sha256}; "
            "give the --bundle that it was rendered with"
        )
    return record


def _latents(run: Path, bundle: Bundle, record: RunRecord) -> Floats:
    """The finished latents [1, T, C, H, W]. Raises OutputError where they are missing, DamagedFile where damaged."""
    if not (run / LATENTS).exists():
        raise OutputError(f"{run / LATENTS}: is missing; render with ttt-video sample --keep-latents first")
    model = bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size(record.length)))
    return load_latents(run, shape, record.digest)


def _video_format(settings: Settings, fps: float | None, codec: Codec | None, crf: int | None) -> VideoFormat:
    """What the options state, else as the render's mp4. Its CRF means nothing in another codec."""
    if crf is None and codec in (None, settings.codec):
        crf = settings.crf
    return VideoFormat(settings.fps if fps is None else fps, crf, codec or settings.codec)


def _name(settings: Settings, video_format: VideoFormat, frames: FrameRange | None) -> str:
    """`video.mp4` for the mp4 that the sidecar describes; another says in its name what is different."""
    same_codec = video_format.codec == settings.codec
    usual = with_crf(settings if same_codec else Settings(codec=video_format.codec))
    parts = [Path(VIDEO).stem]
    if frames is not None:
        parts.append(f"{frames.start}-{frames.stop}")
    if video_format.fps != settings.fps:
        parts.append(f"{float(video_format.fps):g}fps")
    if not same_codec:
        parts.append(video_format.codec)
    if video_format.crf not in (None, usual.crf):
        parts.append(f"crf{video_format.crf}")
    return "-".join(parts) + Path(VIDEO).suffix


def _refuse_mp4_options(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"--png-sequence writes no mp4: leave it out, or {', '.join(given)}")


def _check_target(target: Path) -> None:
    if target.suffix != ".mp4":
        raise ConfigError(f"--output is {str(target)!r}: must end in .mp4")
    check_folder(target.parent)


def _count(windows: Windows, total: int, progress: Progress) -> Windows:
    progress("decode", 0, total)
    for done, window in enumerate(windows, start=1):
        progress("decode", done, total)
        yield window
        del window
