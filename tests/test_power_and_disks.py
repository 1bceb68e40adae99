"""Power cuts and failing disks, as `make powercut` and `make diskfaults` try them, in a smaller number."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_states import PowerCuts
from disk_faults import FAULTS, Faults, commands
from power_cuts import SCENARIOS, Resumer, Scenario, check_claims, failures, record, states_of
from recorded_disk import ROOT, Call, reason_not_to_mount
from render_processes import Processes, processes

RESUMED, FAILED = 12, 12
"""Folders that are resumed of each scenario, and calls that fail."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with processes(tmp_path_factory.mktemp("processes")) as running:
        yield running


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    if reason := reason_not_to_mount(tmp_path / "disk"):
        pytest.skip(reason)
    return tmp_path


@pytest.mark.parametrize("scenario", SCENARIOS[1:], ids=lambda scenario: scenario.name)
def test_a_render_resumes_from_what_a_power_cut_leaves(
    shared_bundle: Path, scratch: Path, run: Processes, scenario: Scenario, record_property: Record
) -> None:
    """What every folder claims is true; some of them are resumed, those without a sidecar as well as those with one."""
    recording = record(scenario, shared_bundle, scratch, run)
    points, states = states_of(recording)
    assert points > 1000 and not failures(states, check_claims)
    resumer = Resumer(recording, shared_bundle, scratch)
    resumer.check_recording()
    assert not failures(states[:: len(states) // RESUMED], resumer.check)
    record_property("crash points", points)


def test_a_call_that_fails_is_no_success_and_loses_nothing(
    shared_bundle: Path, scratch: Path, run: Processes, record_property: Record
) -> None:
    faults = Faults(commands(shared_bundle, scratch)[0], run, scratch)
    calls = range(0, faults.calls, max(1, faults.calls // FAILED))
    results = [faults.check(at, list(FAULTS)[number % len(FAULTS)]) for number, at in enumerate(calls)]
    assert results.count("ended with an error") > FAILED // 2
    record_property("calls failed in turn", len(results))


FILE = 2
CREATED = Call("create", ROOT, "a.partial", FILE)
RENAMED = Call("rename", ROOT, "a", FILE, "a.partial")
WRITES = [Call("write", FILE, data=b"one"), Call("write", FILE, data=b"two", offset=3)]
SYNCED, NAMED = Call("fsync", FILE), Call("fsyncdir", ROOT)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([CREATED, NAMED, *WRITES, SYNCED], {b"onetwo"}),
        ([CREATED, NAMED, WRITES[0], SYNCED, WRITES[1]], {b"one", b"onetwo", b"onet", b"one\0\0\0"}),
        ([CREATED, NAMED, *WRITES], {b"", b"one", b"onetwo", b"\0\0\0two", b"o\0\0two", b"onet", b"one\0\0\0", b"o",
                                     b"\0\0\0", b"\0\0\0t", b"\0" * 6}),
        ([CREATED, NAMED, *WRITES, SYNCED, Call("truncate", FILE)], {b"", b"onetwo"}),
    ],
)  # fmt: skip
def test_of_contents_any_part_that_is_not_synced_may_be_lost(calls: list[Call], expected: set[bytes]) -> None:
    assert {crash.tree["a.partial"] for crash in PowerCuts(calls).states() if crash.done == len(calls)} == expected


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([CREATED, SYNCED], {(), ("a.partial",)}),
        ([CREATED, NAMED, RENAMED], {("a.partial",), ("a",)}),
        ([CREATED, SYNCED, RENAMED], {(), ("a.partial",), ("a",)}),
        ([CREATED, RENAMED, NAMED], {("a",)}),
        ([CREATED, NAMED, Call("unlink", ROOT, "a.partial", FILE)], {(), ("a.partial",)}),
        ([Call("mkdir", ROOT, "b", 3), Call("create", 3, "a", FILE), Call("fsyncdir", 3)], {(), ("b", "b/a")}),
        ([CREATED, NAMED, RENAMED, Call("create", ROOT, "b", 3)],
         {("a.partial",), ("a",), ("a.partial", "b"), ("a", "b")}),
    ],
)  # fmt: skip
def test_of_names_any_change_that_is_not_synced_may_be_lost(calls: list[Call], expected: set[tuple[str, ...]]) -> None:
    found = {tuple(sorted(crash.tree)) for crash in PowerCuts(calls).states() if crash.done == len(calls)}
    assert found == expected
