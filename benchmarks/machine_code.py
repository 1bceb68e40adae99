"""Counts the instructions of a turn of each TTT kernel's loop, from its machine code, and needs no GPU.

One turn is one mini-batch. The kernels are compiled for bfloat16 at the sizes of the 5B model.
"""

import argparse
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from measure import print_row, table

from ttt_video_engine.engines.kernels.compile import compile_kernel, compile_staged_mlp
from ttt_video_engine.engines.kernels.cubin import Cubin

GPUS = ("sm_89", "sm_90")
KINDS = {
    "products": ("HMMA", "HGMMA"),
    "barriers": ("BAR",),
    "shuffles": ("SHFL",),
    "spills": ("LDL", "STL"),
    "shared": ("LDS", "STS"),  # and LDSM, STSM
    "special": ("MUFU",),
}
"""Prefixes of opcodes by the table's columns. A spill is a load or store of local memory."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder to write the cubins to")
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for name in ("linear", "mlp", "mlp staged"):
            for gpu in GPUS:
                target = (arguments.keep or Path(folder)) / name.replace(" ", "-")
                target.mkdir(parents=True, exist_ok=True)
                opcodes = largest_loop(target / kernel(name, gpu, target).file)
                counts = [sum(opcode.startswith(prefixes) for opcode in opcodes) for prefixes in KINDS.values()]
                rows.append(print_row([f"TTT-{name}", gpu, f"{len(opcodes):,}", *map(str, counts)]))
    print(table(["kernel", "GPU", "instructions", *KINDS], rows))


def kernel(name: str, gpu: str, folder: Path) -> Cubin:
    if name == "mlp staged":
        return compile_staged_mlp(gpu=gpu, folder=folder)
    if name == "mlp":
        return compile_kernel("mlp", gpu=gpu, dtype="bfloat16", mini_batch_size=64, head_dim=64, folder=folder)
    return compile_kernel("linear", gpu=gpu, dtype="bfloat16", mini_batch_size=16, head_dim=64, folder=folder)


def largest_loop(cubin: Path) -> list[str]:
    """Opcodes from the target of a backward branch to the branch, for the branch that goes back farthest."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    largest = (0, 0)
    for line in subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        if not (instruction := _INSTRUCTION.search(line)):
            continue
        opcodes.append(instruction[1])
        target = re.search(r"\.L_\w+", instruction[2])
        if instruction[1].startswith("BRA") and target and target[0] in labels:
            largest = max(largest, (labels[target[0]], len(opcodes)), key=lambda span: span[1] - span[0])
    return opcodes[slice(*largest)]


if __name__ == "__main__":
    main()
