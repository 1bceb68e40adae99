"""Many videos in one call: each on its own, every graph loaded once, several processes on one folder."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from messages import last_refusal, names, refusal
from stand_in import Arrays, StandIn, StandInLoader, board, files_in, products, render, steps_of, storyboard_file

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import ConfigError, StoryboardError
from ttt_video_engine.runtime.events import (
    Event,
    StepDone,
    TextEncoded,
    VideoBusy,
    VideoDone,
    VideoFailed,
    VideoSkipped,
    WindowDecoded,
    to_json,
)
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.jobs import in_shard
from ttt_video_engine.runtime.render_folder import claimed
from ttt_video_engine.runtime.settings import Settings

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


def test_a_transformer_is_loaded_once_and_videos_of_one_length_follow_each_other(
    shared_bundle: Path, tmp_path: Path
) -> None:
    loader = StandInLoader(open_bundle(shared_bundle))
    events: list[Event] = []
    long = board("long", "A", "B", "C")
    outcomes = render(
        shared_bundle, tmp_path, board("a"), long, board("b"), board("c"), loader=loader, on_event=events.append
    )
    assert [type(outcomes[name]) for name in ("a", "long", "b", "c")] == [VideoDone] * 4
    assert loader.loaded == [
        *("text_encoder", "transformer-3s", "transformer-9s"),
        *("vae_decoder-first", "vae_decoder-next") * 4,
    ]
    order = [event.video for event in events if isinstance(event, StepDone)]
    assert list(dict.fromkeys(order)) == ["a", "b", "c", "long"]
    assert [event.done for event in events if isinstance(event, TextEncoded)] == [1, 2, 3, 4]


def test_a_queue_has_no_more_graphs_in_memory_than_a_video_alone(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the transformer beside the decoder's first graph, while a preview is drawn."""
    loaded: list[str] = []
    together: set[tuple[str, ...]] = set()

    def enter(runner: StandIn) -> StandIn:
        loaded.append(runner._graph)
        together.add(tuple(loaded))
        return runner

    monkeypatch.setattr(StandIn, "__enter__", enter)
    monkeypatch.setattr(StandIn, "__exit__", lambda runner, *_: loaded.remove(runner._graph))
    found = []
    for boards in ([board("a")], [board("b"), board("c")]):
        together.clear()
        outcomes = render(shared_bundle, tmp_path, *boards, preview_every=2)
        assert {type(outcome) for outcome in outcomes.values()} == {VideoDone}
        found.append(set(together))
    assert found[0] == found[1]
    assert ("transformer-3s", "vae_decoder-first") in found[1] and max(map(len, found[1])) == 2


def test_a_video_of_a_queue_is_the_one_it_is_alone(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "queue", board("a"), board("b"))
    render(shared_bundle, tmp_path / "alone", board("b"))
    assert products(tmp_path / "queue/b") == products(tmp_path / "alone/b")
    assert products(tmp_path / "queue/b") != products(tmp_path / "queue/a")


def spoil(graph: str, at_run: int, value: float) -> Callable[[str, int, Arrays], Arrays]:
    def change(name: str, run: int, outputs: Arrays) -> Arrays:
        if name.startswith(graph) and run == at_run:
            outputs = {key: array.copy() for key, array in outputs.items()}
            next(iter(outputs.values())).flat[5] = value
        return outputs

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_step_and_tensor_and_the_others_go_on(shared_bundle: Path, tmp_path: Path, value: float) -> None:
    """Run 7 of the transformer is step 3 of the second video."""
    loader = StandInLoader(open_bundle(shared_bundle), spoil("transformer", 7, value))
    outcomes = render(shared_bundle, tmp_path, board("a"), board("b"), board("c"), loader=loader)
    failed = outcomes["b"]
    assert isinstance(failed, VideoFailed) and failed.stage == "denoise"
    names(failed.message, "step 3 of 4", "velocity", "transformer-3s", 1, "--dtype", "float32", "bfloat16")
    assert isinstance(outcomes["a"], VideoDone) and isinstance(outcomes["c"], VideoDone)
    note = json.loads((tmp_path / "b/error.json").read_bytes())
    assert (note["error"], note["stage"]) == ("NumericsError", "denoise") and note["message"] in failed.message
    assert [name for name in files_in(tmp_path / "b") if name.startswith("state")] == [
        "state-0001.safetensors",
        "state-0002.safetensors",
    ]
    events: list[Event] = []
    outcomes = render(shared_bundle, tmp_path, board("a"), board("b"), board("c"), on_event=events.append)
    assert [type(outcomes[name]) for name in "abc"] == [VideoSkipped, VideoDone, VideoSkipped]
    assert steps_of(events) == [3, 4] and "error.json" not in files_in(tmp_path / "b")


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder-first"])
def test_a_failure_in_any_stage_is_one_videos_own(shared_bundle: Path, tmp_path: Path, graph: str) -> None:
    seen: list[str] = []

    def change(name: str, run: int, outputs: Arrays) -> Arrays:
        seen.append(name)
        if name == graph and seen.count(name) == 1:
            raise RuntimeError("out of something")
        return outputs

    loader = StandInLoader(open_bundle(shared_bundle), change)
    outcomes = render(shared_bundle, tmp_path, board("a"), board("b"), loader=loader)
    assert isinstance(outcomes["a"], VideoFailed) and isinstance(outcomes["b"], VideoDone)
    assert json.loads((tmp_path / "a/error.json").read_bytes())["error"] == "RuntimeError"


