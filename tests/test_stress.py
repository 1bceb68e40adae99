"""Real processes that are killed, as `make stress` does it, a few times."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stress import Plan, stress

Record = Callable[[str, object], None]
KILLS = 5


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_render_that_is_killed_comes_to_the_same_bytes(
    shared_bundle: Path, tmp_path: Path, record_property: Record
) -> None:
    tally = stress(shared_bundle, tmp_path, Plan(KILLS, samplers=("dpmpp-2m-sde",), decodes=False))
    assert (tally.errors, tally.lost, tally.kills.total()) == ([], 0, KILLS)
    record_property("kills", KILLS)
