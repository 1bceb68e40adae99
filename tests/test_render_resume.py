"""A render that ends anywhere is resumed by the same call, to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from messages import names
from stand_in import DONE, StandInLoader, board, files_in, products, render, steps_of, storyboard_file

from ttt_video_engine.commands.stopping import StopSignals, resuming_command
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.events import (
    Event,
    RenderWarning,
    StepDone,
    StopRendering,
    VideoDone,
    VideoStarted,
    VideoStopped,
    WindowDecoded,
)
from ttt_video_engine.runtime.settings import Sampler, Settings
from ttt_video_engine.runtime.step_state import state_path, states_in

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("sampler", get_args(Sampler))


def of(sampler: Sampler, num_steps: int = 4) -> Settings:
    return Settings(num_steps=num_steps, sampler=sampler)


@BOTH
@pytest.mark.parametrize("error", [StopRendering, KeyboardInterrupt, RuntimeError])
def test_ended_after_each_step_it_comes_to_the_same_bits(
    shared_bundle: Path, tmp_path: Path, sampler: Sampler, error: type[BaseException]
) -> None:
    """The call is repeated, and every time one step further is the end of it."""
    render(shared_bundle, tmp_path / "whole", settings=of(sampler))
    done: list[int] = []

    def end(event: Event) -> None:
        if isinstance(event, StepDone):
            done.append(event.steps_done)
            raise error

    for _ in range(4):
        if error is StopRendering:
            assert render(shared_bundle, tmp_path / "cut", settings=of(sampler), on_event=end) == {}
        else:
            with pytest.raises(error):
                render(shared_bundle, tmp_path / "cut", settings=of(sampler), on_event=end)
    assert done == [1, 2, 3, 4]
    outcomes = render(shared_bundle, tmp_path / "cut", settings=of(sampler))
    assert isinstance(outcomes["bear"], VideoDone)
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")
    sidecar = json.loads((tmp_path / "cut/bear/video.json").read_bytes())
    assert sidecar["resumed"] == [1, 2, 3] and set(sidecar["seconds"]) == {"text", "denoise", "decode"}
    assert files_in(tmp_path / "cut/bear") == DONE


@BOTH
def test_an_end_between_saved_states_saves_one(shared_bundle: Path, tmp_path: Path, sampler: Sampler) -> None:
    render(shared_bundle, tmp_path / "whole", settings=of(sampler, 6))

    def end(event: Event) -> None:
        if isinstance(event, StepDone) and event.steps_done == 3:
            assert not event.saved and not states_in(tmp_path / "cut/bear")
            raise StopRendering

    render(shared_bundle, tmp_path / "cut", settings=of(sampler, 6), on_event=end, checkpoint_every=5)
    assert list(states_in(tmp_path / "cut/bear")) == [3]
    render(shared_bundle, tmp_path / "cut", settings=of(sampler, 6), checkpoint_every=5)
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


def test_ended_while_it_decodes_it_decodes_again_and_runs_no_step(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "whole")

    def end(event: Event) -> None:
        if isinstance(event, WindowDecoded) and event.windows_done == 3:
            raise StopRendering

    render(shared_bundle, tmp_path / "cut", on_event=end)
    assert files_in(tmp_path / "cut/bear") == ["history.json", "latents.safetensors", "prompt.txt", "run.json"]
    loader = StandInLoader(open_bundle(shared_bundle))
    render(shared_bundle, tmp_path / "cut", loader=loader)
    assert loader.loaded == ["vae_decoder-first", "vae_decoder-next"]
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


@BOTH
def test_stop_after_counts_steps_in_total(shared_bundle: Path, tmp_path: Path, sampler: Sampler) -> None:
    render(shared_bundle, tmp_path / "whole", settings=of(sampler))
    events: list[Event] = []
    for stop, steps, total in ((1, [1], 1), (3, [2, 3], 3), (3, [], 3), (2, [], 3)):
        events.clear()
        outcomes = render(
            shared_bundle, tmp_path / "cut", settings=of(sampler), stop_after=stop, on_event=events.append
        )
        assert isinstance(outcomes["bear"], VideoStopped) and outcomes["bear"].steps_done == total
        assert steps_of(events) == steps
    assert isinstance(render(shared_bundle, tmp_path / "cut", settings=of(sampler), stop_after=9)["bear"], VideoDone)
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


@BOTH
@pytest.mark.parametrize("region", ["length", "header", "padding", "metadata", "latents", "denoised", "cut", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(
    shared_bundle: Path, tmp_path: Path, sampler: Sampler, region: str
) -> None:
    render(shared_bundle, tmp_path / "whole", settings=of(sampler))
    render(shared_bundle, tmp_path / "cut", settings=of(sampler), stop_after=3)
    path = state_path(tmp_path / "cut/bear", 3)
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + header])
    if region in ("cut", "empty"):
        data = data[: -1 if region == "cut" else 0]
    else:
        place = {"length": 0, "header": 9, "padding": 7 + header, "metadata": data.index(b"timestep") + 15}
        tensor = offsets.get(region, {"data_offsets": [0, 0]})["data_offsets"]
        data[place.get(region, 8 + header + sum(tensor) // 2)] ^= 1
    path.write_bytes(data)
    events: list[Event] = []
    render(shared_bundle, tmp_path / "cut", settings=of(sampler), on_event=events.append)
    (warning,) = [event.message for event in events if isinstance(event, RenderWarning)]
    names(warning, path, "step 2")
    assert steps_of(events) == [3, 4]
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


def test_with_both_states_damaged_it_starts_from_the_first_step(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "whole")
    render(shared_bundle, tmp_path / "cut", stop_after=3)
    for path in states_in(tmp_path / "cut/bear").values():
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    events: list[Event] = []
    render(shared_bundle, tmp_path / "cut", on_event=events.append)
    warnings = [event.message for event in events if isinstance(event, RenderWarning)]
    assert len(warnings) == 2 and steps_of(events) == [1, 2, 3, 4]
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


def test_a_state_of_another_render_is_not_taken(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "other", settings=Settings(num_steps=4, seed=1), stop_after=3)
    render(shared_bundle, tmp_path / "cut", stop_after=2)
    os.replace(state_path(tmp_path / "other/bear", 3), state_path(tmp_path / "cut/bear", 3))
    events: list[Event] = []
    render(shared_bundle, tmp_path / "cut", on_event=events.append)
    assert steps_of(events) == [3, 4]


def test_damaged_latents_are_made_again(shared_bundle: Path, tmp_path: Path) -> None:
    def end(event: Event) -> None:
        if isinstance(event, WindowDecoded):
            raise StopRendering

    render(shared_bundle, tmp_path / "whole")
    render(shared_bundle, tmp_path / "cut", on_event=end)
    path = tmp_path / "cut/bear/latents.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    events: list[Event] = []
    render(shared_bundle, tmp_path / "cut", on_event=events.append)
    names(next(event.message for event in events if isinstance(event, RenderWarning)), path)
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


@pytest.mark.parametrize(
    ("settings", "texts", "values"),
    [
        (Settings(num_steps=5), (), ("settings.num_steps", 4, 5)),
        (Settings(num_steps=4, seed=7), (), ("settings.seed", 42, 7)),
        (Settings(num_steps=4, fps=24), (), ("settings.fps", 16, 24)),
        (Settings(num_steps=4), ("A fox.",), ("scenes 1.text", "A bear.", "A fox.")),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_another_render_in_the_same_folder_is_refused(
    shared_bundle: Path,
    tmp_path: Path,
    settings: Settings,
    texts: tuple[str, ...],
    values: tuple[object, ...],
    done: bool,
) -> None:
    render(shared_bundle, tmp_path, stop_after=None if done else 2)
    before = {path: path.read_bytes() for path in (tmp_path / "bear").iterdir()}
    with pytest.raises(OutputError) as refused:
        render(shared_bundle, tmp_path, board("bear", *texts), settings=settings)
    names(str(refused.value), tmp_path / "bear", "--overwrite", *values)
    assert {path: path.read_bytes() for path in (tmp_path / "bear").iterdir()} == before


def test_overwrite_starts_anew_and_removes_nothing_of_the_users(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path, stop_after=2)
    for name in ("notes.txt", "state.safetensors", ".mine.partial", "state-1.safetensors.bak"):
        (tmp_path / "bear" / name).write_text("mine")
    events: list[Event] = []
    settings = Settings(num_steps=3)
    render(shared_bundle, tmp_path, settings=settings, overwrite=True, on_event=events.append)
    assert [event.steps_done for event in events if isinstance(event, VideoStarted)] == [0]
    mine = [name for name in files_in(tmp_path / "bear") if (tmp_path / "bear" / name).read_bytes() == b"mine"]
    assert mine == [".mine.partial", "notes.txt", "state-1.safetensors.bak", "state.safetensors"]


def test_what_a_killed_process_left_half_written_is_removed(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path, stop_after=2)
    left = [".video.mp4.123.partial.mp4", ".state-0003.safetensors.9.partial.safetensors", ".run.json.1.partial.json"]
    mine = [".video.mp4.partial.mp4", ".holiday.mp4.123.partial.mp4"]
    for name in (*left, *mine):
        (tmp_path / "bear" / name).write_text("")
    render(shared_bundle, tmp_path)
    assert [name for name in files_in(tmp_path / "bear") if ".partial" in name] == sorted(mine)


def test_latents_can_be_left_out(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path, keep_latents=False)
    assert files_in(tmp_path / "bear") == [name for name in DONE if name != "latents.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_first_signal_is_noted_and_the_second_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.check(Event("bear"))
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(StopRendering):
            signals.check(Event("bear"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_resuming_command_neither_starts_anew_nor_stops_again() -> None:
    arguments = ["sample", "a b.json", "--stop-after", "3", "--overwrite", "--seed", "7", "--stop-after=4"]
    assert resuming_command("ttt-video", arguments) == "ttt-video sample 'a b.json' --seed 7"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_where_the_same_one_goes_on(
    shared_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    file = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    command = ["sample", file, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--num-steps", "200"]
    with subprocess.Popen(
        [sys.executable, "cli.py", *map(str, command), "--overwrite"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 60
        while not states_in(tmp_path / "out/bear") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    states = states_in(tmp_path / "out/bear")
    assert states and ".lock" not in files_in(tmp_path / "out/bear")
    (told,) = [line for line in err.splitlines() if "ttt-video sample" in line]
    assert str(file) in told and "--overwrite" not in told
