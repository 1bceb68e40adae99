"""The sampling part of a config file of the public code, for `sample --config`."""

from pathlib import Path

from msgspec.structs import replace

from ttt_video_engine.runtime.config_file import naming, read_toml
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.public_config import SamplingOptions, is_public, sampling_table


def sampling_options(path: Path) -> SamplingOptions:
    """What the file at `path` states of how to render, and warnings that name it.

    Raises ConfigError, which names the file and the field, for a file in another form than the public code's, and for
    what cannot be rendered.
    """
    table = read_toml(path)
    with naming(path):
        if not is_public(table):
            raise ConfigError("has no [eval] or [guider] of the public code; give num_steps and the like as options")
        options = sampling_table(table)
    return replace(options, warnings=tuple(f"{path}: {warning}" for warning in options.warnings))
