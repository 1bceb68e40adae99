"""Compares recordings of the public code with the PyTorch reference and with graphs that an engine runs.

A recording is a safetensors file with weights, inputs and the outputs of the public code. The name of its output says
what it records; sizes come from its metadata and its tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt_video_engine.export.graphs.components import TransformerGraph, transformer_inputs, vae_graphs
from ttt_video_engine.export.graphs.graph import Graph, Input
from ttt_video_engine.export.parity.onnx_graphs import OnnxGraphs
from ttt_video_engine.export.parity.torch_graphs import TorchGraphs
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.reference.ttt_layer import Scan
from ttt_video_engine.reference.vae import VaeDecoder, windows
from ttt_video_engine.runtime.bundle import CACHE_IN, CACHE_OUT
from ttt_video_engine.runtime.config import ClipSize, DiffusionConfig, TransformerConfig, TTTKind, VaeConfig
from ttt_video_engine.runtime.errors import BackendError, CheckpointError, ConfigError
from ttt_video_engine.runtime.runner import HostOrDeviceArray, Runner
from ttt_video_engine.runtime.sampler import Array, Velocities, guided, sample
from ttt_video_engine.runtime.schedule import make_schedule
from ttt_video_engine.runtime.settings import Sampler

TOLERANCE = 1e-4
"""The largest absolute error in float32 that passes."""

Kind = Literal["transformer", "ttt scan", "vae decoder", "sampler"]
EngineName = Literal["onnxruntime", "torch"]
Errors = tuple[float, float]
"""The largest absolute error of the reference, and of the engine."""

STAND_IN = "v = 0.6*tanh(x) + 0.2*cos(t/100) + 0.1*mean(text) + 0.05*std_unbiased(text)*x"
"""The network in recordings of the sampler, as their config spells it; mean and std are over the whole text."""

_SAMPLERS: dict[str, Sampler] = {"VPSDEDPMPP2M": "dpmpp-2m-sde"}
_TTT_KINDS: dict[str, TTTKind] = {"ttt_linear": "linear", "ttt_mlp": "mlp"}
_SCANS: dict[TTTKind, Scan] = {"linear": ttt_linear, "mlp": ttt_mlp}
_INNER_WEIGHTS: dict[TTTKind, tuple[str, ...]] = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}

_Config = TypeVar("_Config", bound=msgspec.Struct)


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors of the reference and of an engine on one recording; infinite for NaN."""

    recording: str
    kind: Kind
    reference_error: float
    engine_error: float


