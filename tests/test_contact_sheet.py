"""Contact sheets and previews: every picture in its place, texts that fit, and the same bytes for the same input."""

from pathlib import Path

import numpy as np
import pytest
from messages import refused_with
from numpy.typing import NDArray
from PIL import Image

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.runtime.bundle import latent_shape, open_bundle
from ttt_video_engine.runtime.contact_sheet import draw_contact_sheet, draw_preview, scene_frames
from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.preview import preview_frames
from ttt_video_engine.runtime.stages import decode

Frames = NDArray[np.uint8]

LONG = "A bear in a blue apron bakes bread while snow falls outside of the round window. " * 10
TEXTS = (
    "A bear bakes bread.",
    "",
    LONG,
    "クマがパンを焼く。" * 40,
    "Медведь 🐻\n\t\x00\x1b[31m",
    "x" * 20_000,
    "\ud800",
)


def flat(*shape: int) -> tuple[Frames, NDArray[np.int64]]:
    """Pictures [*shape, 3] of one colour each, and these colours, which nothing else on a sheet has."""
    count = int(np.prod(shape[:-2]))
    colours = np.stack([40 + 2 * np.arange(count), np.full(count, 200), np.full(count, 90)], axis=-1).astype(np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (count, *shape[-2:], 3)).reshape(*shape, 3).copy()
    return frames, colours.astype(np.int64)


def boxes_of(sheet: Frames, colours: NDArray[np.int64]) -> list[tuple[int, int, int, int]]:
    """Where each colour is: top, bottom, left, right."""
    places = np.array([1 << 16, 1 << 8, 1])
    packed, boxes = sheet @ places, []
    for colour in colours @ places:
        y, x = np.nonzero(packed == colour)
        assert len(y) == (y.max() + 1 - y.min()) * (x.max() + 1 - x.min()), "a picture is whole, with nothing over it"
        boxes.append((int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1))
    return boxes


def read(path: Path) -> Frames:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


@pytest.mark.parametrize("num_scenes", [1, 3, 21])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (480, 720)])
def test_rows_are_scenes_and_columns_times(tmp_path: Path, num_scenes: int, height: int, width: int) -> None:
    frames, colours = flat(num_scenes, 4, height, width)
    captions = [TEXTS[index % len(TEXTS)] for index in range(num_scenes)]
    draw_contact_sheet(tmp_path / "sheet.png", frames, captions, "seed 42")
    sheet = read(tmp_path / "sheet.png")
    boxes = np.array(boxes_of(sheet, colours)).reshape(num_scenes, 4, 4)
    assert (boxes[..., 3] - boxes[..., 2] == 240).all() and (boxes[..., 1] - boxes[..., 0] == 160).all()
    assert (np.diff(boxes[:, :, 2], axis=1) > 240).all() and (boxes[:, :, 2] == boxes[:1, :, 2]).all()
    assert (np.diff(boxes[:, :, 0], axis=0) > 160).all() and (boxes[:, :, 0] == boxes[:, :1, 0]).all()
    for row in boxes:  # each caption starts with the number of its scene
        assert (sheet[row[0, 1] : row[0, 1] + 40] < 100).any()
    right, left = boxes[..., 3].max(), boxes[..., 2].min()
    edges = np.concatenate([sheet[:, : left - 3], sheet[:, right + 3 :]], axis=1)
    assert (edges == sheet[0, 0]).all(), "no text leaves the columns"
    assert (sheet[boxes[..., 1].max() + 60 :] < 150).any(), "the footer is there"


@pytest.mark.parametrize("num_scenes", [1, 3, 21])
def test_a_preview_has_each_scene_once(tmp_path: Path, num_scenes: int) -> None:
    frames, colours = flat(num_scenes, 64, 96)
    captions = [TEXTS[index % len(TEXTS)] for index in range(num_scenes)]
    draw_preview(tmp_path / "preview.png", frames, captions, "step 3 of 50")
    sheet = read(tmp_path / "preview.png")
    places = [(top, left) for top, _, left, _ in boxes_of(sheet, colours)]
    assert places == sorted(places) and len(set(places)) == num_scenes
    assert sheet.shape[0] < 1200 and sheet.shape[1] < 1300, "fits a screen"


