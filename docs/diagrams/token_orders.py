"""Draws `token-orders.svg` from the index tables of the reference: `python docs/diagrams/token_orders.py`.

The clip is small enough to show every token: 3 scenes, 2 text tokens a scene, 2 patches a frame, mini-batches of 4.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.runtime.config import TransformerConfig

TARGET = Path(__file__).with_name("token-orders.svg")

CELL, GAP, LEFT, TOP = 27, 2, 16, 44
ROW_HEIGHT = 92
SCENE_COLOURS = ("#4c78a8", "#f58518", "#54a24b")
PREFIX_COLOUR = "#8a8a8a"

CONFIG = TransformerConfig(
    ttt="linear",
    model_dim=16,
    num_heads=1,
    num_layers=1,
    text_dim=16,
    time_embed_dim=16,
    mini_batch_size=4,
    ttt_base_lr=1.0,
    attn_length=4,
)
LAYOUT = TokenLayout(config=CONFIG, num_scenes=3, text_length=2, num_frames=13, height=1, width=2)


def draw() -> str:
    """The whole picture as SVG."""
    standard = list(range(LAYOUT.num_tokens))
    interleaved = LAYOUT.interleaved_order.tolist()
    reversed_ = LAYOUT.reversed_order.tolist()
    reversed_interleaved = [reversed_[token] for token in interleaved]
    rows = [
        ("Standard order: text of all scenes, then video. Everything but the TTT scan works in it.", standard, False),
        ("Interleaved order: what the forward scan reads, in mini-batches of 4.", interleaved, True),
        ("Reversed order: text scenes reversed, video tokens reversed.", reversed_, False),
        ("Reversed, then interleaved: what the backward scan reads.", reversed_interleaved, True),
    ]
    width = 2 * LEFT + LAYOUT.num_tokens * (CELL + GAP)
    height = TOP + len(rows) * ROW_HEIGHT + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for number, (title, tokens, scanned) in enumerate(rows):
        y = TOP + number * ROW_HEIGHT
        parts.append(_text(LEFT, y + 14, title, size=13))
        parts.extend(_cells(tokens, y + 22))
        parts.extend(_mini_batches(interleaved if scanned else None, y + 22 + CELL))
    note = (
        "Each bracket is a mini-batch. Learning rates are cut into mini-batches before interleaving: an interleaved "
        "mini-batch uses all the rates of the one that its last token came from."
    )
    parts.append(_text(LEFT, height - 14, note, size=12))
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = LEFT
    for scene, colour in enumerate(SCENE_COLOURS):
        yield f'<rect x="{x}" y="10" width="14" height="14" fill="{colour}"/>'
        yield _text(x + 20, 22, f"scene {scene + 1}", size=12)
        x += 90
    yield f'<rect x="{x}" y="10" width="14" height="14" fill="{PREFIX_COLOUR}"/>'
    yield _text(x + 20, 22, "first frame of the clip (belongs to scene 1)", size=12)
    yield _text(x + 300, 22, "t: text token, number: latent frame of a video token", size=12)


def _cells(tokens: Sequence[int], y: int) -> Iterator[str]:
    for place, token in enumerate(tokens):
        x = LEFT + place * (CELL + GAP)
        label, colour = _appearance(token)
        opacity = "0.45" if label == "t" else "0.9"
        yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="3" fill="{colour}" fill-opacity="{opacity}"/>'
        yield _text(x + CELL / 2, y + 18, label, size=12, anchor="middle")


def _appearance(token: int) -> tuple[str, str]:
    """Label and colour of a token of the standard order."""
    if token < LAYOUT.num_text_tokens:
        return "t", SCENE_COLOURS[token // LAYOUT.text_length]
    frame = (token - LAYOUT.num_text_tokens) // LAYOUT.tokens_per_frame
    if frame < CONFIG.prefix_temporal_length:
        return str(frame), PREFIX_COLOUR
    return str(frame), SCENE_COLOURS[(frame - CONFIG.prefix_temporal_length) // CONFIG.attn_length]


def _mini_batches(interleaved: Sequence[int] | None, y: int) -> Iterator[str]:
    """A bracket under every mini-batch: its number or, in interleaved order, the one whose learning rates it uses."""
    size = CONFIG.mini_batch_size
    for number in range(LAYOUT.num_tokens // size):
        left = LEFT + number * size * (CELL + GAP)
        right = left + size * (CELL + GAP) - GAP
        label = f"{number + 1}"
        if interleaved is not None:
            label = f"rates of {interleaved[number * size + size - 1] // size + 1}"
        yield f'<path d="M{left + 2},{y + 4} v6 H{right - 2} v-6" fill="none" stroke="#444" stroke-width="1.2"/>'
        yield _text((left + right) / 2, y + 24, label, size=11, anchor="middle")


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
