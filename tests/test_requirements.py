"""The bounds of the requirements can be met."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent

# What `pip index versions NAME` printed on 2026-11-26 for Python 3.11 on Linux, from 1.27 on: a record of that day and
# of pip's index, without the versions that were published later.
PUBLISHED = {
    "onnxruntime": ("1.32.0", "1.31.1", "1.31.0", "1.30.0", "1.29.0", "1.28.0", "1.27.0"),
    "onnxruntime-gpu": ("1.31.1", "1.31.0", "1.30.0", "1.29.0", "1.28.0", "1.27.0"),
}


def both(bounds: SpecifierSet) -> set[str]:
    """The versions within these bounds that both packages have."""
    found = [set(bounds.filter(versions)) for versions in PUBLISHED.values()]
    return set.intersection(*found)


def test_onnxruntime_gpu_can_take_the_place_of_onnxruntime() -> None:
    """It has the same module, and is installed in place of the other on a machine with an NVIDIA GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {found.name: found for found in map(Requirement, project["dependencies"])}
    assert both(requirements["onnxruntime"].specifier) == {"1.31.0", "1.31.1"}


@pytest.mark.parametrize("bounds", [">=1.32,<2", ">=1.28,<1.27", "==1.32.0"])
def test_bounds_that_only_one_of_them_meets(bounds: str) -> None:
    assert both(SpecifierSet(bounds)) == set()
