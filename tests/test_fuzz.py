"""A small, repeatable part of `make fuzz`, and what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz import Guard, Leaves, fuzz
from fuzz_inputs import HUGE, Content
from fuzz_kinds import RUN, SHAPE, STATE, Kind, kinds, write
from hypothesis import strategies as st

from ttt_video_engine.runtime.errors import DamagedFile, OutputError
from ttt_video_engine.runtime.run_record import RECORD, read_record
from ttt_video_engine.runtime.sampler import Step
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
)
from ttt_video_engine.runtime.tensor_file import checksum_of, load_tensors, save_tensors

CASES = 600


def arrays() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    noise = np.random.default_rng(3)
    return {name: noise.standard_normal(SHAPE, dtype=np.float32) for name in ("latents", "denoised")}


def saved(folder: Path) -> Path:
    step = Step(index=1, num_steps=4, timestep=499, guidance=1.25, **arrays())
    save_state(folder, StepState(step, dict(new_generator(7).bit_generator.state), History({"text": 1.5}, (1,))), RUN)
    return folder / STATE


def test_every_reader_takes_or_refuses_what_is_nearly_right(shared_bundle: Path, tmp_path: Path) -> None:
    guard = Guard(600)
    outcomes = {}
    for kind in kinds(shared_bundle, tmp_path / "valid"):
        cases = 4 if kind.slow else max(10, CASES * kind.share // 100)
        outcomes[kind.name] = fuzz(kind, cases, tmp_path / "case", guard)
        assert outcomes[kind.name].total() >= cases
    assert all(len(found) > 1 for name, found in outcomes.items() if name.startswith(("storyboard ", "state")))


@pytest.mark.parametrize("bad", ["error", "outside", "program"])
def test_the_fuzzer_sees_what_must_not_happen(tmp_path: Path, bad: str) -> None:
    def target(folder: Path, content: Content) -> str:
        if bad == "error":
            raise KeyError("not one of the project's")
        if bad == "outside":
            (folder / "../mine").write_text("")
        os.system("true")
        return "fine"

    kind = Kind("bad", 1, st.just(Content(b"")), target)
    with pytest.raises((KeyError, Leaves)):
        fuzz(kind, 1, tmp_path / "case", Guard(600))
    assert not (tmp_path / "mine").exists()


def test_a_guard_rests_after_the_last_case(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from hypothesis import strategies as st
        from fuzz import Guard, fuzz
        from fuzz_inputs import Content
        from fuzz_kinds import Kind
        kind = Kind("good", 1, st.just(Content(b"")), lambda folder, content: "fine")
        fuzz(kind, 1, Path(sys.argv[1]), Guard(1.0))
        time.sleep(1.5)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", ["state", "latents"])
def test_no_bit_of_a_state_can_change_unnoticed(tmp_path: Path, name: str) -> None:
    """Every bit of the file in turn: header length, header, checksum, facts and each tensor."""
    if name == "state":
        path = saved(tmp_path)
    else:
        save_latents(tmp_path, arrays()["latents"], History(), RUN)
        path = tmp_path / LATENTS
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 3, 7) if place >= 8 else range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedFile):
                load_state(path, SHAPE, RUN) if name == "state" else load_latents(tmp_path, SHAPE, RUN)


# Found by it


@pytest.mark.parametrize("tail", [HUGE, 0])
def test_a_file_of_gigabytes_or_without_an_end_is_not_read(tmp_path: Path, tail: int) -> None:
    for name in (RECORD, HISTORY, STATE):
        if tail:
            write(tmp_path / name, Content(b"{}", tail))
        else:
            os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(OutputError, match=RECORD):
        read_record(tmp_path)
    assert load_history(tmp_path) == History()
    with pytest.raises(DamagedFile, match=STATE):
        load_state(tmp_path / STATE, SHAPE, RUN)


def test_a_message_quotes_a_file_at_no_length(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"[" * 9000: 1}))
    with pytest.raises(OutputError) as refused:
        read_record(tmp_path)
    assert len(str(refused.value)) < len(str(tmp_path)) + 400


def test_the_record_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"format_version": 2}')
    with pytest.raises(OutputError, match=RECORD):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        *(("steps_done", value) for value in (0, 4, 1.5, "2", 2**70)),
        *(("num_steps", value) for value in (2, None)),
        *(("timestep", -1), ("guidance", "1"), ("more", 1), ("history", {"resumed": [2**70]})),
        ("generator", {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}, "has_uint32": 0, "uinteger": 0}),
        ("generator", {"bit_generator": "PCG64", "state": {"state": 2**129, "inc": 1}, "has_uint32": 0, "uinteger": 0}),
    ],
)
def test_a_state_that_no_render_saves_is_damaged(tmp_path: Path, fact: str, value: object) -> None:
    """Its checksum is right, so only what it says is wrong."""
    path = saved(tmp_path)
    shapes = {"latents": SHAPE, "denoised": SHAPE}
    found, facts = load_tensors(path, shapes)
    save_tensors(path, found, facts)
    load_state(path, SHAPE, RUN)
    save_tensors(path, found, {**facts, fact: value})
    assert checksum_of(*load_tensors(path, shapes))
    with pytest.raises(DamagedFile, match=STATE):
        load_state(path, SHAPE, RUN)


def test_a_history_that_cannot_be_written_again_is_none(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text(json.dumps({"resumed": [2**70]}))
    assert load_history(tmp_path) == History()
