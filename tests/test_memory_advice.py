"""What is advised where an engine does not fit the GPU, and how much RAM is free."""

from pathlib import Path

import pytest

from ttt_video_engine.engines.tensorrt.memory import MemoryNeeds, weight_budget
from ttt_video_engine.planning.fit import available_ram
from ttt_video_engine.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("streamable", "low_memory", "cures"),
    [
        (None, False, {"--weight-streaming", "--low-memory"}),
        (None, True, {"--weight-streaming"}),
        (0, False, {"--low-memory"}),  # built with streaming, and nothing left to stream
        (0, True, {"larger GPU"}),
        (6, True, {"larger GPU"}),
    ],
)
def test_streaming_is_advised_only_where_it_is_off(streamable: int | None, low_memory: bool, cures: set[str]) -> None:
    with pytest.raises(BackendError) as raised:
        weight_budget("g", MemoryNeeds(10, 5, streamable), 3, low_memory=low_memory)
    said = str(raised.value)
    assert {cure for cure in ("--weight-streaming", "--low-memory", "larger GPU") if cure in said} == cures


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="compares with what Linux says")
def test_free_ram_is_what_the_system_says() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (expected,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    assert available_ram() == pytest.approx(expected, rel=0.2)
