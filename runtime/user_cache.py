"""The folder of the user's caches."""

from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path | None:
    """The folder of one cache; None for a user without a home folder. On Linux, XDG_CACHE_HOME overrides it."""
    try:
        folder = platformdirs.user_cache_path("ttt-video", appauthor=False) / name
    except RuntimeError:  # platformdirs 4.10 and later; older ones leave "~" as it is
        return None
    return folder if folder.is_absolute() else None
