"""What all tests share: one bundle, the command line in this process, and `gpu` tests that run only where a GPU is."""

import ctypes
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from ttt_video_engine.cli import main
from ttt_video_engine.runtime.files import sha256_of

LONGEST_EXPORT = 600
"""Seconds that a worker waits for the one that exports the bundle."""

LONG_FILES = ("test_tensorrt.py", "test_sharded.py", "test_attention_op.py", "test_chunk_kernels.py")
"""Begun early: a worker that is left with one of them at the end works alone for minutes."""

# The same examples in every run; `make fuzz` explores others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

Run = Callable[..., tuple[int, str, str]]
History = tuple[dict[str, str], list[list[str]]]


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep from run to run is kept apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, exported for 3s, then for 9s as well. To change it, take `bundle`.

    Exported once a run: the worker that makes the lock folder builds, the others wait for `history.json`.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    bundle, history, failure = folder / "shared-bundle", folder / "history.json", folder / "failure.txt"
    try:
        (folder / "export.lock").mkdir()
    except FileExistsError:
        _wait(history, failure)
    else:
        try:
            content = _export(bundle)
        except BaseException as error:
            failure.write_text(repr(error))
            raise
        (folder / "history.partial").write_text(json.dumps(content))
        os.replace(folder / "history.partial", history)
    return bundle


@pytest.fixture(scope="session")
def export_history(shared_bundle: Path) -> History:
    """The digests of the shared bundle's files after its first export, and the lines that each of its two said."""
    content = json.loads((shared_bundle.parent / "history.json").read_text())
    return content["first"], content["reports"]


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the shared bundle, to change at will."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, which saves the imports: (exit code, standard output, standard error)."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ttt-video", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """Takes a folder and gives the sha256 of each of its files, by name."""
    return _digests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver that finds a GPU"))
    _first_export_then_the_rest(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests counted with `record_property`, such as how many crash points were tried."""
    for report in terminalreporter.getreports("passed"):
        for what, count in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {count} {what}")


def _first_export_then_the_rest(items: list[pytest.Item]) -> None:
    """One worker exports the bundle while the others run the tests that do without it, those of long files first."""
    needing = [item for item in items if "shared_bundle" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in needing]
    others.sort(key=lambda item: item.path.name not in LONG_FILES)
    items[:] = [*needing[:1], *others, *needing[1:]]


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _export(bundle: Path) -> dict[str, object]:
    # Here, as torch takes seconds that tests without a bundle need not wait for.
    from ttt_video_engine.export.build import export_bundle
    from ttt_video_engine.export.sources.source import SeededSource
    from ttt_video_engine.runtime.presets import tiny

    source = SeededSource(tiny("linear"), seed=0)
    reports: list[list[str]] = [[], []]
    export_bundle(source, bundle, ["3s"], "float32", reports[0].append)
    first = _digests(bundle)
    export_bundle(source, bundle, ["9s"], "float32", reports[1].append)
    return {"first": first, "reports": reports}


def _wait(history: Path, failure: Path) -> None:
    deadline = time.monotonic() + LONGEST_EXPORT
    while not history.exists():
        if failure.exists():
            pytest.fail(f"the bundle could not be exported: {failure.read_text()}")
        if time.monotonic() > deadline:
            pytest.fail(f"the bundle was not there after {LONGEST_EXPORT} seconds")
        time.sleep(0.2)


def _has_gpu() -> bool:
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False
