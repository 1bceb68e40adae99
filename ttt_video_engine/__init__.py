"""ttt-video-engine: from a storyboard to a video with TTT-Video models.

The code lives in the folders this package links to: `runtime`, `engines`, `reference`, `export` and `cli.py`.
"""

__version__ = "0.1.0"
