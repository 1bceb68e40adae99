"""ttt-video-engine: renders storyboards to videos with TTT-Video models.

The code is in `cli.py` and the folders that this package links to.
"""

__version__ = "0.1.0"
