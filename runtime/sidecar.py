"""video.json: what a video is and how it was made, written last."""

from contextlib import suppress
from pathlib import Path

import msgspec

from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, sha256_of, writing
from ttt_video_engine.runtime.jobs import Job
from ttt_video_engine.runtime.render_folder import SIDECAR, VIDEO
from ttt_video_engine.runtime.step_state import History

SIDECAR_VERSION = 1


def write_sidecar(
    job: Job, model: ModelConfig, num_frames: int, history: History, environment: dict[str, str], changes: list[str]
) -> Path:
    """Writes what docs/formats.md lists; from then on the video counts as done. The path of the sidecar.

    Raises OutputError where the disk is full or fails. Then there is none, as a video is either done or has failed.
    """
    path = job.folder / SIDECAR
    with writing(job.folder / VIDEO):
        sha256 = sha256_of(job.folder / VIDEO)
    content = {
        "format_version": SIDECAR_VERSION,
        "video": VIDEO,
        "sha256": sha256,
        "length": job.length,
        "num_frames": num_frames,
        "width": model.width,
        "height": model.height,
        "storyboard": {"source": job.storyboard.source, "scenes": job.storyboard.scenes},
        "truncations": [truncation.message for truncation in job.truncations],
        "settings": job.settings,
        "bundle": job.record.bundle,
        "seconds": history.seconds,
        "passes": history.passes,
        "resumed": history.resumed,
        "changes": changes,
        "environment": environment,
        "versions": job.record.versions,
    }
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OutputError:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # it has its name where only its folder could not be synced
        raise
    return path
