"""The digest that binds states and latents to a render is the same in memory and read back."""

from pathlib import Path

from ttt_video_engine.runtime.run_record import BundleRecord, RunRecord, read_record, write_record
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import Scene


def test_a_whole_number_of_frames_per_second_is_the_same_rate(tmp_path: Path) -> None:
    made_by = BundleRecord(sha256="0" * 64, preset="tiny", ttt="linear", dtype="float32")
    record = RunRecord(
        length="3s",
        scenes=(Scene("A bear."),),
        settings=Settings(fps=24, guidance_scale=5),
        bundle=made_by,
        environment={},
        versions={},
    )
    write_record(tmp_path, record)
    found = read_record(tmp_path)
    assert found is not None and found.digest == record.digest
