"""What a machine with an NVIDIA GPU says of this project, in under eight minutes: one Markdown and one JSON report.

Needs Python alone; a step says what it lacks. Every step is a process with a time limit of its own, and a step that
fails does not stop the others. Exit code 1 where a step failed, 0 where all passed or were skipped.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL_SECONDS = 470.0
LEAST_SECONDS = 5.0
"""A step that has less time left is skipped."""
PACKAGES = ("numpy", "torch", "triton", "cuda-core", "cuda-bindings", "tensorrt", "tensorrt-rtx", "onnxruntime",
            "onnxruntime-gpu", "transformers", "msgspec")  # fmt: skip
RUNTIME = ("numpy", "msgspec", "platformdirs")
"""Modules that the project's own modules import, whichever step uses them."""
TORCH = (*RUNTIME, "torch", "transformers", "safetensors")
KERNELS = ("triton", "cuda.core")
COMMANDS = (*TORCH, "onnx", "onnxscript", "onnxruntime", "tokenizers", "av", "typer", "rich", "filelock")


@dataclass(frozen=True)
class Step:
    """A process and what it needs: modules (of those with | between them one), and a program on the path."""

    name: str
    command: tuple[str, ...]
    seconds: float
    modules: tuple[str, ...] = ()
    program: str = ""


@dataclass
class Outcome:
    """`status` is passed, failed or skipped; `reason` says why in one line. `rows` are the step's own findings."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""


def steps(cubins: str | None) -> list[Step]:
    kernels = (str(HERE / "contact_kernels.py"),)
    layer = (str(HERE / "contact_layer.py"),)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    gpu_tests = [f"tests/test_{name}.py" for name in ("runner_gpu", "plugin_engine", "sample_tensorrt")]
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", *gpu_tests)
    python = (sys.executable,)
    found = [
        Step("kernels against the oracle", (*python, *kernels, "--seconds", "70"), 90, (*TORCH, *KERNELS)),
        Step("kernel speed and the GPU's ceilings", (*python, str(HERE / "kernels.py")), 60, (*RUNTIME, *KERNELS)),
        *(
            Step(f"a full-width layer, {length}", (*python, *layer, "--length", length), seconds, TORCH)
            for length, seconds in (("3s", 50), ("9s", 40), ("63s", 60))
        ),
        Step("a layer with torch.compile", (*python, *layer, "--length", "9s", "--mode", "compile"), 90, TORCH),
        Step("a layer as a CUDA graph", (*python, *layer, "--length", "3s", "--mode", "graph"), 30, TORCH),
        Step("tiny renders by every backend", (*python, str(HERE / "contact_render.py")), 120, COMMANDS),
        Step("TensorRT engines with plugins", pytest, 90, (*COMMANDS, "pytest", "hypothesis", "tensorrt|tensorrt_rtx")),
        Step(
            "a full-width layer as a TensorRT engine",
            (*python, str(HERE / "contact_engine.py")),
            120,
            (*COMMANDS, *KERNELS, "tensorrt|tensorrt_rtx"),
        ),
        *(
            Step(
                f"compute-sanitizer, {tool}",
                (*sanitizer, tool, *python, *kernels, "--small"),
                45,
                (*TORCH, *KERNELS),
                "compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]
    if cubins is not None:
        command = (*python, *kernels, "--cubins", cubins)
        found.insert(1, Step("cubins from elsewhere against the oracle", command, 40, (*TORCH, "cuda.core")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "first-contact", help="folder of the report")
    parser.add_argument("--cubins", help="folder of cubins that were compiled elsewhere, to be checked as well")
    options = parser.parse_args()
    device, no_gpu = find_device()
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for step in steps(options.cubins):
        left = TOTAL_SECONDS - (time.monotonic() - start)
        reason = no_gpu or missing(step) or ("no time is left" if left < LEAST_SECONDS else "")
        print(f"{step.name} …", flush=True)
        outcome = Outcome(step.name, "skipped", reason) if reason else run(step, min(step.seconds, left))
        print(f"{step.name}: {outcome.status}{outcome.reason and f' ({outcome.reason})'}", flush=True)
        outcomes.append(outcome)
        write_report(options.output, device, no_gpu, outcomes)  # each time: what is known survives a kill
    print(f"report: {options.output / 'report.md'}")
    sys.exit(1 if any(outcome.status == "failed" for outcome in outcomes) else 0)


def find_device() -> tuple[dict[str, str], str]:
    """What the machine has, and why there is no GPU to use; the latter is empty where there is one."""
    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    code = "import ctypes, sys; sys.exit(ctypes.CDLL('libcuda.so.1').cuInit(0))"
    try:  # in a process of its own: a driver may hang
        ctypes.CDLL("libcuda.so.1")
        status = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True).returncode
    except OSError:
        return found, "no NVIDIA driver was found"
    except subprocess.TimeoutExpired:
        return found, "the NVIDIA driver did not answer within 30 s"
    if status != 0:
        return found, f"the NVIDIA driver finds no GPU (cuInit gives {status})"
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        found |= dict(zip(fields, line.split(", "), strict=False))
    except (OSError, subprocess.TimeoutExpired):
        found["name"] = "unknown: nvidia-smi did not answer"
    return found, ""


def missing(step: Step) -> str:
    """What the step lacks; empty where it lacks nothing."""
    for modules in step.modules:
        if not any(_has_module(name) for name in modules.split("|")):
            return f"{modules.replace('|', ' or ')} is not installed"
    return f"{step.program} is not on the path" if step.program and shutil.which(step.program) is None else ""


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step. Its processes are killed when its time is up; the rows that it has written until then are kept."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "CONTACT_ROWS": str(rows), "PYTHONPATH": path}
        with log.open("wb") as output:
            process = subprocess.Popen(
                step.command, stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    taken = round(time.monotonic() - start, 1)
    wrong = [row for row in found if row.get("passed") is False]
    reason = ""
    if code is None:
        reason = f"stopped after {seconds:.0f} s"
    elif code != 0:
        reason = (lines[-1] if lines else f"exit code {code}")[:300]
    elif wrong:
        reason = f"{len(wrong)} of {len(found)} rows are wrong"
    return Outcome(step.name, "failed" if reason else "passed", reason, taken, found, "\n".join(lines[-25:]))


def write_report(folder: Path, device: dict[str, str], no_gpu: str, outcomes: list[Outcome]) -> None:
    """Writes `report.json` and `report.md` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "no_gpu": no_gpu, "steps": [asdict(outcome) for outcome in outcomes]}
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["# First contact with a GPU", "", f"**No GPU: {no_gpu}. Nothing was checked.**" if no_gpu else "", ""]
    lines += [f"- {name}: {value}" for name, value in device.items()]
    lines += ["", "| step | result | seconds | why |", "| --- | --- | ---: | --- |"]
    lines += [f"| {one.name} | {one.status} | {one.seconds} | {_cell(one.reason)} |" for one in outcomes]
    for one in outcomes:
        if one.rows:
            columns = list(dict.fromkeys(name for row in one.rows for name in row))
            lines += ["", f"## {one.name}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in one.rows]
        elif one.output:
            lines += ["", f"## {one.name}", "", "```", one.output, "```"]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a step: the process is the leader of its own session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
