"""The state of a render after a step, in a file that it is resumed from without any difference in the result.

A sampler's step depends on the latents, on the x0 of the step before and, where it adds noise, on the generator.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from ttt_video_engine.runtime.errors import DamagedFile, OutputError, brief
from ttt_video_engine.runtime.files import atomic_write, read_file
from ttt_video_engine.runtime.passes import Reusable
from ttt_video_engine.runtime.sampler import Array, Step
from ttt_video_engine.runtime.tensor_file import load_tensors, save_tensors

LATENTS, HISTORY = "latents.safetensors", "history.json"
_MAX_HISTORY = 1 << 20
KEPT = 2
"""States that a folder holds: the newest, and the one before it in case the newest is damaged."""

_STATE = re.compile(r"state-(\d{4,})\.safetensors", re.ASCII)


_StepsDone = Annotated[int, Meta(ge=1, le=1 << 31)]


class History(Struct, frozen=True, forbid_unknown_fields=True):
    """Of all processes that worked on a video: seconds by stage, the steps that were done at each resumption, and the
    passes of the transformer, one for a prompt in a step."""

    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    resumed: tuple[_StepsDone, ...] = ()
    passes: int = 0


class _ReusableFacts(Struct, frozen=True, forbid_unknown_fields=True):
    guided: bool
    rate: float | None
    deviation: float


class _Facts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a state file holds beside its arrays."""

    run: str
    steps_done: _StepsDone
    num_steps: _StepsDone
    timestep: Annotated[int, Meta(ge=0, le=1 << 31)]
    guidance: float
    generator: dict[str, Any]
    history: History
    reusable: _ReusableFacts | None = None

    def __post_init__(self) -> None:
        if self.steps_done >= self.num_steps:  # after the last step there are latents, and no state
            raise ValueError(f"steps_done is {self.steps_done} of {self.num_steps}")


@dataclass(frozen=True, eq=False)
class StepState:
    """A step that was done, the state of the noise's generator after it, as numpy gives it, and what the next step may
    reuse."""

    step: Step
    generator: dict[str, Any]
    history: History = field(default_factory=History)
    reusable: Reusable | None = None

    @property
    def steps_done(self) -> int:
        return self.step.index + 1


def new_generator(seed: int) -> np.random.Generator:
    """The source of a video's noise."""
    return np.random.Generator(np.random.PCG64(seed))


def restored_generator(state: dict[str, Any]) -> np.random.Generator:
    """A generator that continues from `state`. Raises ValueError, TypeError or KeyError for an invalid state."""
    generator = new_generator(0)
    generator.bit_generator.state = state
    return generator


def state_path(folder: Path, steps_done: int) -> Path:
    return folder / f"state-{steps_done:04d}.safetensors"


def is_state(name: str) -> bool:
    """Whether a file of this name is a state."""
    return _STATE.fullmatch(name) is not None


def steps_of(name: str) -> int:
    """The steps that are done in the state of this name."""
    return int(name.removeprefix("state-").partition(".")[0])


def states_in(folder: Path) -> dict[int, Path]:
    """The state files of a folder by the number of steps done, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := _STATE.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


@contextmanager
def naming_what_is_kept(folder: Path) -> Iterator[None]:
    """Adds to an OutputError the state that the render resumes from."""
    try:
        yield
    except OutputError as error:
        kept = next(iter(states_in(folder).values()), None)
        raise OutputError(f"{error} ({f'{kept.name} is kept' if kept else 'no earlier step is kept'})") from error


def save_state(folder: Path, state: StepState, run: str) -> None:
    """Adds a state to the folder, then removes all but the newest two. `run` is the digest of what is rendered.

    Raises OutputError, which names the state that is kept, where the disk is full or fails.
    """
    step = state.step
    last = state.reusable
    facts = _Facts(
        run=run,
        steps_done=state.steps_done,
        num_steps=step.num_steps,
        timestep=step.timestep,
        guidance=step.guidance,
        generator=state.generator,
        history=state.history,
        reusable=None if last is None else _ReusableFacts(last.guided, last.rate, last.deviation),
    )
    arrays = {"latents": step.latents, "denoised": step.denoised}
    if last is not None:
        arrays |= {"reusable.latents": last.latents, "reusable.change": last.change}
    with naming_what_is_kept(folder):
        save_tensors(state_path(folder, state.steps_done), arrays, msgspec.to_builtins(facts))
    for path in list(states_in(folder).values())[KEPT:]:
        path.unlink(missing_ok=True)


def load_state(path: Path, shape: tuple[int, ...], run: str, *, reuses: bool = False) -> StepState:
    """The state in a file. `reuses`: of a render whose steps may reuse the last pass.

    Raises DamagedFile where it is not as it was saved, or belongs to another render.
    """
    shapes = {"latents": shape, "denoised": shape}
    if reuses:
        shapes |= {"reusable.latents": shape, "reusable.change": (2, *shape[1:])}
    arrays, facts = load_tensors(path, shapes)
    _check_run(path, facts, run)
    try:
        found = msgspec.convert(facts, _Facts)
        if (found.reusable is not None) != reuses:
            raise ValueError("what the next step may reuse is missing, or not asked for")
        generator = dict(restored_generator(found.generator).bit_generator.state)
    except (KeyError, ValueError, TypeError, OverflowError) as error:  # msgspec's errors are ValueErrors
        raise DamagedFile(f"{path}: is damaged ({brief(error)})") from error
    step = Step(
        found.steps_done - 1,
        found.num_steps,
        found.timestep,
        found.guidance,
        latents=arrays["latents"],
        denoised=arrays["denoised"],
    )
    reusable = None
    if (last := found.reusable) is not None:
        kept, change = arrays["reusable.latents"], arrays["reusable.change"]
        reusable = Reusable(kept, change, last.guided, last.rate, last.deviation)
    return StepState(step, generator, found.history, reusable)


def usable_states(
    folder: Path, shape: tuple[int, ...], run: str, *, reuses: bool = False
) -> Iterator[StepState | DamagedFile]:
    """Yields the state in each state file, or what is wrong with the file, the newest first."""
    for path in states_in(folder).values():
        try:
            yield load_state(path, shape, run, reuses=reuses)
        except DamagedFile as error:
            yield error


def save_latents(folder: Path, latents: Array, history: History, run: str) -> None:
    """Writes the finished latents, whose file has the same bytes however often the render was interrupted.

    Their history goes into a file of its own before. Raises OutputError where the disk is full or fails.
    """
    with naming_what_is_kept(folder):
        with atomic_write(folder / HISTORY) as partial:
            partial.write_bytes(msgspec.json.encode(history) + b"\n")
        save_tensors(folder / LATENTS, {"latents": latents}, {"run": run})


def load_latents(folder: Path, shape: tuple[int, ...], run: str) -> Array:
    """Finished latents. Raises DamagedFile as `load_state` does."""
    arrays, facts = load_tensors(folder / LATENTS, {"latents": shape})
    _check_run(folder / LATENTS, facts, run)
    return arrays["latents"]


def load_history(folder: Path) -> History:
    """The history of finished latents; an empty one where it is missing or damaged, as nothing depends on it."""
    try:
        return msgspec.json.decode(read_file(folder / HISTORY, _MAX_HISTORY), type=History)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return History()


def _check_run(path: Path, facts: Any, run: str) -> None:
    if not isinstance(facts, dict) or facts.get("run") != run:
        raise DamagedFile(f"{path}: belongs to another render than run.json")
