"""What is fuzzed: each kind of file that a render reads, valid examples of it, and what must hold whatever it contains.

A target reads a file as the program does and returns what came of it. Raising anything but one of the project's own
errors is a crash, and so is a result that the program could not continue with.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from fuzz_inputs import Content, of_bytes, of_json
from hypothesis import strategies as st
from msgspec.structs import replace
from stand_in import products, render

from ttt_video_engine.runtime.bundle import TOKENIZER, open_bundle
from ttt_video_engine.runtime.config import num_scenes
from ttt_video_engine.runtime.errors import printable
from ttt_video_engine.runtime.events import Event, RenderWarning, VideoDone, VideoSkipped
from ttt_video_engine.runtime.jobs import in_shard
from ttt_video_engine.runtime.prompts import prompt_text
from ttt_video_engine.runtime.render_folder import SIDECAR, TEXT, check_begin
from ttt_video_engine.runtime.run_record import RECORD, BundleRecord, RunRecord, changes, read_record, write_record
from ttt_video_engine.runtime.sampler import Step
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.step_state import (
    HISTORY,
    LATENTS,
    History,
    StepState,
    load_history,
    load_latents,
    load_state,
    new_generator,
    save_latents,
    save_state,
    state_path,
)
from ttt_video_engine.runtime.storyboard import Scene, load_storyboards
from ttt_video_engine.runtime.tensor_file import checksum_of, load_tensors, save_tensors
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import SceneTokenizer
from ttt_video_engine.runtime.video import VideoFormat

SHAPE = (1, 2, 2, 2, 2)
RUN = "a" * 64
STEPS = 4
STATE = state_path(Path(), 2).name

Target = Callable[[Path, Content], str]
"""Takes a new folder and the content of a file; returns what came of it."""


@dataclass(frozen=True)
class Kind:
    """`share` is how many of 100 cases are of this kind; `slow` ones have a number of cases of their own."""

    name: str
    share: int
    contents: st.SearchStrategy[Content]
    target: Target
    slow: int = 0


def kinds(bundle: Path, scratch: Path) -> list[Kind]:
    """All kinds. `scratch` is a new folder for the valid examples."""
    scratch.mkdir(parents=True)
    record = _record()
    write_record(scratch, record)
    save_state(scratch, _state(), RUN)
    save_latents(scratch, _array(3), History({"text": 1.5, "denoise": 20.25}, (1, 3)), RUN)
    save_tensors(scratch / TEXT, {"text": _array(4)}, {"run": RUN, "seconds": 1.5})
    run, state, latents, text = (_read(scratch / name) for name in (RECORD, STATE, LATENTS, TEXT))
    facts = json.loads(_metadata(state))["facts"]
    cache = TextCache(scratch / "cache", "an encoder", width=4)
    cache.put(_IDS, _EMBEDDING)
    (entry,) = (scratch / "cache").iterdir()
    boards = _Boards(SceneTokenizer.from_file(open_bundle(bundle).path(TOKENIZER)))
    folders = _Folders(bundle, scratch)
    return [
        Kind("storyboard .json", 22, of_json(_VIDEOS), boards.json),
        Kind("storyboard .jsonl", 13, of_json(_VIDEOS[:3], _as_lines), boards.lines),
        Kind("storyboard bytes", 10, of_bytes(_storyboard_files()), boards.json),
        Kind("storyboard name", 2, _file_names(), boards.name),
        Kind("run.json", 15, of_json([json.loads(run)]), _run_json),
        Kind("run.json bytes", 5, of_bytes([run]), _run_json),
        Kind("state bytes", 13, of_bytes([state]), _state_file),
        Kind("state forged", 7, of_json([facts]), _forged_state),
        Kind("latents", 4, of_bytes([latents]), _latents),
        Kind("text", 3, of_bytes([text]), _text),
        Kind("history.json", 4, of_json([{"seconds": {"text": 1.5, "denoise": 2}, "resumed": [1, 3]}]), _history),
        Kind("text cache", 2, of_bytes([entry.read_bytes()]), _Cached(entry.name)),
        Kind("folder of a render", 0, of_bytes(folders.files), folders.resume, slow=150),
        Kind("run.json of a render", 0, of_json(folders.records), folders.record, slow=100),
    ]


# Storyboards

_LONG = "A bear bakes bread at dawn, " * 40
_VIDEOS: list[object] = [
    [{"text": "A bear."}],
    [{"text": "A bear.", "requires_scene_transition": False}, {"text": "é", "requires_scene_transition": True}],
    [{"text": _LONG, "neg_text": "blurred"}, {"text": "Bread 🐻.", "neg_text": None}, {"text": ""}],
    [[{"text": "A bear."}], [{"text": "A fox.", "neg_text": "text"}, {"text": "b"}]],
]


def _as_lines(text: str) -> bytes:
    return b"\n".join([text.encode("utf-8", "surrogatepass"), b'[{"text": "A fox."}]'])


def _storyboard_files() -> list[bytes]:
    return [json.dumps(video, ensure_ascii=False, indent=indent).encode() for video in _VIDEOS for indent in (None, 1)]


def _file_names() -> st.SearchStrategy[Content]:
    letters = st.sampled_from(
        [b".", b"..", b" ", b"\n", b"\xff", b"\xc3\xa9", b"-", b"~", b"$", b"a", b"\\", b"x" * 90]
    )
    return st.lists(letters, min_size=1, max_size=4).map(lambda parts: Content(b"".join(parts)[:200]))


class _Boards:
    def __init__(self, tokenizer: SceneTokenizer) -> None:
        self._tokenizer = tokenizer

    def json(self, folder: Path, content: Content) -> str:
        return self._read(folder, write(folder / "a.json", content))

    def lines(self, folder: Path, content: Content) -> str:
        return self._read(folder, write(folder / "a.jsonl", content))

    def name(self, folder: Path, content: Content) -> str:
        name = content.data.decode("utf-8", "surrogateescape")
        return self._read(folder, write(folder / f"{name}.json", Content(b'[{"text": "a"}]')))

    def _read(self, folder: Path, path: Path) -> str:
        boards = load_storyboards(path)
        for one in boards[:3]:
            assert one.scenes and (folder / one.name).parent == folder and one.name not in ("", ".", "..")
            assert all(type(scene.text) is type(scene.neg_text) is str for scene in one.scenes)
            one_line(*one.warnings)
            prompt_text(one).encode()
            assert in_shard(one, 1, 1)
            prompts = self._tokenizer.encode(one, 128)
            one_line(*(truncation.message for truncation in prompts.truncations))
            assert prompts.positive.shape == prompts.negative.shape == (len(one.scenes), 128)
        return "taken"


# Files of a folder


def _run_json(folder: Path, content: Content) -> str:
    write(folder / RECORD, content)
    record, mine = read_record(folder), _record()
    assert record is not None
    # As `decode` uses it,
    num_scenes(record.length)
    VideoFormat(record.settings.fps)
    assert len(record.digest) == 64
    # and as `sample` does.
    one_line(*changes(record, mine))
    check_begin(folder, mine, overwrite=False)
    assert record.digest == mine.digest
    return "taken"


def _state_file(folder: Path, content: Content) -> str:
    """Not one bit of it may be another."""
    found = load_state(write(folder / STATE, content), SHAPE, RUN)
    assert _bits(found) == _bits(_state())
    return "as it was"


def _forged_state(folder: Path, content: Content) -> str:
    """With a checksum that is right: whatever is taken must be a state that could have been saved."""
    try:
        facts = json.loads(content.data)
        arrays = {"latents": _array(1), "denoised": _array(2)}
        sealed = {"sha256": checksum_of(arrays, facts), "facts": facts}
        header = json.dumps({"__metadata__": {"ttt-video": json.dumps(sealed)}, **_HEADER}).encode()
    except (ValueError, RecursionError):
        return "no JSON"
    data = len(header).to_bytes(8, "little") + header + b"".join(arrays[name].tobytes() for name in sorted(arrays))
    path = write(folder / STATE, Content(data, content.tail))
    found = load_state(path, SHAPE, RUN)
    assert type(found.step.index) is type(found.step.num_steps) is int
    assert 0 <= found.step.index < found.step.num_steps - 1
    found = StepState(found.step, found.generator, replace(found.history, resumed=(*found.history.resumed, 1)))
    (folder / "again").mkdir()
    save_state(folder / "again", found, RUN)
    assert _bits(load_state(state_path(folder / "again", found.steps_done), SHAPE, RUN)) == _bits(found)
    return "taken"


def _latents(folder: Path, content: Content) -> str:
    write(folder / LATENTS, content)
    np.testing.assert_array_equal(load_latents(folder, SHAPE, RUN), _array(3))
    return "as it was"


def _text(folder: Path, content: Content) -> str:
    arrays, facts = load_tensors(write(folder / TEXT, content), {"text": SHAPE})
    np.testing.assert_array_equal(arrays["text"], _array(4))
    assert facts == {"run": RUN, "seconds": 1.5}
    return "as it was"


def _history(folder: Path, content: Content) -> str:
    """Whatever it holds, it can be added to and written."""
    write(folder / HISTORY, content)
    found = load_history(folder)
    added = replace(found, seconds={**found.seconds, "decode": 1.0}, resumed=(*found.resumed, 1))
    assert msgspec.json.decode(msgspec.json.encode(added), type=History) == added
    return "taken" if found.seconds else "empty"


class _Cached:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, folder: Path, content: Content) -> str:
        write(folder / self._name, content)
        found = TextCache(folder, "an encoder", width=4).get(_IDS)
        if found is None:
            return "encoded again"
        np.testing.assert_array_equal(found, _EMBEDDING)
        return "as it was"


class _Folders:
    """A render that was stopped after 2 of 3 steps, one that was stopped in the decoder, and one that is done."""

    def __init__(self, bundle: Path, scratch: Path) -> None:
        self._bundle = bundle
        self._settings = Settings(num_steps=3)
        self._templates: list[tuple[Path, str]] = []
        self.files: list[bytes] = []
        self.records: list[object] = []
        self._whole = self._render(scratch / "done")
        for name, stop in (("stopped", 2), ("done", None)):
            self._render(scratch / name, stop)
            for path in sorted((scratch / name / "bear").iterdir()):
                if path.suffix in (".json", ".safetensors", ".txt"):
                    self._templates.append((scratch / name, path.name))
                    self.files.append(path.read_bytes())
        self.records = [json.loads((scratch / name / "bear" / RECORD).read_bytes()) for name in ("stopped", "done")]
        self._scratch = scratch
        self._products = products(scratch / "done/bear")

    def _render(self, folder: Path, stop: int | None = None, events: list[Event] | None = None) -> object:
        note = None if events is None else events.append
        outcomes = render(self._bundle, folder, settings=self._settings, stop_after=stop, on_event=note)
        return outcomes["bear"]

    def resume(self, folder: Path, content: Content) -> str:
        template, name = self._templates[content.which]
        return self._resume(folder, template, name, content)

    def record(self, folder: Path, content: Content) -> str:
        return self._resume(folder, self._scratch / "stopped", RECORD, content)

    def _resume(self, folder: Path, template: Path, name: str, content: Content) -> str:
        shutil.copytree(template, folder / "out")
        write(folder / "out/bear" / name, content)
        events: list[Event] = []
        outcome = self._render(folder / "out", events=events)
        one_line(*(event.message for event in events if isinstance(event, RenderWarning)))
        assert isinstance(outcome, VideoDone | VideoSkipped), outcome
        if isinstance(outcome, VideoSkipped):
            assert (template / "bear" / SIDECAR).exists()
            return "done before"
        assert products(folder / "out/bear") == self._products
        return "same bits"


# What is valid

_IDS = np.array([5, 6, 7])
_EMBEDDING = np.arange(12, dtype=np.float32).reshape(3, 4)
_SIZE = 4 * int(np.prod(SHAPE))
_HEADER = {
    name: {"dtype": "F32", "shape": SHAPE, "data_offsets": [number * _SIZE, (number + 1) * _SIZE]}
    for number, name in enumerate(("denoised", "latents"))
}


def write(path: Path, content: Content) -> Path:
    """The content as a file, whose tail takes no room."""
    path.write_bytes(content.data)
    if content.tail:
        os.truncate(path, len(content.data) + content.tail)
    return path


def one_line(*messages: str) -> None:
    """Fails for a message that a terminal would not show on one line of reasonable length."""
    for message in messages:
        assert message and len(printable(message)) < 4000, message[:300]


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _metadata(state: bytes) -> str:
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    return str(header["__metadata__"]["ttt-video"])


def _array(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


def _state() -> StepState:
    step = Step(index=1, num_steps=STEPS, timestep=499, guidance=1.25, latents=_array(1), denoised=_array(2))
    return StepState(step, dict(new_generator(7).bit_generator.state), History({"text": 1.5, "denoise": 2.25}, (1,)))


def _bits(state: StepState) -> tuple[object, ...]:
    step = state.step
    numbers = (step.index, step.num_steps, step.timestep, step.guidance, state.generator, state.history)
    return (*numbers, step.latents.tobytes(), step.denoised.tobytes())


def _record() -> RunRecord:
    return RunRecord(
        length="6s",
        scenes=(Scene("A bear."), Scene("A fox.", True, "blurred")),
        settings=Settings(num_steps=STEPS),
        bundle=BundleRecord(sha256="b" * 64, preset="tiny", ttt="linear", dtype="float32"),
        environment={"engine": "onnxruntime", "provider": "cpu", "version": "1.31"},
        versions={"numpy": "2.4.5", "python": "3.11.7"},
    )
