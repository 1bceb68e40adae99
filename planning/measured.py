"""The activations that TensorRT stated for the engines of a bundle, in place of an estimate."""

from collections.abc import Iterable
from dataclasses import dataclass

from ttt_video_engine.engines.tensorrt.engine import EngineFile
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, VAE_FIRST, VAE_NEXT, transformer_graph_name
from ttt_video_engine.runtime.dtypes import DType


@dataclass(frozen=True)
class EngineOf:
    """What the activations of an engine depend on, besides its graph."""

    dtype: DType
    weight_streaming: bool
    batch: int


Activations = dict[tuple[str, EngineOf], int]
"""(graph, engine) → bytes of scratch memory: the most of all GPUs that have such an engine."""


def measured_activations(engines: Iterable[EngineFile]) -> Activations:
    """The activations of all profiles of these engines. The batch of a profile is that of its largest shapes."""
    found: Activations = {}
    for entry in (engine.entry for engine in engines):
        for profile, size in zip(entry.profiles or ({},), entry.activations, strict=False):
            batch = max((shape.max[0] for shape in profile.values()), default=1)
            key = entry.graph, EngineOf(entry.dtype, entry.settings.weight_streaming, batch)
            found[key] = max(size, found.get(key, 0))
    return found


def activations_of(found: Activations, length: str, wanted: EngineOf) -> dict[str, int]:
    """Component → bytes, for each component whose engines for a length are all in `found`.

    Text encoder and decoder run with a batch of 1 always.
    """
    one = EngineOf(wanted.dtype, wanted.weight_streaming, 1)
    keys = {
        "text_encoder": [(TEXT_ENCODER, one)],
        "transformer": [(transformer_graph_name(length), wanted)],
        "vae_decoder": [(VAE_FIRST, one), (VAE_NEXT, one)],
    }
    return {
        component: max(found[key] for key in own) for component, own in keys.items() if all(key in found for key in own)
    }