def compare_recordings(
    folder: Path,
    on_start: Callable[[str], None] | None = None,
    engine: EngineName = "onnxruntime",
    devices: int = 1,
) -> Iterator[Comparison]:
    """Compares every `*.safetensors` in `folder`, in the order of names; calls `on_start` with the name before each.

    ONNX Runtime runs graphs that are exported for it, those of transformers for so many devices, each a process; torch
    the reference's modules with weights from a file.
    Raises CheckpointError immediately if the folder or its recordings are missing, and later for a file that is damaged
    or not a recording; ConfigError for a config that no model can have.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give the one that holds the recordings")
    paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not paths:
        raise CheckpointError(f"{folder}: holds no .safetensors; give the folder that holds the recordings")
    return _compare_all(paths, on_start, partial(_engine, engine, devices))


def _compare_all(
    paths: Sequence[Path], on_start: Callable[[str], None] | None, engine: Callable[[Path], "_Engine"]
) -> Iterator[Comparison]:
    for path in paths:
        if on_start is not None:
            on_start(path.name)
        recording = _load(path)
        kind, compare = _kind(recording)
        with TemporaryDirectory(prefix="ttt-video-parity-") as scratch, torch.no_grad():
            try:
                reference_error, engine_error = compare(recording, engine(Path(scratch)))
            except BackendError as error:
                raise BackendError(f"{path}: {error}") from error
        yield Comparison(path.name, kind, reference_error, engine_error)


@dataclass(frozen=True)
class _Recording:
    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32. Raises CheckpointError if it is missing or empty."""
        if name not in self.tensors or not self.tensors[name].numel():
            raise CheckpointError(f"{self.path}: {name} is missing or empty; record it again")
        return self.tensors[name].float()

    def array(self, name: str) -> Array:
        """A tensor as a float32 array."""
        return np.asarray(self.tensor(name).numpy(), np.float32)

    def config(self) -> dict[str, object]:
        """The metadata entry `config`. Raises CheckpointError if it is not a JSON object."""
        try:
            config = json.loads(self.metadata["config"])
        except (KeyError, ValueError):
            config = None
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.path}: metadata has no config in JSON; record it again")
        return config

    def config_as(self, struct: type[_Config], **fields: object) -> _Config:
        """A `struct` from the config's entries of the same names and from `fields`. Raises ConfigError."""
        known = {name: value for name, value in self.config().items() if name in struct.__struct_fields__}
        try:
            return msgspec.convert({**known, **fields}, struct)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.path}: config: {error}; record it again") from error

    def choice(self, field: str, choices: Mapping[str, str]) -> str:
        """An entry of the config. Raises ConfigError if it is not one of `choices`."""
        value = self.config().get(field)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{self.path}: config: {field} is {value!r}: must be one of {', '.join(choices)}")
        return value

    def load_into(self, module: nn.Module, prefix: str) -> None:
        """Fills every weight of `module`. Raises CheckpointError for one that is missing, unknown or misshapen."""
        weights = {name.removeprefix(prefix): self.tensor(name) for name in self.tensors if name.startswith(prefix)}
        wanted = module.state_dict()
        for name in sorted(weights.keys() | wanted.keys()):
            has, wants = (str(list(group[name].shape)) if name in group else "none" for group in (weights, wanted))
            if has != wants:
                cure = "record it again with the config of its model"
                raise CheckpointError(f"{self.path}: {prefix}{name} is {has}, the model wants {wants}; {cure}")
        module.load_state_dict(weights)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turns torch's errors about sizes into a CheckpointError, and adds the file to a ConfigError."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}; record it again") from error
        except (ValueError, RuntimeError, IndexError) as error:
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{self.path}: inputs do not fit the model ({cause}); record it again") from error

    def error(self, output: str, found: Array) -> float:
        """Largest absolute difference from a recorded output. Raises CheckpointError if the shapes differ."""
        recorded = self.array(output)
        if found.shape != recorded.shape:
            shapes = f"{list(recorded.shape)}, the model gives {list(found.shape)}"
            raise CheckpointError(f"{self.path}: {output} is {shapes}; record it again")
        with np.errstate(invalid="ignore"):
            error = float(np.abs(found.astype(np.float64) - recorded).max())
        return float("inf") if np.isnan(error) else error


class _Engine(Protocol):
    """Opens graphs of one component, or the scan of a recording."""

    def open(self, graphs: Sequence[Graph]) -> Sequence[Runner]: ...

    def open_scan(self, ttt: TTTKind, scan: nn.Module, inputs: Mapping[str, Tensor]) -> Runner: ...


_Compare = Callable[[_Recording, _Engine], Errors]


