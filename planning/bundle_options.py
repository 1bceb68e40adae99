"""What a bundle renders, and the export that would make what it does not."""

from collections.abc import Sequence

from msgspec.structs import replace

from ttt_video_engine.planning.report import source_options
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import LengthName, ModelConfig, length_name
from ttt_video_engine.runtime.dtypes import DTYPES, DType, Precision
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.public_config import scenes_of_frames
from ttt_video_engine.runtime.quantization import Quantization, precision


def explain_bundle_options(
    bundle: Bundle,
    *,
    width: int | None = None,
    height: int | None = None,
    num_frames: int | None = None,
    dtype: Precision | None = None,
) -> LengthName | None:
    """The length that `num_frames` latent frames make, where the bundle renders all that is asked for.

    `width` and `height` are pixels; frames are counted as in the public code, 13 for 3 seconds. Raises ConfigError,
    with what the bundle has and the export that makes the other, where it does not render it.
    """
    model, has = bundle.manifest.model, bundle.manifest
    length = None if num_frames is None else length_name(scenes_of_frames(num_frames, "--num-frames"))
    wanted: DType = has.dtype if dtype is None else DTYPES[dtype]
    other_size = (width or model.width, height or model.height) != (model.width, model.height)
    asked = [f"--width {width}"] * (width not in (None, model.width))
    asked += [f"--height {height}"] * (height not in (None, model.height))
    asked += [f"--dtype {dtype}"] * (wanted != has.dtype)
    lengths = has.lengths if length is None else (length,)
    needs_another = bool(asked)
    asked += [f"--num-frames {num_frames} ({length})"] * (length is not None and length not in has.lengths)
    if not asked:
        return length
    stored = precision(has.dtype, has.quantize)
    renders = f"{bundle.root} renders {model.width}x{model.height} in {stored}, {' or '.join(has.lengths)}"
    try:
        made = replace(model, width=width or model.width, height=height or model.height) if other_size else model
        made.stating(lengths)
    except ConfigError as error:
        raise ConfigError(f"{', '.join(asked)}: {renders}; no export makes the other of its model: {error}") from error
    output = "OTHER_BUNDLE" if needs_another else str(bundle.root)
    command = export_command(made, wanted, lengths, output, has.quantize if wanted == has.dtype else "none")
    raise ConfigError(f"{', '.join(asked)}: {renders}; make the other with: {command}")


def export_command(
    model: ModelConfig, dtype: DType, lengths: Sequence[LengthName], output: str, quantize: Quantization
) -> str:
    """The export that makes a model of these lengths, or adds them to the bundle at `output`; what is yours to fill in
    stands in capitals."""
    command = ["ttt-video", "export", *source_options(model, None)]
    for length in lengths:
        command += ["--length", length]
    if dtype != "float32":
        command += ["--precision", dtype]
    if quantize != "none":
        command += ["--quantize", quantize]
    return " ".join([*command, "--output", output])
