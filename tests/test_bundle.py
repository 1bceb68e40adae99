"""Whether a bundle is the one that was exported: told at once where times say so, by its digests where they do not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from messages import refused_with

from ttt_video_engine.runtime import bundle as bundles
from ttt_video_engine.runtime.bundle import MANIFEST, open_bundle
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.files import sha256_of

WEIGHTS = "transformer/model.onnx_data"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose digests were taken."""
    names: list[str] = []
    real = sha256_of

    def noted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(bundles, "sha256_of", noted)
    return names


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_not_touched_is_not_read(bundle: Path, read: list[str]) -> None:
    opened = open_bundle(bundle)
    opened.check()
    assert read == []
    opened.verify()
    assert len(read) == len(opened.manifest.files)


def test_a_copy_is_read_once(bundle: Path, tmp_path: Path, read: list[str]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy", copy_function=shutil.copyfile))
    newer = (copy / MANIFEST).stat().st_mtime_ns + 10**9
    os.utime(copy / WEIGHTS, ns=(newer, newer))
    open_bundle(copy).check()
    assert "model.onnx_data" in read
    read.clear()
    open_bundle(copy).check()
    assert read == []


def test_a_change_is_found_by_its_time(bundle: Path, read: list[str]) -> None:
    change(bundle / WEIGHTS)
    with refused_with(BundleError, bundle, WEIGHTS, "export"):
        open_bundle(bundle).check()
    assert read == ["model.onnx_data"]


def test_a_change_that_hides_its_time_is_found_by_verifying(bundle: Path) -> None:
    times = (bundle / WEIGHTS).stat()
    change(bundle / WEIGHTS)
    os.utime(bundle / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = open_bundle(bundle)
    opened.check()
    with refused_with(BundleError, bundle, WEIGHTS, "export"):
        opened.verify()


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_what_is_cut_or_missing_is_refused_unread(bundle: Path, read: list[str], damage: str) -> None:
    if damage == "cut":
        os.truncate(bundle / WEIGHTS, 100)
    else:
        (bundle / WEIGHTS).unlink()
    with refused_with(BundleError, bundle, WEIGHTS, "export"):
        open_bundle(bundle).check()
    assert read == []


def test_without_a_cache_a_copy_is_read_every_time(
    bundle: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = (bundle / MANIFEST).stat().st_mtime_ns + 10**9
    os.utime(bundle / WEIGHTS, ns=(newer, newer))
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle / MANIFEST))  # no folder, so that none can be made in it
    for _ in range(2):
        open_bundle(bundle).check()
    assert read == ["model.onnx_data"] * 2


def test_a_bundle_of_format_version_1_still_opens(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    del manifest["weight_keys"]
    for graph in manifest["graphs"].values():
        for check in graph["parity"]:
            del check["part"]
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "format_version": 1}))
    opened = open_bundle(bundle)
    opened.check()
    assert opened.manifest.weight_keys == {}
