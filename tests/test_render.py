"""Videos of a tiny bundle, from the command line to the mp4: what is made, what repeats, what a failure leaves."""

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from weakref import ref

import av
import numpy as np
import pytest
from messages import TRACE, WARNING, names, scene
from numpy.typing import NDArray
from stand_in import DONE

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, OnnxRuntimeRunner
from ttt_video_engine.runtime.bundle import TOKENIZER, open_bundle
from ttt_video_engine.runtime.events import VideoDone
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.stages import denoise, encode_prompts
from ttt_video_engine.runtime.storyboard import load_storyboards
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.tokenizer import SceneTokenizer

ROOT = Path(__file__).parents[1]
BEAR, MOUSE = ([{"text": text, "neg_text": "Dark."}] for text in ("A bear bakes bread.", "A mouse in a red scarf."))

Run = Callable[..., tuple[int, str, str]]


def storyboard(path: Path, *videos: object) -> Path:
    path.write_text("\n".join(json.dumps(video) for video in videos))
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_video_of_nine_seconds(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    """One scene is longer than fits, and no setting has its default, so that all of them are seen to arrive."""
    long = "The bear stirs the soup and looks out of the round window. " * 30
    scenes: list[dict[str, Any]] = [
        {"text": "A bear."},
        {"text": long, "requires_scene_transition": True},
        {"text": "A bear eats soup."},
    ]
    board = storyboard(tmp_path / "bear.json", scenes)
    options = "--num-steps 2 --sampler dpmpp-2m-sde --guidance constant --guidance-scale 3 --fps 24 --seed 7"
    out = tmp_path / "out"
    code, stdout, err = run(
        *("sample", board, "--bundle", shared_bundle, "--output-dir", out, "--low-memory", "--length", "9s"),
        *options.split(),
    )
    video = out / "bear/video.mp4"
    assert (code, stdout) == (0, f"video: {video}\n")
    (warning,) = [line for line in err.splitlines() if line.startswith(WARNING)]
    names(warning, "bear.json", scene(2), "text", 152)
    assert files_in(out) == [f"bear/{name}" for name in DONE]

    with av.open(video) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (96, 64, Fraction(24))
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 145
    assert len({frame.tobytes() for frame in frames}) > 100, "a still or a flat colour is no video"

    sidecar = json.loads((out / "bear/video.json").read_bytes())
    assert sidecar["sha256"] == sha256_of(video)
    assert sidecar["bundle"]["sha256"] == sha256_of(shared_bundle / "bundle.json")
    assert (sidecar["num_frames"], sidecar["width"], sidecar["height"], sidecar["length"]) == (145, 96, 64, "9s")
    assert sidecar["settings"] == {
        "num_steps": 2,
        "guidance_scale": 3.0,
        "guidance": "constant",
        "sampler": "dpmpp-2m-sde",
        "fps": 24.0,
        "codec": "h264",
        "crf": 18,
        "seed": 7,
        "low_memory": True,
        "guidance_interval": None,
        "step_cache": None,
    }
    assert [scene["text"] for scene in sidecar["storyboard"]["scenes"]] == [scene["text"] for scene in scenes]
    (truncation,) = sidecar["truncations"]
    names(truncation, scene(2), "text", 152)
    assert warning.endswith(truncation)


def test_one_component_is_in_memory_at_a_time(shared_bundle: Path, tmp_path: Path) -> None:
    """Each is freed before the next is loaded, the session of ONNX Runtime with it."""
    bundle, sessions, loaded = open_bundle(shared_bundle), list[ref[object]](), list[str]()
    real = OnnxRuntimeLoader(bundle)

    class Watched:
        environment = real.environment
        check = real.check

        def __call__(self, graph: str) -> OnnxRuntimeRunner:
            gc.collect()
            assert not [session for session in sessions if session() is not None], f"before {graph}: {loaded}"
            engine = real(graph)
            sessions.append(ref(engine._session))
            loaded.append(graph)
            return engine

    settings = Settings(num_steps=1)
    boards = load_storyboards(storyboard(tmp_path / "bear.json", BEAR))
    cache = TextCache(tmp_path / "text", "none")
    outcomes = Pipeline(bundle, Watched(), cache=cache).render(boards, settings, tmp_path)
    assert isinstance(outcomes["bear"], VideoDone)
    assert loaded == ["text_encoder", "transformer-3s", "vae_decoder-first", "vae_decoder-next"]


def test_a_video_depends_on_its_scenes_and_the_settings_alone(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    """A batch of two, the second of them alone, then with another seed in its place."""
    out = tmp_path / "out"
    both, mouse = storyboard(tmp_path / "both.jsonl", BEAR, MOUSE), storyboard(tmp_path / "mouse.json", MOUSE)
    common = ("--bundle", shared_bundle, "--output-dir", out, "--num-steps", 1)
    code, stdout, err = run("sample", both, *common)
    first, second, alone = (out / f"{name}/video.mp4" for name in ("both-001", "both-002", "mouse"))
    assert (code, stdout) == (0, f"video: {first}\nvideo: {second}\n"), err
    assert run("sample", mouse, *common)[0] == 0
    assert sha256_of(alone) == sha256_of(second) != sha256_of(first)
    with av.open(alone) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (49, Fraction(16))

    assert run("sample", mouse, *common, "--seed", 43, "--overwrite")[0] == 0
    assert sha256_of(alone) != sha256_of(second)
    sidecar = json.loads(alone.with_suffix(".json").read_bytes())
    assert sidecar["sha256"] == sha256_of(alone) and sidecar["settings"]["seed"] == 43


@pytest.fixture(scope="module")
def latents(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NDArray[np.float32]]:
    """The latents that settings lead to, before they are decoded."""
    (board,) = load_storyboards(storyboard(tmp_path_factory.mktemp("latents") / "bear.json", BEAR))
    bundle = open_bundle(shared_bundle)
    load = OnnxRuntimeLoader(bundle)
    prompts = SceneTokenizer.from_file(bundle.path(TOKENIZER)).encode(board, bundle.manifest.model.text_lengths["3s"])
    text = encode_prompts(load, prompts, TextCache(None, ""))

    def run(**options: object) -> NDArray[np.float32]:
        settings = Settings(**{"num_steps": 2, **options})  # type: ignore[arg-type]
        *_, last = denoise(bundle, load, "3s", text, settings)
        x = last.step.latents
        assert x.shape == (1, 13, 16, 8, 12) and np.isfinite(x).all()
        return x

    return run


def test_low_memory_is_the_same_up_to_rounding(latents: Callable[..., NDArray[np.float32]]) -> None:
    usual, frugal = latents(), latents(low_memory=True)
    assert np.abs(usual - frugal).max() < 1e-4 * np.abs(usual).max()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m-sde"])
def test_a_sampler_repeats_itself(latents: Callable[..., NDArray[np.float32]], sampler: str) -> None:
    once = latents(sampler=sampler)
    np.testing.assert_array_equal(latents(sampler=sampler), once)
    assert np.abs(latents(sampler=sampler, seed=43) - once).max() > 0.1


def test_samplers_and_guidance_make_a_difference(latents: Callable[..., NDArray[np.float32]]) -> None:
    usual = latents()
    assert np.abs(latents(sampler="dpmpp-2m-sde") - usual).max() > 0.1
    for other in ({"guidance": "constant"}, {"guidance": "upstream"}, {"guidance_scale": 1.5}):
        assert np.abs(latents(**other) - usual).max() > 1e-4


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interruption_leaves_what_the_next_run_needs(shared_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of decoding."""
    board = storyboard(tmp_path / "bear.json", BEAR * 3)
    command = [sys.executable, "cli.py", "sample", board, "--bundle", shared_bundle, "--output-dir", tmp_path / "out"]
    with subprocess.Popen(
        [*map(str, command), "--num-steps", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with interruptions ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("decode: 3/"):
                assert sum(path.name.count(".partial") for path in (tmp_path / "out/bear").iterdir()) == 1
                process.send_signal(signal.SIGINT)
                break
        stdout, rest = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), "".join(seen) + rest
    assert TRACE not in rest and files_in(tmp_path / "out") == [
        f"bear/{name}" for name in ("history.json", "latents.safetensors", "prompt.txt", "run.json")
    ]
