"""The layout of the package: links, import layers, a runtime without torch, a complete wheel."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ttt_video_engine"
FOLDERS = ("commands", "engines", "export", "planning", "reference", "replicas", "runtime")
SOURCES = [ROOT / "cli.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
ALL_PYTHON = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]

# Imports all modules of the folders named on the command line, but for the one engine that imports torch. Then prints
# the forbidden modules that are loaded.
IMPORT_ALL = """
import importlib, pkgutil, sys
for folder in sys.argv[1:]:
    package = importlib.import_module("ttt_video_engine." + folder)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith("ttt_video_engine.engines.torch"):
            importlib.import_module(module.name)
print(*sorted({"onnx", "onnxscript", "torch", "transformers"} & set(sys.modules)))
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["cli.py", *FOLDERS])
def test_the_package_links_to_the_folders_at_the_root(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink(), f"{link} is a copy: on Windows, clone with `git config core.symlinks true`"
    assert link.readlink() == Path("..", name)
    assert link.resolve(strict=True) == ROOT / name


def test_imports_only_go_down() -> None:
    run(Path(sys.executable).with_name("lint-imports"), "--no-cache")


@pytest.mark.parametrize("folder", ["engines", "planning", "replicas", "runtime"])
def test_making_a_video_imports_no_torch(folder: str) -> None:
    assert run(sys.executable, "-c", IMPORT_ALL, folder).split() == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints(path: Path) -> None:
    names = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)]
    lines = [name.lineno for name in names if name.id == "print"]
    assert path.name == "cli.py" or path.parent.name == "commands" or not lines, f"{path}: print in lines {lines}"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_the_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    # From a copy: the build folder of an earlier build would bring deleted modules back.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "cli.py", *FOLDERS, PACKAGE.name):
        run("cp", "-a", ROOT / name, source)
    demo = ("bundle.json", "transformer/model-3s.onnx", "transformer/model.onnx_data")
    bundle = source / "ttt_video_engine/demo_bundle"
    shutil.rmtree(bundle, ignore_errors=True)  # of `make wheel` in this folder
    for name in demo:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", tmp_path, source)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"ttt_video_engine/{path.relative_to(ROOT)}" for path in SOURCES}
    expected |= {f"ttt_video_engine/{name}" for name in ("__init__.py", "py.typed", "export/sources/prose.txt")}
    expected |= {f"ttt_video_engine/demo_bundle/{name}" for name in demo}
    assert packed == expected
