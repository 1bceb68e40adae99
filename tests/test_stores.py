"""Renders whose output is an object store: what is in it at every moment, and what another machine makes of it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from messages import holds, last_refusal, names, refusal
from object_store import BUCKET, ObjectStore, object_store
from stand_in import DONE, Arrays, StandInLoader, files_in, products, storyboard_file

from ttt_video_engine.replicas import store as store_module
from ttt_video_engine.replicas.mirror import Mirror
from ttt_video_engine.replicas.store import Store, is_uri, local_path
from ttt_video_engine.runtime.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]
PRODUCTS = ("latents.safetensors", "video.mp4")


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


class Sample:
    """`sample` with the stand-in, of 4 steps, on a machine that a test names."""

    def __init__(self, run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run, self._bundle, self._tmp_path, self._patch = run, bundle, tmp_path, monkeypatch
        self.uri = f"s3://{BUCKET}/{tmp_path.name}"
        self._patch.setattr(
            "ttt_video_engine.commands.replica.make_loader", lambda bundle, *_, **__: StandInLoader(bundle)
        )

    def __call__(
        self, *options: object, machine: str = "a", videos: int = 1, output: object = None
    ) -> tuple[int, str, str]:
        self._patch.setenv("XDG_CACHE_HOME", str(self._tmp_path / machine))
        board = [[{"text": f"Bear {number}."}] for number in range(videos)]
        file = storyboard_file(self._tmp_path / "bear.jsonl", *board)
        where = ("--bundle", self._bundle, "--output-dir", output or self.uri)
        return self._run("sample", file, *where, "--num-steps", 4, *options)

    def scratch(self, machine: str = "a") -> Path:
        return self._tmp_path / machine / "ttt-video/scratch/s3" / self.uri.removeprefix("s3://")

    def alone(self, videos: int = 1) -> dict[str, bytes]:
        """What a render to a local folder comes to."""
        assert self(machine="alone", videos=videos, output=self._tmp_path / "local")[0] == 0
        return products(self._tmp_path / "local" / ("bear" if videos == 1 else "bear-001"))


@pytest.fixture
def sample(run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    return Sample(run, shared_bundle, tmp_path, monkeypatch)


def held(s3: ObjectStore, sample: Sample, video: str = "bear") -> dict[str, bytes]:
    return s3.files(f"{sample.uri.removeprefix(f's3://{BUCKET}/')}/{video}")


def test_a_video_in_a_store_is_the_one_in_a_folder(s3: ObjectStore, sample: Sample) -> None:
    """With the same files, and nothing but what says that it is done stays in scratch."""
    code, out, _ = sample(videos=2)
    assert (code, out) == (0, f"video: {sample.uri}/bear-001/video.mp4\nvideo: {sample.uri}/bear-002/video.mp4\n")
    found = held(s3, sample, "bear-001")
    assert sorted(found) == DONE
    assert {name: found[name] for name in PRODUCTS} == sample.alone(videos=2)
    assert files_in(sample.scratch() / "bear-001") == ["run.json", "video.json"]
    for machine in ("a", "b"):
        code, out, err = sample(machine=machine, videos=2)
        assert (code, out) == (0, "") and holds(err, "2 of 2 done before")
    assert held(s3, sample, "bear-001") == found


def test_another_machine_goes_on_from_the_step_that_was_saved(
    s3: ObjectStore, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sample("--stop-after", 2)[0] == 0
    assert {"run.json", "state-0002.safetensors", "text.safetensors", "preview.png"} <= held(s3, sample).keys()
    real = Mirror.follow

    def follow(mirror: Mirror, event: Any) -> None:
        if getattr(event, "steps_done", 0) == 3:  # as a third machine leaves it that was stopped since
            s3.write(f"{sample.uri.removeprefix(f's3://{BUCKET}/')}/bear/state-0001.safetensors", b"")
        real(mirror, event)

    monkeypatch.setattr(Mirror, "follow", follow)
    code, _, err = sample(machine="b")
    assert code == 0 and holds(err, "resumes after step 2 of 4")
    found = held(s3, sample)
    assert sorted(found) == DONE
    assert {name: found[name] for name in PRODUCTS} == sample.alone()


class Killed(BaseException):
    """As SIGKILL ends a process: nothing is done after it."""


def test_a_machine_that_is_gone_at_any_call_of_the_store(
    s3: ObjectStore, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every other call that changes the store a machine dies, and another resumes from the newest state."""
    alone, calls = sample.alone(), 0
    real: dict[str, Callable[..., None]] = {"upload": Store.upload, "remove": Store.remove}
    killed_at = -1

    def counted(name: str) -> Callable[..., None]:
        def call(store: Store, *arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed
            real[name](store, *arguments)

        return call

    for name in real:
        monkeypatch.setattr(Store, name, counted(name))
    while True:
        killed_at, calls = killed_at + 2, 0
        sample.uri = f"s3://{BUCKET}/kills/{killed_at}"
        code, _, _ = sample(machine=f"first-{killed_at}")
        there = held(s3, sample)
        assert "video.json" not in there or there.keys() >= set(DONE)
        if code == 0:
            break
        done = max((int(name[6:10]) for name in there if name.startswith("state-")), default=0)
        calls = -1000  # it is not killed
        code, _, err = sample(machine=f"second-{killed_at}")
        assert code == 0 and (
            not done or "latents.safetensors" in there or holds(err, f"resumes after step {done} of 4")
        )
        found = held(s3, sample)
        assert sorted(found) == DONE, killed_at
        assert {name: found[name] for name in PRODUCTS} == alone
    assert killed_at > 15, "a call for every file, and one for every state that is removed"


def test_a_store_that_is_gone_for_long_ends_the_command_and_loses_nothing(
    s3: ObjectStore, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line says so, and the code is 1, as waiting may help. The step that did not arrive is in scratch."""
    real = Mirror.follow

    def follow(mirror: Mirror, event: Any) -> None:
        if getattr(event, "steps_done", 0) == 3:
            s3.stop()
        real(mirror, event)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "follow", follow)
        patch.setattr(store_module, "PATIENCE", 1.0)
        code, out, err = sample()
        assert (code, out) == (1, "")
        names(last_refusal(err), sample.uri)
        assert "state-0003.safetensors" in files_in(sample.scratch() / "bear")
        code, out, err = sample()
        assert (code, out) == (1, "") and holds(err, sample.uri)
    s3.start()
    assert "state-0003.safetensors" not in held(s3, sample)
    code, _, err = sample()
    assert code == 0 and holds(err, "resumes after step 3 of 4")
    found = held(s3, sample)
    assert {name: found[name] for name in PRODUCTS} == sample.alone()


def test_a_failure_is_noted_in_the_store_until_it_is_rendered_again(
    s3: ObjectStore, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: str, run: int, outputs: Arrays) -> Arrays:
        if run == 3:
            raise RuntimeError("out of something")
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(
            "ttt_video_engine.commands.replica.make_loader", lambda bundle, *_, **__: StandInLoader(bundle, fail)
        )
        assert sample()[0] == 1
    found = held(s3, sample)
    assert json.loads(found["error.json"])["error"] == "RuntimeError" and "state-0002.safetensors" in found
    code, _, err = sample(machine="b")
    assert code == 0 and holds(err, "resumes after step 2 of 4")
    assert sorted(held(s3, sample)) == DONE


def test_other_settings_are_refused_and_overwrite_makes_it_anew(s3: ObjectStore, sample: Sample) -> None:
    assert sample()[0] == 0
    first = held(s3, sample)
    names(refusal(sample("--seed", 7, machine="b")), "settings.seed", 42, 7)
    assert held(s3, sample) == first
    assert sample("--seed", 7, "--overwrite", machine="b")[0] == 0
    second = held(s3, sample)
    assert sorted(second) == DONE and second["video.mp4"] != first["video.mp4"]
    code, _, err = sample("--seed", 7)
    assert code == 0 and holds(err, "1 of 1 done before"), "scratch of the first seed is not believed"


def test_a_prefix_that_was_removed_is_rendered_again(s3: ObjectStore, sample: Sample) -> None:
    assert sample("--stop-after", 2)[0] == 0
    s3.remove(sample.uri.removeprefix(f"s3://{BUCKET}/"))
    code, _, err = sample()
    assert code == 0 and "resumes" not in err
    assert sorted(held(s3, sample)) == DONE


def test_what_the_store_refuses_is_wrong_input(
    s3: ObjectStore, sample: Sample, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names(refusal(sample(output="s3://no-such-bucket/a")), "s3://no-such-bucket/a")
    names(refusal(sample(output="gopher://a/b")), "gopher")
    names(refusal(sample(output="s3://")), "s3:")
    names(refusal(sample(output=f"s3://{BUCKET}/../a")), "..")
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HOME", str(tmp_path))
        names(refusal(sample()), sample.uri, "credentials")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    names(refusal(sample(output="gs://a/b")), "pip install 'ttt-video-engine[gs]'")


def test_a_bundle_is_fetched_once_a_machine_and_checked(
    s3: ObjectStore, run: Run, shared_bundle: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [path for path in shared_bundle.rglob("*") if path.is_file()]
    for path in files:
        s3.write(f"bundle/{path.relative_to(shared_bundle).as_posix()}", path.read_bytes())
    weights = "transformer/model.onnx_data"
    s3.write(f"bundle/{weights}", bytes((shared_bundle / weights).stat().st_size))
    sample._bundle = f"s3://{BUCKET}/bundle"  # type: ignore[assignment]  # a URI
    names(refusal(sample()), sample._bundle, weights)
    s3.write(f"bundle/{weights}", (shared_bundle / weights).read_bytes()[:-1])
    names(refusal(sample()), weights, (shared_bundle / weights).stat().st_size)
    s3.write(f"bundle/{weights}", (shared_bundle / weights).read_bytes())

    fetched: list[str] = []
    real = Store.download

    def download(store: Store, name: str, path: Path, size: int) -> None:
        fetched.append(name)
        real(store, name, path, size)

    monkeypatch.setattr(Store, "download", download)
    assert sample()[0] == 0
    assert weights in fetched and len(fetched) < len(files) - 1, "the files that had arrived whole are kept"
    fetched.clear()
    assert sample("--overwrite")[0] == 0
    assert fetched == []
    local = held(s3, sample)["video.mp4"]
    sample._bundle = shared_bundle
    assert local == sample.alone()["video.mp4"]


def test_a_file_uri_is_a_path(sample: Sample, tmp_path: Path) -> None:
    assert local_path("file:///a%20b/c") == Path("/a b/c") and local_path("a/b") == Path("a/b")
    assert [is_uri(place) for place in ("file:///a", "s3://a", "a/b")] == [False, True, False]
    with pytest.raises(ConfigError):
        local_path("file://elsewhere/a")
    code, out, _ = sample(output=f"file://{tmp_path}/there")
    assert (code, out) == (0, f"video: {tmp_path}/there/bear/video.mp4\n")
    assert files_in(tmp_path / "there/bear") == DONE