def test_a_failed_video_holds_no_arrays(shared_bundle: Path, tmp_path: Path) -> None:
    """The outcome keeps its error, whose trace would keep embeddings and latents."""

    def change(name: str, run: int, outputs: Arrays) -> Arrays:
        if name.startswith("transformer"):
            raise RuntimeError("out of memory")
        return outputs

    loader = StandInLoader(open_bundle(shared_bundle), change)
    outcomes = render(shared_bundle, tmp_path, board("a"), board("b"), loader=loader)
    for outcome in outcomes.values():
        assert isinstance(outcome, VideoFailed)
        trace = outcome.error.__traceback__
        depth = 0
        while trace is not None:
            held = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, np.ndarray)]
            assert not held, trace.tb_frame
            trace, depth = trace.tb_next, depth + 1
        assert depth > 2


def test_memory_does_not_grow_with_the_number_of_videos(shared_bundle: Path, tmp_path: Path) -> None:
    """At any step and window, no array of an earlier video is alive."""
    seen: list[tuple[str, weakref.ref[Any]]] = []

    def watch(event: Event) -> None:
        match event:
            case StepDone():
                arrays = [event.latents, event.denoised]
            case WindowDecoded():
                arrays = [event.frames]  # type: ignore[list-item]  # of bytes
            case _:
                return
        gc.collect()
        alive = {video for video, array in seen if array() is not None}
        assert alive <= {event.video}
        seen.extend((event.video, weakref.ref(array)) for array in arrays)

    gc.freeze()  # what was there before is not looked through at each event
    try:
        render(shared_bundle, tmp_path, *(board(f"v{number}") for number in range(3)), on_event=watch)
    finally:
        gc.unfreeze()
    assert len(seen) == 3 * (4 * 2 + 6)


def test_what_the_caller_raises_is_not_taken_for_a_failure_of_the_video(shared_bundle: Path, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, StepDone):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own") as raised:
        render(shared_bundle, tmp_path, on_event=on_event)
    assert raised.value.__context__ is None and raised.value.__cause__ is None, "nothing that leads round in a circle"
    assert "error.json" not in files_in(tmp_path / "bear")


def test_a_second_process_takes_what_nobody_has(shared_bundle: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "b"):
        outcomes = render(shared_bundle, tmp_path, board("a"), board("b"), board("c"))
        assert files_in(tmp_path / "b") == [".lock"]
    assert [type(outcomes[name]) for name in "abc"] == [VideoDone, VideoBusy, VideoDone]
    assert isinstance(render(shared_bundle, tmp_path, board("b"))["b"], VideoDone)


