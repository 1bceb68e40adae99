"""Keys cover the code that decides what a file holds: no less, and no more."""

import ast
import shutil
from pathlib import Path

import pytest

from ttt_video_engine.export import keys
from ttt_video_engine.export.code import ENGINES, GRAPHS, PACKAGE, WEIGHTS, Artefact
from ttt_video_engine.export.keys import engine_environment, graph_key, weights_key
from ttt_video_engine.runtime.presets import tiny

ARTEFACTS = {"weights": WEIGHTS, "graphs": GRAPHS, "engines": ENGINES}
NAME = PACKAGE.name


@pytest.fixture(params=ARTEFACTS)
def artefact(request: pytest.FixtureRequest) -> Artefact:
    return ARTEFACTS[request.param]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code of the package, to change at will."""
    for name in ("engines", "export", "planning", "reference", "runtime"):
        shutil.copytree(PACKAGE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def module_file(name: str) -> str | None:
    """`ttt_video_engine.a.b` as the name of its file in the package; None for what is no module of it."""
    path = "/".join(name.split(".")[1:])
    return f"{path}.py" if path and (PACKAGE / f"{path}.py").is_file() else None


def imported(file: str) -> set[str]:
    """Modules of ours that a module imports, in functions too, but not for types alone."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names if alias.name.startswith(NAME)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            found |= {
                module_file(f"{node.module}.{alias.name}") or module_file(node.module or "") for alias in node.names
            }
    return {file for file in found if file is not None}


def closure(files: tuple[str, ...]) -> set[str]:
    """What is imported by way of these modules; the imports of those that decide nothing count too."""
    seen, left = set(files), list(files)
    while left:
        new = imported(left.pop()) - seen
        seen |= new
        left += new
    return seen


def sources(artefact: Artefact) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in artefact.files()}


def test_every_module_that_is_imported_decides_or_says_why_not(artefact: Artefact) -> None:
    reached, listed = closure(artefact.entry_points), sources(artefact)
    assert reached - listed - artefact.excluded.keys() == set(), "list them in export/code.py"
    assert listed & artefact.excluded.keys() == set()
    assert all(artefact.excluded.values()) and set(artefact.entry_points) <= listed
    assert all((PACKAGE / name).is_file() for name in artefact.excluded), "no longer there"
    assert all(any(PACKAGE.glob(pattern)) for pattern in artefact.sources), "match nothing"


def test_nothing_is_excluded_that_is_not_imported() -> None:
    reached = {name for artefact in ARTEFACTS.values() for name in closure(artefact.entry_points)}
    assert {name for artefact in ARTEFACTS.values() for name in artefact.excluded} <= reached


def test_code_that_decides_changes_the_digest(artefact: Artefact, copy: Path) -> None:
    before = artefact.digest(copy)
    assert before == artefact.digest()
    for path in artefact.files(copy):
        content = path.read_text("utf-8")
        path.write_text(f"{content}\nADDED = 1\n")
        assert artefact.digest(copy) != before, path
        path.write_text(content)
    (copy / "reference" / "new_part.py").write_text("ADDED = 1\n")
    assert (artefact.digest(copy) != before) == (artefact is GRAPHS)


def test_words_change_nothing(artefact: Artefact, copy: Path) -> None:
    before = artefact.digest(copy)
    for path in artefact.files(copy):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Expr(ast.Constant("Said otherwise."))
        path.write_text(f"# A comment.\n{ast.unparse(ast.fix_missing_locations(tree))}\n")  # and no comments at all
    assert artefact.digest(copy) == before


@pytest.mark.parametrize(
    ("file", "decides"),
    [
        ("runtime/dtypes.py", {"weights", "graphs", "engines"}),  # has the alignment of weights
        ("export/graphs/weights.py", {"weights", "graphs"}),
        ("reference/ttt.py", {"graphs"}),
        ("engines/kernels/tiles.py", {"engines"}),
        ("export/parity/recordings.py", set()),
        ("export/parity/gate.py", set()),
        ("export/build.py", set()),
        ("runtime/video.py", set()),
    ],
)
def test_a_file_decides_what_it_should(copy: Path, file: str, decides: set[str]) -> None:
    before = {name: artefact.digest(copy) for name, artefact in ARTEFACTS.items()}
    path = copy / file
    path.write_text(path.read_text("utf-8") + "\nADDED = 1\n")
    assert {name for name, artefact in ARTEFACTS.items() if artefact.digest(copy) != before[name]} == decides


@pytest.mark.parametrize(
    ("tool", "decides"),
    [
        ("torch", {"weights", "graphs"}),
        ("safetensors", {"weights"}),
        ("transformers", {"weights", "graphs"}),
        ("onnx-ir", {"graphs"}),
        ("onnxscript", {"graphs"}),
        ("onnxruntime", set()),
        ("triton", {"engines"}),
    ],
)
def test_a_tool_decides_what_it_should(monkeypatch: pytest.MonkeyPatch, tool: str, decides: set[str]) -> None:
    def all_keys() -> dict[str, dict[str, str]]:
        keys._code_and_tools.cache_clear()
        model = tiny("linear")
        return {
            "weights": weights_key(model, origin="seed 0", dtype="float32"),
            "graphs": graph_key(model, weights="0", dtype="float32", opset=20),
            "engines": engine_environment(),
        }

    before, real = all_keys(), keys.package_version
    with monkeypatch.context() as patch:
        patch.setattr(keys, "package_version", lambda name: "0" if name == tool else real(name))
        after = all_keys()
    keys._code_and_tools.cache_clear()
    assert {name for name in before if before[name] != after[name]} == decides
