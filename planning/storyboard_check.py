"""What of a storyboard would be cut, or has no graph in a bundle: known before anything is rendered."""

from collections.abc import Iterator

from msgspec import Struct

from ttt_video_engine.planning.bundle_options import export_command
from ttt_video_engine.planning.table import text_table
from ttt_video_engine.runtime.bundle import TOKENIZER, Bundle
from ttt_video_engine.runtime.config import LengthName, length_name
from ttt_video_engine.runtime.errors import ConfigError, printable
from ttt_video_engine.runtime.prompts import without_transitions
from ttt_video_engine.runtime.storyboard import Storyboard
from ttt_video_engine.runtime.tokenizer import SceneTokenizer


class SceneCheck(Struct, frozen=True, kw_only=True):
    """One scene. `starts` and `ends` say where a transition puts a scene token.

    `text_tokens` and `neg_tokens` count scene tokens and `</s>`, before anything is cut; None without a bundle, as are
    the parts that are cut where nothing is.
    """

    scene: int
    starts: bool
    ends: bool
    text_tokens: int | None = None
    neg_tokens: int | None = None
    text_cut: str | None = None
    neg_text_cut: str | None = None


class VideoCheck(Struct, frozen=True, kw_only=True):
    """One video of a storyboard file. What is None depends on a bundle, or there is nothing to say.

    `text_limit` are the tokens that a scene keeps; `problem` says why the bundle cannot render the length.
    """

    name: str
    source: str
    length: LengthName
    seconds: float
    scenes: tuple[SceneCheck, ...]
    text_limit: int | None = None
    problem: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether it is rendered, and whole."""
        cut = any(scene.text_cut is not None or scene.neg_text_cut is not None for scene in self.scenes)
        return self.problem is None and not cut


def check_videos(storyboards: list[Storyboard], bundle: Bundle | None) -> list[VideoCheck]:
    """Raises BundleError where the bundle's tokenizer cannot be read."""
    tokenizer = None if bundle is None else SceneTokenizer.from_file(bundle.path(TOKENIZER))
    return [_check(board, bundle, tokenizer) for board in storyboards]


def report_lines(checks: list[VideoCheck]) -> Iterator[str]:
    """For people: a line for each video and a table of its scenes, then what is wrong with it."""
    for check in checks:
        count = len(check.scenes)
        yield f"{check.name}: {count} scene{'s' * (count > 1)}, {check.length}, {check.seconds:g} s ({check.source})"
        yield from text_table(_rows(check), numbers=(0, 1, 2) if check.text_limit is not None else (0,))
        for scene in check.scenes:
            for field, cut in (("text", scene.text_cut), ("neg_text", scene.neg_text_cut)):
                if cut is not None:
                    yield f'scene {scene.scene}, {field}: cut: "{printable(cut)}"'
        for line in check.warnings:
            yield f"warning: {line}"
        if check.problem is not None:
            yield check.problem


def _check(board: Storyboard, bundle: Bundle | None, tokenizer: SceneTokenizer | None) -> VideoCheck:
    ignored: list[str] = []
    if bundle is not None and bundle.manifest.model.transformer.ttt_kind is None:
        board, ignored = without_transitions(board)
    starts = [number > 0 and scene.requires_scene_transition for number, scene in enumerate(board.scenes)]
    scenes = [
        SceneCheck(scene=number, starts=start, ends=end)
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], False], strict=True), 1)
    ]
    length = length_name(len(scenes))
    limit, problem = None, None
    if bundle is not None and tokenizer is not None:
        limit, problem = _graph(bundle, length)
        if limit is not None:
            scenes = _with_tokens(scenes, board, tokenizer, limit)
    return VideoCheck(
        name=board.name,
        source=board.source,
        length=length,
        seconds=3 * len(scenes),
        scenes=tuple(scenes),
        text_limit=limit,
        problem=problem,
        warnings=(*board.warnings, *ignored),
    )


def _graph(bundle: Bundle, length: LengthName) -> tuple[int | None, str | None]:
    """Tokens that a scene keeps, and why the bundle cannot render the length."""
    manifest = bundle.manifest
    try:
        limit = manifest.model.clip_size(length).text_length
    except ConfigError as error:
        return None, f"{length}: cannot be exported either: {error}"
    if length in manifest.lengths:
        return limit, None
    command = export_command(manifest.model, manifest.dtype, [length], str(bundle.root), manifest.quantize)
    return limit, f"{length}: the bundle renders {' or '.join(manifest.lengths)}; add it with: {command}"


def _with_tokens(
    scenes: list[SceneCheck], board: Storyboard, tokenizer: SceneTokenizer, limit: int
) -> list[SceneCheck]:
    found = tokenizer.encode(board, limit)
    cut = {(truncation.scene, truncation.field): truncation for truncation in found.truncations}
    checked = []
    for scene, positive, negative in zip(scenes, found.positive, found.negative, strict=True):
        text, neg_text = cut.get((scene.scene, "text")), cut.get((scene.scene, "neg_text"))
        checked.append(
            SceneCheck(
                scene=scene.scene,
                starts=scene.starts,
                ends=scene.ends,
                text_tokens=tokenizer.num_tokens(positive) if text is None else text.num_tokens,
                neg_tokens=tokenizer.num_tokens(negative) if neg_text is None else neg_text.num_tokens,
                text_cut=None if text is None else text.cut_text,
                neg_text_cut=None if neg_text is None else neg_text.cut_text,
            )
        )
    return checked


def _rows(check: VideoCheck) -> Iterator[list[str]]:
    counted = check.text_limit is not None
    yield ["scene", *([f"tokens of {check.text_limit}", "neg_text"] if counted else []), "scene tokens"]
    for scene in check.scenes:
        marks = [name for name, there in (("start", scene.starts), ("end", scene.ends)) if there]
        counts = [str(scene.text_tokens), str(scene.neg_tokens)] if counted else []
        yield [str(scene.scene), *counts, " and ".join(marks) or "-"]