def test_the_same_video_twice_is_told_who_has_it(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    file = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    code = (
        "import sys; from pathlib import Path; from ttt_video_engine.runtime.render_folder import claimed\n"
        "with claimed(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out/bear"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdout.readline()
        code_, _, err = run("sample", file, "--bundle", shared_bundle, "--output-dir", tmp_path / "out")
        assert code_ == 2
        names(last_refusal(err), tmp_path / "out/bear", holder.pid)
        holder.kill()
        holder.wait()
    # The lock of a process that was killed is gone with it.
    assert isinstance(render(shared_bundle, tmp_path / "out")["bear"], VideoDone)


def test_a_lock_file_alone_locks_nothing(shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bear").mkdir()
    (tmp_path / "bear/.lock").write_text("{")
    with FileLock(tmp_path / "bear/.lock"):
        outcomes = render(shared_bundle, tmp_path)
        assert isinstance(outcomes["bear"], VideoBusy)
    assert isinstance(render(shared_bundle, tmp_path)["bear"], VideoDone)


@pytest.mark.parametrize("count", range(1, 8))
def test_shards_hold_every_video_once(count: int) -> None:
    boards = [board(f"video-{number:03d}", f"Scene {number}.") for number in range(60)]
    parts = [[one.name for one in boards if in_shard(one, index, count)] for index in range(1, count + 1)]
    assert sorted(name for part in parts for name in part) == [one.name for one in boards]
    assert all(parts), "none of them is empty for sixty videos"


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1/0", "a/2", "1", "-1/2", "1/2/3", "²/3"])
def test_a_shard_that_is_none_is_refused(run: Run, shared_bundle: Path, tmp_path: Path, shard: str) -> None:
    file = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    found = refusal(run("sample", file, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--shard", shard))
    names(found, "--shard", shard)


def test_two_videos_of_one_name_are_refused(shared_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match=r"bear\.json"):
        render(shared_bundle, tmp_path / "out", board("bear"), board("bear", "Another."))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"checkpoint_every": 0}, {"stop_after": 0}])
def test_options_out_of_range_are_refused(shared_bundle: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        render(shared_bundle, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_events_as_json(shared_bundle: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    loader = StandInLoader(open_bundle(shared_bundle), spoil("transformer", 1, np.nan))
    boards = (board("a"), board("b"))
    render(
        shared_bundle, tmp_path, *boards, loader=loader, on_event=lambda event: lines.append(json.loads(to_json(event)))
    )
    step = next(line for line in lines if line["event"] == "StepDone")
    assert set(step) == {"event", "video", "steps_done", "num_steps", "seconds", "saved", "guidance"}
    failed = next(line for line in lines if line["event"] == "VideoFailed")
    assert failed["video"] == "a" and failed["error"]["error"] == "NumericsError"
    done = next(line for line in lines if line["event"] == "VideoDone")
    assert done["path"] == str(tmp_path / "b/video.mp4")


def test_a_command_with_a_failing_video(run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """From the command line: the others are made, a table says so, and the code is 1; the same command again: 0."""
    opened = open_bundle(shared_bundle)
    loaders = iter([StandInLoader(opened, spoil("transformer", 1, np.nan)), StandInLoader(opened)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # embeddings of the stand-in, not of the real encoder
    monkeypatch.setattr("ttt_video_engine.commands.replica.make_loader", lambda *_, **__: next(loaders))
    many = storyboard_file(tmp_path / "many.jsonl", [{"text": "A"}], [{"text": "B"}])
    one = storyboard_file(tmp_path / "one.json", [{"text": "C"}])
    log = tmp_path / "log.jsonl"
    arguments = ("sample", many, one, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--num-steps", 2)
    code, out, err = run(*arguments, "--log-json", log)
    assert code == 1
    assert out == f"video: {tmp_path / 'out/many-002/video.mp4'}\nvideo: {tmp_path / 'out/one/video.mp4'}\n"
    names(last_refusal(err), 1, 3, "many-001")
    table = [line.split()[:2] for line in err.splitlines()]
    assert ["many-001", "failed"] in table and ["many-002", "done"] in table and ["one", "done"] in table
    assert [json.loads(line)["video"] for line in log.read_text().splitlines() if "VideoDone" in line] == [
        "many-002",
        "one",
    ]
    code, out, err = run(*arguments)
    assert (code, out) == (0, f"video: {tmp_path / 'out/many-001/video.mp4'}\n")
    names(err.splitlines()[-1], 2, 3)


def test_settings_are_the_bundles_own_where_none_are_given() -> None:
    assert Settings() == Settings(num_steps=50)


_ONE_OF_TWO = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from stand_in import board, render
from ttt_video_engine.runtime.events import VideoDone
sys.stdin.readline()
outcomes = render(Path(sys.argv[1]), Path(sys.argv[2]), *(board(f"v{number}") for number in range(4)))
for name, outcome in outcomes.items():
    print(name, type(outcome).__name__)
"""


@pytest.mark.parametrize("workers", [2, 4])
def test_processes_share_a_queue(shared_bundle: Path, tmp_path: Path, workers: int) -> None:
    """They start at once. Every video is made, with one sidecar that is its own; none fails."""
    command = [sys.executable, "-c", _ONE_OF_TWO, str(shared_bundle), str(tmp_path / "both")]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=300)[0].split() for process in started]
    assert [process.returncode for process in started] == [0] * workers
    outcomes = [dict(zip(words[::2], words[1::2], strict=True)) for words in told]
    assert {kind for found in outcomes for kind in found.values()} <= {"VideoDone", "VideoSkipped", "VideoBusy"}
    render(shared_bundle, tmp_path / "alone", *(board(f"v{number}") for number in range(4)))
    for name in ("v0", "v1", "v2", "v3"):
        assert [found[name] for found in outcomes].count("VideoDone") == 1
        folder = tmp_path / "both" / name
        assert products(folder) == products(tmp_path / "alone" / name)
        assert json.loads((folder / "video.json").read_bytes())["sha256"] == sha256_of(folder / "video.mp4")


def test_nan_in_the_first_step_is_seen_in_it(shared_bundle: Path, tmp_path: Path) -> None:
    runs: list[int] = []

    def change(name: str, run: int, outputs: Arrays) -> Arrays:
        runs.append(run)
        return spoil("transformer", 1, np.nan)(name, run, outputs)

    failed = render(shared_bundle, tmp_path, loader=StandInLoader(open_bundle(shared_bundle), change))["bear"]
    assert isinstance(failed, VideoFailed) and max(runs) == 1
    names(failed.message, "step 1 of 4", "velocity")
