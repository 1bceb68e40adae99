"""Storyboards that training never saw, in a file for `ttt-video sample`:

    python -m demo.held_out --scenes 3 --count 100 --output judge-3.jsonl

The file's name ends with the number of scenes: with it and a video's number the judge knows what was asked for.
"""

import argparse
import re
from pathlib import Path

import msgspec

from demo.captions import captions
from demo.data import HELD_OUT_SEED
from demo.story import Script, random_script
from demo.text import storyboard

_NAME = re.compile(r".*-(\d+)-(\d{3,})", re.ASCII)


def asked_for(video: str) -> tuple[Script, list[str]]:
    """Script and captions of a video named after its storyboard, such as judge-3-001. Raises ValueError for others."""
    match = _NAME.fullmatch(video)
    if match is None:
        raise ValueError(f"{video}: is not the name of a held-out storyboard, such as judge-3-001")
    num_scenes, number = int(match[1]), int(match[2])
    script = random_script(HELD_OUT_SEED, number, num_scenes)
    return script, captions(script, number)


def held_out(name: str, count: int) -> bytes:
    """A line of JSON for each of `count` storyboards of a file that is named so, without the ending."""
    lines = []
    for number in range(1, count + 1):
        script, sentences = asked_for(f"{name}-{number:03d}")
        lines.append(msgspec.json.encode(storyboard(script, sentences).scenes) + b"\n")
    return b"".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True, help="NAME-SCENES.jsonl")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.suffix != ".jsonl" or not output.stem.endswith(f"-{arguments.scenes}"):
        parser.error(f"--output must end with -{arguments.scenes}.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(held_out(output.stem, arguments.count))


if __name__ == "__main__":
    main()
