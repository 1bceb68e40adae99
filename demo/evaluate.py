"""Judges a training checkpoint: `python -m demo.evaluate --output DIR`, some minutes.

Renders held-out storyboards of three scenes, prints the judge's scores and writes a contact sheet of the first clips.
"""

from itertools import islice

from PIL import Image

from demo.command_line import output_folder
from demo.contact_sheet import contact_sheet
from demo.judge import judge
from demo.sample import Trained, rendered

_STORYBOARDS = 100
_STEPS = 50
_SHOWN = 8


def main() -> None:
    folder = output_folder(__doc__)
    trained = Trained.load(folder)
    clips = list(rendered(trained, _STORYBOARDS, 3, _STEPS))
    Image.fromarray(contact_sheet([frames for _, _, frames in islice(clips, _SHOWN)])).save(folder / "clips.png")
    print(f"after {trained.num_done} steps: {judge(clips)}")


if __name__ == "__main__":
    main()
