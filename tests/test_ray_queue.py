"""A queue on two workers of Ray, here: deaths of a worker, of the command and of the store cost a step each at most."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from messages import holds, last_refusal, names, refusal
from object_store import BUCKET, ObjectStore, object_store
from stand_in import DONE, board, files_in, products, render, storyboard_file

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ttt-video-engine[ray]'")

from ray_processes import DiesAfterwards, WithoutStore, steps_begun  # noqa: E402  # need ray

from ttt_video_engine.replicas.ray_queue import RayQueue  # noqa: E402
from ttt_video_engine.runtime.errors import StoreUnreachable  # noqa: E402
from ttt_video_engine.runtime.events import Event, RenderWarning, VideoSkipped  # noqa: E402

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
VIDEOS, STEPS = 8, 4
OUTAGE = 10
"""Seconds that the store is stopped."""
PATIENCE = 240
"""Seconds that anything here may take."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def cluster(s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of this process, whose workers have its environment."""
    variables = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "RAY_AUTH_MODE": "disabled",  # a token would be written into the user's home
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # other tests run beside this one
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


class Command:
    """`sample --ray` of a queue in a process of its own, with a JSON log that is added to."""

    def __init__(self, cluster: str, bundle: Path, queue: Path, output: str) -> None:
        self.log = queue.with_suffix(".log")
        self._arguments = ["sample", str(queue), "--bundle", str(bundle), "--output-dir", output, "--num-steps",
                           str(STEPS), "--ray", cluster, "--workers", "2", "--log-json", str(self.log)]  # fmt: skip

    def start(self) -> "subprocess.Popen[str]":
        program = [sys.executable, str(ROOT / "tests/ray_processes.py")]
        return subprocess.Popen(
            [*program, *self._arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if event["event"] == kind]


def until(happened: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    """What is true once it has happened, while the command runs."""
    deadline = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def rendering() -> list[psutil.Process]:
    """Workers of the cluster that have a video."""
    return [child for child in psutil.Process().children(recursive=True) if _title(child).endswith("Replica.render")]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def test_deaths_of_a_worker_of_the_command_and_of_the_store(
    cluster: str, s3: ObjectStore, shared_bundle: Path, tmp_path: Path
) -> None:
    queue = storyboard_file(tmp_path / "bear.jsonl", *([{"text": f"Bear {number}."}] for number in range(VIDEOS)))
    command = Command(cluster, shared_bundle, queue, f"s3://{BUCKET}/ray")

    first = command.start()
    until(lambda: any(event["steps_done"] == 2 for event in command.events("StepDone")), first)
    until(rendering, first)[0].kill()
    (warning,) = until(lambda: command.events("RenderWarning"), first)
    until(lambda: len(command.events("VideoDone")) >= 3, first)
    first.kill()
    first.communicate()
    steps_before, done_before = len(command.events("StepDone")), len(command.events("VideoDone"))

    second = command.start()
    until(lambda: len(command.events("StepDone")) > steps_before, second)
    s3.stop()
    time.sleep(OUTAGE)
    s3.start()
    _, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, err

    # All of them are there, and are those of one process.
    names_of = [f"bear-{number + 1:03}" for number in range(VIDEOS)]
    boards = [board(name, f"Bear {number}.") for number, name in enumerate(names_of)]
    render(shared_bundle, tmp_path / "alone", *boards)
    for name in names_of:
        found = s3.files(f"ray/{name}")
        assert sorted(found) == DONE
        assert {product: found[product] for product in products(tmp_path / "alone" / name)} == products(
            tmp_path / "alone" / name
        )
    # No step that was reported is done again; those that were being done are, once for each death.
    counts = steps_begun()
    again = sum(counts.values()) - len(counts)
    assert len(counts) == VIDEOS * STEPS and max(counts.values()) <= 2 and again <= 3
    reported = [(event["video"], event["steps_done"]) for event in command.events("StepDone")]
    assert len(set(reported)) == len(reported)
    assert holds(warning["message"], warning["video"]) and "done again" in warning["message"]
    resumed = [event for event in command.events("VideoStarted") if event["steps_done"]]
    assert warning["video"] in {event["video"] for event in resumed} or "step 0" in warning["message"]
    # The second command did what was missing, and waited for the store.
    assert 3 <= done_before < VIDEOS and len(command.events("VideoDone")) <= VIDEOS + 2
    assert "does not answer" in err
    assert not rendering()


def test_a_video_that_fails_and_one_that_kills_its_workers_leave_the_others(
    cluster: str, s3: ObjectStore, shared_bundle: Path, tmp_path: Path
) -> None:
    """In a folder that the workers share. The table, the line of error and the code are those of one process."""
    for name in ("bear", "broken", "deadly"):
        storyboard_file(tmp_path / f"{name}.json", [{"text": name}])
    command = Command(cluster, shared_bundle, tmp_path / "bear.json", str(tmp_path / "out"))
    command._arguments[2:2] = [str(tmp_path / "broken.json"), str(tmp_path / "deadly.json")]
    process = command.start()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert out == f"video: {tmp_path / 'out/bear/video.mp4'}\n"
    names(last_refusal(err), 2, 3, "broken", "deadly")
    assert files_in(tmp_path / "out/bear") == DONE
    assert len([event for event in command.events("RenderWarning") if event["video"] == "deadly"]) == 3
    failed = {event["video"]: event["error"]["error"] for event in command.events("VideoFailed")}
    assert failed == {"broken": "RuntimeError", "deadly": "WorkerDied"}


def test_a_store_that_is_gone_ends_the_queue(cluster: str) -> None:
    """It is no failure of the first video, and the next would wait as long."""
    events: list[Event] = []
    queue = RayQueue(WithoutStore, (), 0, events.append, lambda: False)
    with pytest.raises(StoreUnreachable):
        queue.run([board("a"), board("b")], 1)
    assert [type(event) for event in events] == [RenderWarning] and queue.outcomes == {}


def test_a_death_after_the_outcome_costs_nothing(cluster: str) -> None:
    events: list[Event] = []
    outcomes = RayQueue(DiesAfterwards, (), 0, events.append, lambda: False).run([board("a"), board("b")], 1)
    assert [type(event) for event in events] == [VideoSkipped] * 2 and outcomes.keys() == {"a", "b"}


def test_more_gpus_than_there_are_is_wrong_input(cluster: str, run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    queue = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    program = [sys.executable, "cli.py", "sample", str(queue), "--bundle", str(shared_bundle), "--ray", cluster]
    done = subprocess.run([*program, "--gpus-per-worker", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    names(refusal((done.returncode, done.stdout, done.stderr)), 1, 0)


def test_a_signal_ends_the_command_and_its_workers_and_it_is_resumed(
    cluster: str, s3: ObjectStore, shared_bundle: Path, tmp_path: Path
) -> None:
    queue = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    command = Command(cluster, shared_bundle, queue, f"s3://{BUCKET}/signal")
    process = command.start()
    until(lambda: command.events("StepDone"), process)
    process.terminate()
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, "") and holds(err, "--ray") and not rendering()
    process = command.start()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "resumes after step" in err
    assert sorted(s3.files("signal/bear")) == DONE


def test_what_no_worker_can_do_is_wrong_input(cluster: str, shared_bundle: Path, tmp_path: Path) -> None:
    """As in a process alone, where it is refused before anything is started."""
    queue = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    program = [sys.executable, "cli.py", "sample", str(queue), "--bundle", str(shared_bundle), "--ray", cluster]
    done = subprocess.run([*program, "--provider", "cuda"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    names(last_refusal(done.stderr), "--provider", "cuda")


def test_an_address_without_a_cluster_is_wrong_input(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    queue = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        names(refusal(run("sample", queue, "--bundle", shared_bundle, "--ray", address)), address)


def test_options_of_ray_are_refused_without_it(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    queue = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    names(refusal(run("sample", queue, "--bundle", shared_bundle, "--workers", 2)), "--workers", "--ray")
    names(refusal(run("sample", queue, "--bundle", shared_bundle, "--wandb", "a", "--ray")), "--wandb", "--ray")
