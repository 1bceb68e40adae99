"""The files for schedulers in docs/scale.md: valid, and their parts are every part once."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in import board

from ttt_video_engine.commands.sample import _part
from ttt_video_engine.runtime.errors import CheckFailed, OutputError, RenderBusy, StoreUnreachable, StoryboardError

PAGE = (Path(__file__).parents[1] / "docs/scale.md").read_text("utf-8")
PARTS = 8


def block(kind: str, number: int = 0) -> str:
    found: list[str] = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found[number]


_PRINTS_ITS_SHARD = """
ttt-video() { while [ $# -gt 0 ]; do [ $1 = --shard ] && echo $2; shift; done; }
exec() { "$@"; }
srun() { "$@"; }
"""


def shard_of(script: str, **variables: str) -> str:
    """What a shell makes of the value of --shard in a script, whose command is not run."""
    program = f"{_PRINTS_ITS_SHARD}\n{script}"
    done = subprocess.run(["bash", "-c", program], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def job() -> Any:
    return yaml.safe_load(block("yaml"))["spec"]


def test_an_array_of_slurm_has_every_part_once() -> None:
    script = block("bash")
    assert f"#SBATCH --array=1-{PARTS}\n" in script
    shards = [shard_of(script, SLURM_ARRAY_TASK_ID=str(number)) for number in range(1, PARTS + 1)]
    assert shards == [f"{number}/{PARTS}" for number in range(1, PARTS + 1)]


def test_an_indexed_job_of_kubernetes_has_every_part_once(job: Any) -> None:
    assert (job["completionMode"], job["completions"]) == ("Indexed", PARTS)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    shards = [shard_of(container["args"][0], JOB_COMPLETION_INDEX=str(index)) for index in range(PARTS)]
    assert shards == [f"{number}/{PARTS}" for number in range(1, PARTS + 1)]


def test_parallel_has_every_part_once() -> None:
    script = block("bash", 1)
    assert "--shard {}/8'" in script and script.split(":::")[1].split() == [str(n) for n in range(1, PARTS + 1)]


def test_the_job_gives_up_on_wrong_input_alone(job: Any) -> None:
    """And Kubernetes allows FailIndex only with these two fields."""
    rule = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex")
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["backoffLimitPerIndex"] > 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    given_up = rule["onExitCodes"]["values"]
    assert all(error.exit_code in given_up for error in (StoryboardError, OutputError, RenderBusy))
    assert not any(error.exit_code in given_up for error in (CheckFailed, StoreUnreachable))


def test_the_parts_of_a_command_hold_every_video_once() -> None:
    boards = [board(f"film-{number:03}", f"Scene {number}.") for number in range(100)]
    parts = [_part(boards, f"{number}/{PARTS}") for number in range(1, PARTS + 1)]
    assert sorted(one.name for part in parts for one in part) == [one.name for one in boards]
