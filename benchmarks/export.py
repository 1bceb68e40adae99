"""Measures the export of a full-size TTT-MLP transformer from a sharded bfloat16 checkpoint.

The checkpoint and the bundle are created for the measurement and deleted after it. The text encoder and the VAE decoder
are small, so that the transformer dominates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from measure import disk_speed, drop_page_cache, peak_memory, print_row, table
from msgspec.structs import replace
from safetensors.torch import save_file

from ttt_video_engine.export.build import export_bundle
from ttt_video_engine.export.sources.source import CheckpointSource, Component, SeededSource
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import ModelConfig, TextEncoderConfig, VaeConfig
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.files import check_space
from ttt_video_engine.runtime.presets import preset

LENGTHS = ("3s", "63s")
SHARD_BYTES = 5 << 30
PROBE_BYTES = 4 << 30
"""Size of the file that the disk's speed is measured with."""

WEIGHT_STD = 0.02
MEMORY_LIMIT = 6.0
"""GiB, of the export process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--export", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export is not None:
        export(options.folder, options.export)
        return
    check_space(options.folder, {"checkpoint": 15 * 10**9, "bundle": 15 * 10**9, "probe": PROBE_BYTES})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-export-") as folder:
        measure(Path(folder))


def measure(folder: Path) -> None:
    written, read = disk_speed(folder / "probe", PROBE_BYTES)
    start = perf_counter()
    size = make_checkpoint(folder / "checkpoint/transformer")
    print_row([f"checkpoint of {size:,} bytes made in {perf_counter() - start:.0f} s"])
    rows, sizes = [], []
    for length in LENGTHS:
        drop_page_cache(folder / "checkpoint/transformer")
        before = tree_size(folder / "bundle")
        run = measured_export(folder, length)
        sizes.append(tree_size(folder / "bundle") - before)
        limit = "met" if run.peak <= MEMORY_LIMIT else "missed"
        phases = [f"{run.seconds[phase]:.0f}" for phase in ("weights", "graph", "parity", "all")]
        rows.append(print_row([f"5B mlp bfloat16 {length}", f"{sizes[-1]:,}", *phases, f"{run.peak:.2f} ({limit})"]))
        if length == LENGTHS[0]:
            speed = size / run.seconds["weights"]
    print(table(["export", "new bytes", "weights s", "graph s", "parity s", "all s", "peak GiB"], rows))
    print(f"\nThe disk by itself: writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s.")
    print(f"Weights, read, converted, written and read back: {speed / 1e6:.0f} MB/s, the disk's writing is", end=" ")
    print(f"{written / speed:.2f}x as fast (aim 2x: {'met' if written <= 2 * speed else 'missed'}).")
    share = sizes[1] / sizes[0]
    print(
        f"The second length: {share:.2%} of the bytes of the first (limit 2%: {'met' if share <= 0.02 else 'missed'})."
    )
    print_opening(folder / "bundle")


def make_checkpoint(folder: Path) -> int:
    """Writes random weights under the public code's names, in shards with an index. Returns their size in bytes."""
    folder.mkdir(parents=True)
    module = on_meta_device(lambda: DiffusionTransformer(model().transformer)).to(torch.bfloat16)
    state = {f"dit.{name}": value for name, value in module.state_dict().items()}
    # Drawing random numbers is slower than the disk, so all weights are slices of this block.
    block = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(WEIGHT_STD).bfloat16()
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    start = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            start = (start + 7919) % (1 << 24)
            tensors[name] = block[start : start + state[name].numel()].view(state[name].shape).clone()
        save_file(tensors, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(value.nbytes for value in state.values())


def model() -> ModelConfig:
    full = preset("5B", "mlp")
    return replace(
        full,
        name="5B transformer",
        text_encoder=TextEncoderConfig(
            d_model=full.transformer.text_dim, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=2002
        ),
        vae=VaeConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1),
    )


@dataclass(frozen=True)
class Source(SeededSource):
    """The transformer from a checkpoint, the other components from a seed."""

    folder: Path = Path()

    def transformer(self) -> Component[DiffusionTransformer]:
        return CheckpointSource(self.model, self.folder).transformer()


@dataclass(frozen=True)
class Run:
    """Seconds per phase of the transformer's export, and the peak memory of the process in GiB."""

    seconds: dict[str, float]
    peak: float


def measured_export(folder: Path, length: str) -> Run:
    """Exports in a subprocess."""
    command = [sys.executable, __file__, "--folder", str(folder), "--export", length]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(done.stdout))


def export(folder: Path, length: str) -> None:
    """Exports, and prints a `Run` as JSON. The lines that the export reports separate the phases."""
    start = perf_counter()
    times: dict[str, float] = {}

    def report(line: str) -> None:
        print_row([f"{perf_counter() - start:6.1f} s", line])
        for phase, mark in PHASE_MARKS.items():
            if line.startswith("transformer") and mark in line:
                times[phase] = perf_counter()

    source = Source(model(), seed=0, folder=folder / "checkpoint")
    export_bundle(source, folder / "bundle", [length], "bfloat16", report)
    end = perf_counter()
    times.setdefault("weights", times["graph"])
    seconds = {
        "weights": times["graph"] - times["weights"],
        "graph": times["parity"] - times["graph"],
        "parity": times["done"] - times["parity"],
        "all": end - start,
    }
    print(json.dumps({"seconds": seconds, "peak": peak_memory() / 2**30}))


PHASE_MARKS = {"weights": "bytes of weights", "graph": ": new", "parity": "too large", "done": ": parity"}
"""Phase of the transformer's export → text of the report line that begins it."""


def tree_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def print_opening(bundle: Path) -> None:
    start = perf_counter()
    open_bundle(bundle).check()
    opened = perf_counter() - start
    weights = bundle / "transformer/model.onnx_data"
    os.truncate(weights, weights.stat().st_size - 1)
    start = perf_counter()
    try:
        open_bundle(bundle).check()
    except BundleError:
        print(f"Opened and checked in {opened * 1000:.1f} ms, a damaged one refused in", end=" ")
        print(f"{(perf_counter() - start) * 1000:.1f} ms (limit 1 s: met).")


if __name__ == "__main__":
    main()
