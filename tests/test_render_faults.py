"""Disks that are full or fail, places that cannot be written, and a terminal that is gone."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import names
from stand_in import board, files_in, products, render, steps_of, storyboard_file

from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.events import Event, StepDone, VideoDone, VideoFailed, WindowDecoded
from ttt_video_engine.runtime.files import check_folder
from ttt_video_engine.runtime.step_state import states_in

ROOT = Path(__file__).parents[1]
TARGETS = ("text.safetensors", "state-0001", "state-0003", "latents.safetensors", "video.json")


def fail_writes(patch: pytest.MonkeyPatch, target: str, code: int) -> None:
    """`write` on the file beside `target` fails."""
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name.startswith(f".{target}"):
            real(path, data[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        return real(path, data)

    patch.setattr(Path, "write_bytes", write_bytes)


def fail_fsync(patch: pytest.MonkeyPatch, target: str, code: int) -> None:
    """`fsync` of the file beside `target` fails."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if f"/.{target}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("fail", [fail_writes, fail_fsync])
@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_fails_is_no_success_and_loses_a_step_at_most(
    shared_bundle: Path, tmp_path: Path, target: str, fail: Callable[[pytest.MonkeyPatch, str, int], None], code: int
) -> None:
    render(shared_bundle, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, target, code)
        failed = render(shared_bundle, tmp_path / "cut")["bear"]
    assert isinstance(failed, VideoFailed) and isinstance(failed.error, OutputError)
    names(failed.message, next(name for name in NAMES if name.startswith(target)))
    kept = {"state-0003": "state-0002.safetensors", "latents.safetensors": "state-0003.safetensors"}.get(target)
    if kept is not None:
        names(failed.message, kept)
    left = files_in(tmp_path / "cut/bear")
    assert "error.json" in left and "video.json" not in left and not [name for name in left if ".partial" in name]
    expected = {"text": [], "stat": [1, 2][: int(target[-1]) - 1 if target[-1].isdigit() else 2]}.get(target[:4], [])
    assert sorted(states_in(tmp_path / "cut/bear")) == (expected if target != "latents.safetensors" else [2, 3])
    events: list[Event] = []
    assert isinstance(render(shared_bundle, tmp_path / "cut", on_event=events.append)["bear"], VideoDone)
    assert len(steps_of(events)) <= {"text": 4, "stat": 4, "late": 1, "vide": 0}[target[:4]]
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")


NAMES = [f"state-000{number}.safetensors" for number in (1, 3)] + list(TARGETS)

_Usage = namedtuple("_Usage", "total used free")


def test_too_little_space_for_all_videos_is_refused_before_the_first(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(1 << 40, 1 << 40, 1_500_000))
    assert isinstance(render(shared_bundle, tmp_path / "one")["bear"], VideoDone)
    with pytest.raises(OutputError, match="GB free"):
        render(shared_bundle, tmp_path / "many", *(board(f"v{number}") for number in range(20)))
    assert not (tmp_path / "many").exists()


def test_a_disk_that_others_fill_ends_with_the_last_state_kept(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the check before a state is written, so nothing of it is."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(1 << 40, 0, 0 if len(full) == 2 else 1 << 30))
    full: list[Event] = []
    failed = render(shared_bundle, tmp_path, on_event=lambda event: full.append(event) if steps_of([event]) else None)[
        "bear"
    ]
    assert isinstance(failed, VideoFailed)
    names(failed.message, "state-0002.safetensors")
    assert sorted(states_in(tmp_path / "bear")) == [1, 2]


@pytest.mark.parametrize("place", ["output", "folder", "mp4 is a folder", "folder is a file"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(
    shared_bundle: Path, tmp_path: Path, place: str
) -> None:
    out = tmp_path / "out"
    named = out / "bear"
    if place == "output":
        named = out
        out.symlink_to(tmp_path / "absent")
    else:
        out.mkdir()
        if place == "folder":
            named.symlink_to(tmp_path / "absent")
        elif place == "folder is a file":
            named.write_text("mine")
        else:
            named = out / "bear/video.mp4"
            named.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as refused:
        render(shared_bundle, out)
    names(str(refused.value), named)
    assert sorted(tmp_path.rglob("*")) == before


def command(bundle: Path, tmp_path: Path) -> list[str]:
    file = storyboard_file(tmp_path / "many.jsonl", [{"text": "A"}], [{"text": "B"}])
    out = ("--output-dir", tmp_path / "out", "--num-steps", "1")
    return [sys.executable, "cli.py", "sample", *map(str, (file, "--bundle", bundle, *out))]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
@pytest.mark.parametrize(("redirection", "code"), [("2>/dev/full", 0), (">/dev/full", 1), ("| true", 0), (">&-", 1)])
def test_nobody_to_tell_ends_no_batch(shared_bundle: Path, tmp_path: Path, redirection: str, code: int) -> None:
    """The code says where what standard output should have held is lost; a shell's is that of the pipe's end."""
    line = '"$@" ' + redirection
    done = subprocess.run(["sh", "-c", line, "sh", *command(shared_bundle, tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == code
    assert sorted(path.parent.name for path in tmp_path.rglob("video.json")) == ["many-001", "many-002"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_an_error_that_cannot_be_shown_has_its_exit_code(tmp_path: Path, redirection: str) -> None:
    arguments = ["sample", str(tmp_path / "absent.json"), "--bundle", str(tmp_path)]
    line = '"$@" ' + redirection
    command = ["sh", "-c", line, "sh", sys.executable, "cli.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_folder_that_cannot_be_searched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not look into /root."""

    def is_symlink(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_symlink", is_symlink)
    with pytest.raises(OutputError) as refused:
        check_folder(tmp_path / "closed/out")
    names(str(refused.value), tmp_path / "closed/out")


@pytest.mark.parametrize("stage", ["denoise", "decode"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_meanwhile_is_no_success(
    shared_bundle: Path, tmp_path: Path, stage: str, replaced: bool
) -> None:
    """What another process made in its place is left alone."""

    def remove(event: Event) -> None:
        happened = isinstance(event, StepDone) and event.steps_done == 2
        if happened if stage == "denoise" else isinstance(event, WindowDecoded) and event.windows_done == 2:
            shutil.rmtree(tmp_path / "out")
            if replaced:
                (tmp_path / "out/bear").mkdir(parents=True)
                (tmp_path / "out/bear/.lock").write_text("another's")

    failed = render(shared_bundle, tmp_path / "out", on_event=remove)["bear"]
    assert isinstance(failed, VideoFailed) and isinstance(failed.error, OutputError)
    names(failed.message, "out/bear")
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == ({".lock", "error.json"} if replaced else set())
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert isinstance(render(shared_bundle, tmp_path / "out")["bear"], VideoDone)


def test_the_clock_does_not_matter(shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes backwards by years, and files are of the future."""
    render(shared_bundle, tmp_path / "whole")
    render(shared_bundle, tmp_path / "cut", stop_after=2)
    for age, path in enumerate(sorted((tmp_path / "cut/bear").iterdir())):
        os.utime(path, (4e9 - age, 4e9 - age))
    monkeypatch.setattr("time.time", lambda: 1e6)
    events: list[Event] = []
    assert isinstance(render(shared_bundle, tmp_path / "cut", on_event=events.append)["bear"], VideoDone)
    assert steps_of(events) == [3, 4]
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")
