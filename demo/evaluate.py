"""Scores of rendered held-out storyboards: `python -m demo.evaluate FOLDER …`, a line for each folder of videos.

Each folder is an --output-dir of `ttt-video sample` for a file of `demo.held_out`. Only finished videos count.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from demo.held_out import asked_for
from demo.judge import judge
from demo.scenes import Frames
from demo.story import Script
from ttt_video_engine.runtime.render_folder import SIDECAR, VIDEO


def done_videos(folder: Path) -> list[Path]:
    """The folders of finished videos, in the order of their names."""
    return sorted(sidecar.parent for sidecar in folder.glob(f"*/{SIDECAR}"))


def frames_of(video: Path) -> Frames:
    """All frames [F, height, width, 3] of a finished video."""
    with av.open(video / VIDEO) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def judged(videos: list[Path]) -> Iterator[tuple[Script, list[str], Frames]]:
    """What `judge` takes, of each video."""
    for video in videos:
        yield *asked_for(video.name), frames_of(video)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    for folder in parser.parse_args().folder:
        videos = done_videos(folder)
        print(f"{folder}, {len(videos)} videos: {judge(judged(videos))}")


if __name__ == "__main__":
    main()
