"""Prints the first tables of docs/benchmarks.md, measured on this machine: all (`make bench`), or one with `--only`."""

import argparse
from collections.abc import Callable

import cheaper
import process
import queues
import spinning
import state
import step
import workers

BENCHMARKS: dict[str, tuple[str, Callable[[], str]]] = {
    "step": ("Transformer step, batch 2, fp32", step.against_reference),
    "cheaper": ("A step in float32 and in int8", cheaper.steps),
    "film": ("A film in float32 and in int8", cheaper.film),
    "spinning": ("Threads that spin", spinning.measure),
    "length": ("Step time over length, ONNX Runtime, batch 2, fp32", step.over_length),
    "import": ("Start", process.imports),
    "memory": ("Memory of decoding", process.decode_memory),
    "state": ("A state after every step", state.after_every_step),
    "queue": ("Memory of a queue", queues.memory),
    "workers": ("Two workers over one", workers.throughput),
    "loading": ("Loading once a queue", queues.loading),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, help="print only this table")
    only = parser.parse_args().only
    for name, (title, measure) in BENCHMARKS.items():
        if only in (None, name):
            print(f"## {title}\n\n{measure()}\n", flush=True)


if __name__ == "__main__":
    main()
