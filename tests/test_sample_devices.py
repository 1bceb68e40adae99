"""A bundle for several devices, and a video that is rendered over them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.step_state import LATENTS


@pytest.fixture(scope="module")
def exported(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("devices") / "bundle"))


def test_a_bundle_gets_graphs_for_devices_beside_its_own(
    exported: Path, shared_bundle: Path, run: Run, tmp_path: Path
) -> None:
    code, _, errors = run("export", "--output", exported, "--length", "3s", "--devices", 2)
    assert code == 0, errors
    before, after = open_bundle(shared_bundle).manifest, open_bundle(exported).manifest
    assert (before.devices, after.devices) == ((), (2,))
    assert after.graphs.items() > before.graphs.items()
    assert after.graphs.keys() - before.graphs.keys() == {"transformer-3s-2devices", "transformer-9s-2devices"}
    for name in ("transformer-3s", "transformer-9s"):
        new = after.graphs[f"{name}-2devices"]
        assert new.weights == after.graphs[name].weights
        assert all(0 < check.max_error < 1e-4 for check in new.parity)
    code, _, _ = run("export", "--output", exported, "--length", "3s")
    assert code == 0 and open_bundle(exported).manifest == after

    def rendered(folder: str, *options: object) -> NDArray[np.float32]:
        options = ("--bundle", exported, "--output-dir", tmp_path / folder, "--num-steps", 3, *options)
        code, _, errors = run("sample", "--prompt", "A bear sleeps.", *options)
        assert code == 0, errors
        (found,) = (tmp_path / folder).glob(f"*/{LATENTS}")
        return load_file(found)["latents"].astype(np.float32)

    alone, together = rendered("alone"), rendered("together", "--devices", 2)
    assert 0 < np.abs(together - alone).max() < 1e-4 * np.abs(alone).max()
    # A render is resumed with another number of devices.
    options = ("--bundle", exported, "--output-dir", tmp_path / "resumed", "--num-steps", 3, "--stop-after", 1)
    assert run("sample", "--prompt", "A bear sleeps.", *options, "--devices", 2)[0] == 0
    resumed = rendered("resumed")
    assert np.abs(resumed - alone).max() < 1e-4 * np.abs(alone).max()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--devices", 4), "--devices 4"),
        (("--devices", 2, "--guidance-parallel"), "--guidance-parallel"),
        (("--devices", 2, "--engine", "tensorrt"), "--engine"),
        (("--devices", 2, "--provider", "cuda"), "--provider"),
    ],
)
def test_what_cannot_run_over_devices_is_refused(
    options: tuple[object, ...], said: str, shared_bundle: Path, run: Run, tmp_path: Path
) -> None:
    place = ("--bundle", shared_bundle, "--output-dir", tmp_path / "out")
    code, _, errors = run("sample", "--prompt", "A bear sleeps.", *place, *options)
    assert code == 2 and errors.count("\n") == 1 and said in errors
    assert not (tmp_path / "out").exists()


def test_devices_must_divide_the_heads(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("export", "--output", tmp_path / "bundle", "--length", "3s", "--devices", 3)
    assert code == 2 and errors.count("\n") == 1
    assert all(word in errors for word in ("--devices is 3", "4 heads"))
    assert not (tmp_path / "bundle").exists()
