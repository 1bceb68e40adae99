"""`make gpu`: a report in every case, and a step that fails, hangs or lacks something stops no other."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "first_contact.py"


@pytest.fixture(scope="module")
def contact() -> Any:
    spec = importlib.util.spec_from_file_location("first_contact", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_contact"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def step(contact: Any, code: str, **fields: Any) -> Any:
    return contact.Step(**{"name": "a step", "command": (sys.executable, "-c", code), "seconds": 9, **fields})


def test_without_a_gpu_the_report_says_so(contact: Any, tmp_path: Path) -> None:
    if not contact.find_device()[1]:
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, SCRIPT, "--output", tmp_path / "report"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["no_gpu"]
    assert [found["name"] for found in report["steps"]] == [step.name for step in contact.steps(None)]
    assert all((found["status"], found["reason"]) == ("skipped", report["no_gpu"]) for found in report["steps"])
    assert report["no_gpu"] in (tmp_path / "report/report.md").read_text()


def test_a_step_that_hangs_is_killed_with_its_children_and_what_it_found_is_kept(contact: Any, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    code = (
        "import os, subprocess, sys, time\n"
        "open(os.environ['CONTACT_ROWS'], 'a').write('{\"kernel\": 1}\\n')\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)"
    )
    outcome = contact.run(step(contact, code), 0.8)
    assert (outcome.status, outcome.rows) == ("failed", [{"kernel": 1}])
    assert outcome.reason and outcome.seconds < 9
    time.sleep(1.5)
    assert not alive.exists()


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("print('fine')", "passed", ""),
        ("import sys; print('began'); sys.exit('no such kernel')", "failed", "no such kernel"),
        ("import os; os.abort()", "failed", "exit code -6"),
    ],
)
def test_what_a_process_comes_to(contact: Any, code: str, status: str, reason: str) -> None:
    outcome = contact.run(step(contact, code), 9)
    assert (outcome.status, outcome.reason) == (status, reason)


def test_a_wrong_row_fails_its_step(contact: Any) -> None:
    rows = "import sys; sys.path.insert(0, 'benchmarks'); from contact_rows import add_row; "
    right, wrong = rows + "add_row(error=1, passed=True)", rows + "add_row(error=1); add_row(error=2, passed=False)"
    assert contact.run(step(contact, right), 9).status == "passed"
    outcome = contact.run(step(contact, wrong), 9)
    assert (outcome.status, [row["error"] for row in outcome.rows]) == ("failed", [1, 2])


def test_what_a_step_lacks(contact: Any) -> None:
    assert contact.missing(step(contact, "", modules=("json", "absent|os.path"))) == ""
    assert "absent.part" in contact.missing(step(contact, "", modules=("json", "absent.part")))
    assert "no-such-program" in contact.missing(step(contact, "", program="no-such-program"))


def test_all_steps_run_after_one_that_failed(
    contact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        step(contact, "import sys; sys.exit('broken | here')"),
        step(contact, "", name="lacks", modules=("absent",)),
        step(contact, "print('fine')", name="last"),
    ]
    monkeypatch.setattr(contact, "find_device", lambda: ({"name": "a GPU"}, ""))
    monkeypatch.setattr(contact, "steps", lambda cubins: found)
    monkeypatch.setattr(sys, "argv", ["first_contact.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        contact.main()
    assert ended.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["status"] for one in report["steps"]] == ["failed", "skipped", "passed"]
    assert report["no_gpu"] == "" and report["device"] == {"name": "a GPU"}
    assert "broken \\| here" in (tmp_path / "report.md").read_text()
