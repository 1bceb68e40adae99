"""A copy of a checkpoint whose TTT layers do nothing: `python -m demo.without_ttt CHECKPOINT OUTPUT`.

What a TTT layer adds to its block is multiplied by tanh(alpha), in both directions: an alpha of 0 adds nothing.
"""

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

_GATE = ".gating_alpha"


def without_ttt(checkpoint: Path, output: Path) -> int:
    """Writes the copy; how many gates were closed."""
    shutil.copytree(checkpoint, output, dirs_exist_ok=True)
    path = Path("transformer/model.safetensors")
    with safe_open(checkpoint / path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    gates = [name for name in weights if name.endswith(_GATE)]
    for name in gates:
        weights[name].zero_()
    save_file(weights, output / path, metadata=metadata)
    return len(gates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(f"{without_ttt(arguments.checkpoint, arguments.output)} gates closed")


if __name__ == "__main__":
    main()
