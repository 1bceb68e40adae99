"""A process of its own in which Triton interprets: it decides when it is imported, so a test cannot change its mind.

Run as `interpret_kernels.py IN OUT`: for every operator's name on standard input, runs its kernel on the tensors of IN,
writes OUT, and answers with a line.
"""

import os
import sys
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors.torch import load_file, save_file

from ttt_video_engine.engines.kernels.ttt_linear import ttt_linear
from ttt_video_engine.engines.kernels.ttt_mlp import ttt_mlp
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import INPUTS

KERNELS: dict[str, Any] = {"linear": ttt_linear, "mlp": ttt_mlp}


def main(source: str, target: str) -> None:
    for line in sys.stdin:
        op = line.strip()
        inputs = load_file(source)
        batch, heads, num_mini_batches, mini_batch_size, head_dim = inputs["XQ"].shape
        out = torch.full_like(inputs["XQ"], float("nan"))
        # The interpreter silently computes wrong products of anything but float32.
        sizes = {"C": mini_batch_size, "F": head_dim, "PRECISION": "ieee"}
        tensors = [inputs[name] for name in INPUTS[cast(TTTKind, op)]]
        KERNELS[op][(batch * heads,)](*tensors, out, heads, num_mini_batches, **sizes)
        save_file({"XQW": out}, target)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
