"""The bundle of the demo model, which a wheel carries, for whoever has no bundle yet."""

from pathlib import Path

import ttt_video_engine
from ttt_video_engine.runtime.errors import ConfigError

DEMO_BUNDLE = Path(ttt_video_engine.__file__).with_name("demo_bundle")


def bundle_folder(stated: Path | None) -> Path:
    """The stated folder, else the demo model's. Raises ConfigError where this installation has no demo model."""
    if stated is None and not DEMO_BUNDLE.is_dir():
        raise ConfigError(
            "--bundle is missing, and this installation has no demo model; export a bundle, or make wheel"
        )
    return stated or DEMO_BUNDLE