def _load(path: Path) -> _Recording:
    """Reads a whole recording. Raises CheckpointError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return _Recording(path, tensors, dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({cause}); copy or record it again") from error


def _kind(recording: _Recording) -> tuple[Kind, _Compare]:
    """The kind of a recording, by the name of its output. Raises CheckpointError if none is known."""
    kinds: dict[str, tuple[Kind, _Compare]] = {
        "output.velocity": ("transformer", _compare_transformer),
        "output.XQW": ("ttt scan", _compare_scan),
        "output.frames": ("vae decoder", _compare_vae),
        "output.denoised": ("sampler", _compare_sampler),
    }
    for output, found in kinds.items():
        if output in recording.tensors:
            return found
    raise CheckpointError(f"{recording.path}: is no known recording (has none of {', '.join(kinds)}); remove it")


def _compare_transformer(recording: _Recording, engine: _Engine) -> Errors:
    """video [B, T, C, H, W], text [B, S, N, text_dim], timestep [B] → velocity like video."""
    ttt = _TTT_KINDS[recording.choice("ssm_layer", _TTT_KINDS)]
    config = recording.config_as(TransformerConfig, ttt=ttt)
    transformer = DiffusionTransformer(config).eval()
    recording.load_into(transformer, "param.")
    video, text = recording.tensor("input.video"), recording.tensor("input.text")
    with recording.fitting():
        timestep = recording.tensor("input.timestep").reshape(-1).expand(len(video))
        velocity = transformer(video, text, timestep)
    reference_error = recording.error("output.velocity", velocity.numpy())

    graph = _recorded_transformer(transformer, config, video, text)
    if torch.equal(timestep, timestep.round()):
        timestep = timestep.long()
    else:  # exported graphs take int64 timesteps; this recording has a fractional one
        inputs = [replace(i, example=i.example.float()) if i.name == "timestep" else i for i in graph.inputs]
        graph = replace(graph, inputs=tuple(inputs))
    arrays = {"latents": video.numpy(), "text": text.numpy(), "timestep": timestep.numpy()}
    with engine.open([graph])[0] as runner:
        return reference_error, recording.error("output.velocity", np.asarray(runner.run(arrays)["velocity"]))


def _recorded_transformer(
    transformer: DiffusionTransformer, config: TransformerConfig, video: Tensor, text: Tensor
) -> Graph:
    """As `components.transformer_graph`, for a clip of any length."""
    (_, num_frames, channels, height, width), (_, num_scenes, text_length, text_dim) = video.shape, text.shape
    size = ClipSize(num_scenes=num_scenes, num_frames=num_frames, height=height, width=width, text_length=text_length)
    inputs = transformer_inputs(size, channels, text_dim)
    return Graph(
        "transformer", "transformer/model.onnx", TransformerGraph(transformer), inputs, ("velocity",), config.ttt_kind
    )


def _compare_scan(recording: _Recording, engine: _Engine) -> Errors:
    """XQ, XK, XV [B, H, NC, CS, F], eta [B, H, NC, CS], norm [H, F], inner weights (batched or not) → XQW."""
    ttt: TTTKind = "mlp" if "input.W2" in recording.tensors else "linear"
    names = ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", *_INNER_WEIGHTS[ttt])
    inputs = {name: recording.tensor(f"input.{name}") for name in names}
    with recording.fitting():
        result = _SCANS[ttt](*inputs.values())
    reference_error = recording.error("output.XQW", result.numpy())

    with engine.open_scan(ttt, _Scan(ttt), inputs) as runner:
        outputs = runner.run({name: value.contiguous().numpy() for name, value in inputs.items()})
    return reference_error, recording.error("output.XQW", np.asarray(outputs["XQW"]))


def _compare_vae(recording: _Recording, engine: _Engine) -> Errors:
    """Unscaled latents [B, C, T, H, W] → frames [B, 3, T', 8H, 8W], not clamped."""
    config = recording.config_as(VaeConfig)
    decoder = VaeDecoder(config).eval()
    recording.load_into(decoder, "param.decoder.")
    latents = recording.tensor("input.latents")
    with recording.fitting():
        frames = torch.cat(list(decoder.decode(latents)), dim=2)
    reference_error = recording.error("output.frames", frames.numpy())

    graphs = vae_graphs(decoder, height=latents.shape[3], width=latents.shape[4])
    first_window, later_windows = engine.open(graphs)
    with first_window as first, later_windows as following:
        clips = [_decode(first, following, clip, config.temporal_window) for clip in latents.transpose(1, 2).split(1)]
    return reference_error, recording.error("output.frames", np.concatenate(clips))


def _decode(first: Runner, following: Runner, latents: Tensor, window_size: int) -> Array:
    """Frames [1, 3, T', 8H, 8W] of one clip [1, T, C, H, W], decoded window by window."""
    frames: list[NDArray[np.generic]] = []
    caches: dict[str, HostOrDeviceArray] = {}
    for window in windows(latents.shape[1], window_size):
        runner = following if caches else first
        outputs = runner.run({"latents": latents[:, window].contiguous().numpy(), **caches})
        frames.append(np.asarray(outputs["frames"]))
        caches = {CACHE_IN + name.removeprefix(CACHE_OUT): cache for name, cache in outputs.items() if name != "frames"}
    return np.concatenate(frames, axis=2).astype(np.float32, copy=False)


def _compare_sampler(recording: _Recording, engine: _Engine) -> Errors:
    """Initial noise of any shape and one noise per step → x and denoised of every step, with a stand-in network."""
    recording.choice("model", {STAND_IN: ""})
    texts = recording.array("input.neg_text"), recording.array("input.text")

    def in_numpy(x: Array, timestep: int) -> tuple[Array, Array]:
        unconditional, conditional = (_stand_in(x, text, timestep) for text in texts)
        return unconditional, conditional

    reference_error = _sampling_error(recording, in_numpy)

    x, text = recording.tensor("input.noise"), recording.tensor("input.text")
    examples = {"x": x, "text": text, "timestep": torch.tensor([999])}
    inputs = tuple(Input(name, example, {}) for name, example in examples.items())
    with engine.open([Graph("stand-in", "stand-in.onnx", _StandIn(), inputs, ("velocity",))])[0] as runner:

        def in_engine(x: Array, timestep: int) -> tuple[Array, Array]:
            t = np.array([timestep])
            unconditional, conditional = (
                np.asarray(runner.run({"x": x, "text": text, "timestep": t})["velocity"], np.float32) for text in texts
            )
            return unconditional, conditional

        return reference_error, _sampling_error(recording, in_engine)


def _sampling_error(recording: _Recording, velocities: Velocities) -> float:
    """Largest error of x and denoised over all steps, with the guidance and the noise of the recording."""
    sampler = _SAMPLERS[recording.choice("sampler", _SAMPLERS)]
    num_steps = len(recording.tensor("output.x"))
    config = recording.config_as(DiffusionConfig)
    guidance = recording.tensor("schedule.guidance_upstream")
    noise, step_noise = recording.array("input.noise"), recording.array("input.step_noise")
    if len(step_noise) < num_steps - 1 or step_noise.shape[1:] != noise.shape:
        raise CheckpointError(f"{recording.path}: input.step_noise does not fit {num_steps} steps; record it again")
    noises = iter(step_noise)
    with recording.fitting():
        schedule = make_schedule(config, num_steps)
        steps = list(
            sample(guided(velocities), noise, schedule, guidance.double().numpy(), sampler, lambda: next(noises))
        )
    x, denoised = np.stack([step.latents for step in steps]), np.stack([step.denoised for step in steps])
    return max(recording.error("output.x", x), recording.error("output.denoised", denoised))


def _stand_in(x: Array, text: Array, timestep: int) -> Array:
    bias = np.float32(0.2 * np.cos(timestep / 100) + 0.1 * text.mean())
    return np.float32(0.6) * np.tanh(x) + bias + np.float32(0.05 * text.std(ddof=1)) * x


class _StandIn(nn.Module):
    """`_stand_in` as a graph; timestep [1] int64."""

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        bias = 0.2 * torch.cos(timestep.float() / 100) + 0.1 * text.mean()
        return 0.6 * torch.tanh(x) + bias + 0.05 * text.std() * x


class _Scan(nn.Module):
    """A scan of the reference, with the inputs of the TTT operator."""

    def __init__(self, ttt: TTTKind) -> None:
        super().__init__()
        self._scan = _SCANS[ttt]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._scan(*inputs)


def _engine(name: EngineName, devices: int, folder: Path) -> _Engine:
    return OnnxGraphs(folder, devices) if name == "onnxruntime" else TorchGraphs(folder)
