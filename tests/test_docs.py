"""README, CONTRIBUTING and docs/: links, options and pictures match the project."""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ttt_video_engine.commands.group import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DIAGRAMS = ROOT / "docs" / "diagrams"

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}.*)?\n)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
_ABSOLUTE = re.compile(r"[a-z]+:", re.IGNORECASE)
_HEADING = re.compile(r"^#{1,6} +(.+?)#*$", re.MULTILINE)

_PROGRAM = re.compile(r"(?:\S*ttt-video|\S*python cli\.py)\s+")
_OPTION = re.compile(r"(?<![\w.-])--[a-z][\w-]*(?![\w-]*\.)")
"""An option of this project. Options of the public code's sample.py have a dot: `--eval.dtype`."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text("utf-8")


# Links


def links(text: str) -> Iterator[str]:
    """Targets of all relative links of a page."""
    prose = _INLINE.sub("", _INDENTED.sub("\n", _FENCED.sub("", text)))
    for found in _LINK.finditer(prose):
        target = found[1] or found[2]
        if not _ABSOLUTE.match(target):
            yield target


def slugs(text: str) -> set[str]:
    """Anchors of all headings, by GitHub's rule."""
    seen = Counter[str]()
    found = set()
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        label = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", label.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in links(text):
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        exists = target.exists() and target.is_relative_to(ROOT)
        if not exists or (fragment and fragment not in slugs(read(target))):
            broken.append(link)
    return broken


@every_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page, read(page)) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/none.md) [b](docs/plan.md#none) [c](#one-two) [d](docs/plan.md#planning) `[e](none)`\n# One, two\n"
    page = ROOT / "page.md"
    assert slugs(text) == {"one-two"}
    assert list(links(text)) == ["docs/none.md", "docs/plan.md#none", "#one-two", "docs/plan.md#planning"]
    assert broken_links(page, text.replace("[c](#one-two) ", "")) == ["docs/none.md", "docs/plan.md#none"]


# Options


@cache
def options(command: str) -> frozenset[str]:
    """Options of a command, with --help."""
    params = load_command(command).params
    return frozenset(["--help", *(name for param in params for name in (*param.opts, *param.secondary_opts))])


def code(text: str) -> Iterator[str]:
    """Every line of a code block, with its continuation lines, and every piece of inline code."""
    blocks = [block for pattern in (_FENCED, _INDENTED) for block in pattern.findall(text)]
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from _INLINE.findall(_INDENTED.sub("\n", _FENCED.sub("", text)))


def unknown_options(text: str) -> list[str]:
    """Options in the code of a page that do not exist. Code that begins with another program is skipped."""
    any_command = frozenset[str]().union(*map(options, COMMANDS))
    unknown = []
    for piece in code(text):
        line = " ".join(piece.partition(" # ")[0].split())
        program = _PROGRAM.match(f"{line} ")
        arguments = line[program.end() :] if program else line
        first = arguments.partition(" ")[0]
        if program or first in COMMANDS or first.startswith("--"):
            known = options(first) if first in COMMANDS else any_command
            unknown += [f"{first} {option}" for option in _OPTION.findall(arguments) if option not in known]
    return unknown


@every_page
def test_every_option_exists(page: Path) -> None:
    assert unknown_options(read(page)) == []


def test_an_unknown_option_is_found() -> None:
    text = (
        "Text.\n\n    ttt-video sample A \\\n        --bundle B --frames 3\n    pip install --user x\n\n"
        "```\n.venv/bin/ttt-video export --bundle B\n```\n"
        "`--eval.dtype`, `sample --fps`, `--never`, `python cli.py plan --fps`\n"
    )
    assert unknown_options(text) == ["export --bundle", "sample --frames", "--never --never", "plan --fps"]


# Pictures and size


def test_the_picture_of_token_orders_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("token_orders", DIAGRAMS / "token_orders.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(DIAGRAMS / "token-orders.svg") == module.draw(), "run: python docs/diagrams/token_orders.py"


def test_the_architecture_page_has_its_pictures() -> None:
    page = ROOT / "docs" / "architecture.md"
    kinds = re.findall(r"^```mermaid\n(\w+)", read(page), re.MULTILINE)
    assert kinds == ["flowchart", "flowchart", "flowchart", "sequenceDiagram"]  # layers, data, a render, an export
    assert "diagrams/token-orders.svg" in links(read(page))


def test_the_readme_is_short() -> None:
    assert len(read(README).splitlines()) < 200