def test_texts_show(tmp_path: Path) -> None:
    frames, _ = flat(1, 2, 64, 96)
    digests = set()
    for caption, footer, seconds in (("a", "b", 3.0), ("c", "b", 3.0), ("a", "d", 3.0), ("a", "b", 2.0)):
        draw_contact_sheet(tmp_path / "sheet.png", frames, [caption], footer, scene_seconds=seconds)
        digests.add(sha256_of(tmp_path / "sheet.png"))
    for caption, title in (("a", "b"), ("c", "b"), ("a", "d")):
        draw_preview(tmp_path / "sheet.png", frames[:, 0], [caption], title)
        digests.add(sha256_of(tmp_path / "sheet.png"))
    assert len(digests) == 7


def test_the_same_input_gives_the_same_bytes_in_the_same_place(tmp_path: Path) -> None:
    frames, _ = flat(3, 4, 64, 96)
    digests = set()
    for _ in range(2):
        draw_contact_sheet(tmp_path / "a.png", frames, TEXTS[:3], "seed 42")
        draw_preview(tmp_path / "b.png", frames[:, 0], TEXTS[:3], "step 1")
        digests.add((sha256_of(tmp_path / "a.png"), sha256_of(tmp_path / "b.png")))
    assert len(digests) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_picture_that_cannot_be_written_is_named_and_the_one_before_stays(tmp_path: Path) -> None:
    frames, _ = flat(1, 64, 96)
    (tmp_path / "file").touch()
    with refused_with(OutputError, tmp_path / "file/preview.png"):
        draw_preview(tmp_path / "file/preview.png", frames, ["a"], "b")
    draw_preview(tmp_path / "preview.png", frames, ["a"], "b")
    before = sha256_of(tmp_path / "preview.png")
    with pytest.raises(ValueError):
        draw_preview(tmp_path / "preview.png", frames, ["a", "one too many"], "b")
    assert sha256_of(tmp_path / "preview.png") == before


@pytest.mark.parametrize(("num_scenes", "columns"), [(1, 1), (3, 4), (21, 5), (2, 48)])
def test_each_scene_gives_its_own_frames_evenly(num_scenes: int, columns: int) -> None:
    chosen = scene_frames(num_scenes, 1 + 48 * num_scenes, columns)
    assert [len(row) for row in chosen] == [columns] * num_scenes
    for index, row in enumerate(chosen):
        assert 1 + 48 * index <= row[0] and row[-1] <= 48 + 48 * index
        steps = np.diff(row)
        assert (steps > 0).all() and np.ptp(steps) <= 1 if columns > 1 else row == [25 + 48 * index]


@pytest.mark.parametrize(("num_scenes", "num_frames", "columns"), [(2, 98, 4), (1, 49, 0), (1, 49, 49), (3, 1, 1)])
def test_frames_that_do_not_divide_are_refused(num_scenes: int, num_frames: int, columns: int) -> None:
    with refused_with(ConfigError, num_frames, num_scenes, columns):
        scene_frames(num_scenes, num_frames, columns)


def test_previews_come_from_the_middle_of_their_scenes(shared_bundle: Path) -> None:
    """Latents that differ in one scene alone change its preview alone; each is the last frame of a first window."""
    bundle = open_bundle(shared_bundle)
    load, model = OnnxRuntimeLoader(bundle), bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size("9s")))
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    before = preview_frames(bundle, load, latents)
    assert before.shape == (3, model.height, model.width, 3) and before.dtype == np.uint8
    other = latents.copy()
    other[:, 13:25] *= -1
    after = preview_frames(bundle, load, other)
    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [False, True, False]
    first = next(decode(bundle, load, latents[:, 6:]))
    np.testing.assert_array_equal(before[0], first[-1])
