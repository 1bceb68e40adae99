"""`tokenizer.json` from elsewhere: nothing in it ends the process, takes all memory or raises what is not ours.

Without the schema the tokenizers library panics, aborts or takes all memory for about half of `CHANGES`, refuses some
itself, and takes the rest as tokenizers that are not T5's.
"""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm

from ttt_video_engine.export.sources.tokenizer import load_t5_tokenizer, tiny_prose, train_tokenizer
from ttt_video_engine.runtime.errors import BundleError, CheckpointError
from ttt_video_engine.runtime.storyboard import MAX_TEXT, Scene, Storyboard
from ttt_video_engine.runtime.tokenizer import SceneTokenizer
from ttt_video_engine.runtime.tokenizer_file import MAX_FILE_BYTES

Content = dict[str, Any]
BOARD = Storyboard("a", (Scene("A bear ﬁnds ½ a fish\x01 熊 é."), Scene("")), "a.json")


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer(tiny_prose(), 2002).to_str()


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_prose().splitlines()),
        model_prefix=str(folder / "spiece"),
        vocab_size=500,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module")
def character_map(t5_folder: Path) -> bytes:
    """SentencePiece's own, of NFKC."""
    content = json.loads(load_t5_tokenizer(t5_folder, 602).to_str())
    return base64.b64decode(content["normalizer"]["precompiled_charsmap"])


def refusal(folder: Path, content: str | bytes) -> str:
    """Why a tokenizer is refused, both in a bundle and in a checkpoint."""
    path = folder / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError) as of_bundle:
        SceneTokenizer.from_file(path)
    with pytest.raises(CheckpointError) as of_checkpoint:
        load_t5_tokenizer(folder, 2002)
    for caught in (of_bundle, of_checkpoint):
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(path))
    return str(of_bundle.value)


def replaced(**parts: object) -> Callable[[Content], object]:
    return lambda content: content.update(parts)


def model_with(**parts: object) -> Callable[[Content], object]:
    return lambda content: content["model"].update(parts)


def replace_by(pattern: object, content: str) -> Content:
    return {"type": "Replace", "pattern": pattern, "content": content}


def character_map_of(data: bytes) -> Callable[[Content], object]:
    return replaced(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()})


CHANGES: dict[str, Callable[[Content], object]] = {
    "no model": replaced(model=None),
    "model of a kind that is not T5's": model_with(type="BPE", merges=[]),
    "no unknown token": model_with(unk_id=None),
    "unknown token beyond the vocabulary": model_with(unk_id=10**9),
    "vocabulary of no pieces": model_with(vocab=[]),
    "added tokens that are no list": replaced(added_tokens={}),
    "added token with a huge id": lambda content: content["added_tokens"][3].update(id=2**32 - 1),
    "a piece twice, so that an id is missing": lambda content: content["model"]["vocab"][9].__setitem__(0, "e"),
    "character map that is not base64": replaced(normalizer={"type": "Precompiled", "precompiled_charsmap": "@"}),
    "character map that is empty": character_map_of(b""),
    "character map whose trie is said to have 4 GB": character_map_of(b"\xff\xff\xff\xff" + bytes(100)),
    "pattern that backtracks": replaced(normalizer=replace_by({"Regex": "(a+)+$"}, "")),
    "replacements that multiply": replaced(
        normalizer={"type": "Sequence", "normalizers": [replace_by({"Regex": "."}, "x" * 16)] * 7}
    ),
    "text put before": replaced(normalizer={"type": "Prepend", "prepend": "x" * 1000}),
    "pre-tokenizer of another kind": replaced(pre_tokenizer={"type": "ByteLevel"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_no_t5_tokenizer_is_refused(trained: str, tmp_path: Path, change: str) -> None:
    content = json.loads(trained)
    CHANGES[change](content)
    refusal(tmp_path, json.dumps(content))


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b'"a"', b"\xff", b"[" * 10**6, b'{"a":' * 10**6])
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    refusal(tmp_path, content)


def test_a_file_over_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=f"{MAX_FILE_BYTES >> 20} MiB"):
        SceneTokenizer.from_file(path)


def test_a_replacement_that_is_too_long_is_refused(trained: str, tmp_path: Path, character_map: bytes) -> None:
    content = json.loads(trained)
    character_map_of(character_map + b"x" * 1000 + b"\0")(content)
    assert "1001 bytes" in refusal(tmp_path, json.dumps(content))


def test_a_damaged_character_map_is_refused_or_harmless(
    trained: str, tmp_path: Path, character_map: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the check two in five of these end in a panic while a text is encoded."""
    content = json.loads(trained)
    size = int.from_bytes(character_map[:4], "little")
    path = tmp_path / "tokenizer.json"
    chance = random.Random(0)
    refused = 0
    for trial in range(40):
        damaged = bytearray(character_map)
        for _ in range((1, 50, 5000)[trial % 3]):
            damaged[4 + chance.randrange(size)] = chance.randrange(256)
        character_map_of(bytes(damaged))(content)
        path.write_text(json.dumps(content))
        try:
            SceneTokenizer.from_file(path).encode(BOARD, 40)
        except BundleError:
            refused += 1
    assert refused > 10
    assert "panicked" not in capfd.readouterr().err


def test_what_a_file_puts_around_a_text_does_nothing(trained: str, tmp_path: Path) -> None:
    content = json.loads(trained)
    path = tmp_path / "tokenizer.json"
    path.write_text(trained)
    expected = SceneTokenizer.from_file(path).encode(BOARD, 20)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"z": {"id": "z", "ids": [7], "tokens": ["z"]}},
    }
    path.write_text(json.dumps(content))
    assert SceneTokenizer.from_file(path).encode(BOARD, 20).positive.tolist() == expected.positive.tolist()


def test_the_files_of_t5_and_of_ours_are_taken(trained: str, t5_folder: Path, tmp_path: Path) -> None:
    for index, content in enumerate((trained, load_t5_tokenizer(t5_folder, 602).to_str())):
        path = tmp_path / f"{index}.json"
        path.write_text(content)
        longest = Storyboard("a", (Scene("é " * (MAX_TEXT // 2)),), "a.json")
        assert len(SceneTokenizer.from_file(path).encode(longest, 20).truncations) == 1


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_damaged_sentencepiece_file_is_refused(
    t5_folder: Path, tmp_path: Path, character_map: bytes, size: int
) -> None:
    """Read in this process, the first ends it with a panic and the second with an abort."""
    content = (t5_folder / "spiece.model").read_bytes()
    assert character_map[:200] in content
    (tmp_path / "spiece.model").write_bytes(
        content.replace(character_map[:200], size.to_bytes(4, "little") + character_map[4:200])
    )
    with pytest.raises(CheckpointError) as caught:
        load_t5_tokenizer(tmp_path, 602)
    assert str(caught.value).startswith(f"{tmp_path / 'spiece.model'}: ") and "\n" not in str(caught.value)
