"""Writes a checkpoint folder that `ttt-video export --checkpoint` reads, from a folder of training:

    python -m demo.export_checkpoint --output DIR

makes DIR/checkpoint from the averaged weights in DIR/transformer.pt and DIR/vae.pt, in float16. A part that was not
trained there is the published one.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.command_line import output_folder
from demo.files import load
from demo.text import FOLDER as TOKENIZER

_PUBLISHED = Path(__file__).with_name("checkpoint")


def export_checkpoint(training: Path, checkpoint: Path) -> None:
    """From the folder of a training to transformer/, vae/, text_encoder/ and tokenizer/, names as published."""
    shutil.copytree(_PUBLISHED, checkpoint, dirs_exist_ok=True)
    if (training / "transformer.pt").is_file():
        both = load(training / "transformer.pt")
        for part, prefix in (("transformer", "transformer."), ("text_encoder", "text_encoder.t5.")):
            _write(checkpoint / part, _under(both["average"], prefix), both["num_done"])
    if (training / "vae.pt").is_file():
        vae = load(training / "vae.pt")
        decoder = {f"decoder.{name}": value for name, value in vae["average"].items()}
        _write(checkpoint / "vae", decoder, vae["num_done"])
    shutil.copytree(TOKENIZER, checkpoint / "tokenizer", dirs_exist_ok=True)


def _under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _write(folder: Path, weights: dict[str, Tensor], num_steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: value.to(torch.float16).contiguous() for name, value in sorted(weights.items())}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt", "steps": str(num_steps)})


if __name__ == "__main__":
    folder = output_folder(__doc__)
    export_checkpoint(folder, folder / "checkpoint")
