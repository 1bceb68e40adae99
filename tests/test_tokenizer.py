"""Tokenizers: training, T5's own, and the ids that a storyboard becomes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from messages import names, numbers, refused_with, scene
from tokenizers import Tokenizer

from ttt_video_engine.export.sources.tokenizer import load_t5_tokenizer, tiny_prose, train_tokenizer
from ttt_video_engine.runtime.errors import BundleError, CheckpointError, ConfigError
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.storyboard import Scene, Storyboard, load_storyboards
from ttt_video_engine.runtime.tokenizer import SCENE_END_TOKEN, SCENE_START_TOKEN, SceneTokenizer

EXAMPLES = Path(__file__).parent.parent / "storyboards"
VOCAB_SIZE = 2002
PAD, END, UNKNOWN, SCENE_END, SCENE_START = 0, 1, 2, VOCAB_SIZE - 2, VOCAB_SIZE - 1


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(tiny_prose(), VOCAB_SIZE)


@pytest.fixture(scope="module")
def scene_tokenizer(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> SceneTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return SceneTokenizer.from_file(path)


def storyboard(*scenes: Scene) -> Storyboard:
    return Storyboard("test", scenes, "test.json")


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [PAD] * (length - len(ids))


# Training


def test_trained_tokenizer_has_t5s_shape(trained: Tokenizer) -> None:
    assert trained.get_vocab_size() == VOCAB_SIZE
    tokens = ["<pad>", "</s>", "<unk>", SCENE_END_TOKEN, SCENE_START_TOKEN]
    assert [trained.token_to_id(token) for token in tokens] == [PAD, END, UNKNOWN, SCENE_END, SCENE_START]
    assert sorted(trained.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_training_again_gives_the_same_bytes(trained: Tokenizer) -> None:
    # In another process: hash seeds and thread schedules differ.
    code = (
        "import sys; from ttt_video_engine.export.sources.tokenizer import *;"
        f"sys.stdout.buffer.write(train_tokenizer(tiny_prose(), {VOCAB_SIZE}).to_str().encode())"
    )
    again = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES.parent, capture_output=True, check=True)
    assert again.stdout.decode() == trained.to_str()


def test_text_survives(trained: Tokenizer) -> None:
    text = 'The bear\u2003counts ﬁve eggs:\n"Two + 3 = 5, isn\'t it?" {~}'
    assert trained.decode(ids_of(trained, text)) == 'The bear counts five eggs: "Two + 3 = 5, isn\'t it?" {~}'
    assert UNKNOWN in ids_of(trained, "熊")


def test_ordinary_english_is_short(trained: Tokenizer) -> None:
    text = (
        "In a busy harbour a boy in a yellow raincoat feeds gulls from a paper bag while boats rock behind him. "
        "Suddenly a huge gull steals the whole bag and the boy runs after it along the stone pier, laughing."
    )
    assert len(ids_of(trained, text)) <= 1.5 * len(text.split())


@pytest.mark.parametrize(
    ("vocab_size", "larger"), [(9000, False), (20, True)], ids=["more than there are", "fewer than characters"]
)
def test_prose_that_does_not_fit(vocab_size: int, larger: bool) -> None:
    """What would fit is named as well: fewer tokens than were asked for, or more."""
    with refused_with(ConfigError, "vocab_size", vocab_size) as caught:
        train_tokenizer(tiny_prose(), vocab_size)
    others = set(numbers(str(caught.value))) - {vocab_size}
    assert others and all((number > vocab_size) == larger for number in others)


# Encoding


def test_scene_tokens_stand_at_transitions_only(scene_tokenizer: SceneTokenizer, trained: Tokenizer) -> None:
    scenes = [
        Scene("A bear.", requires_scene_transition=True, neg_text="Dark."),
        Scene("A mouse.", requires_scene_transition=True),
        Scene("A cat."),
    ]
    encoded = scene_tokenizer.encode(storyboard(*scenes), 12)
    bear, mouse, cat, dark = (ids_of(trained, text) for text in ("A bear.", "A mouse.", "A cat.", "Dark."))
    assert encoded.positive.tolist() == [
        padded([*bear, SCENE_END, END], 12),
        padded([SCENE_START, *mouse, END], 12),
        padded([*cat, END], 12),
    ]
    assert encoded.negative.tolist() == [padded([*dark, END], 12), padded([END], 12), padded([END], 12)]
    assert encoded.positive.dtype == encoded.negative.dtype == np.int64
    assert encoded.truncations == ()


def test_truncation_cuts_the_text_and_keeps_the_tokens(scene_tokenizer: SceneTokenizer, trained: Tokenizer) -> None:
    words = "The bear looks at the small grey mouse and the camera moves slowly"
    scenes = [Scene("A."), Scene(words, True, neg_text=words), Scene("B.", True)]
    encoded = scene_tokenizer.encode(storyboard(*scenes), 8)
    ids = ids_of(trained, words)
    assert len(ids) == len(words.split()) == 13
    assert encoded.positive[1].tolist() == [SCENE_START, *ids[:5], SCENE_END, END]
    assert encoded.negative[1].tolist() == [*ids[:7], END]
    text, neg_text = encoded.truncations
    names(text.message, scene(2), "text", 16, 8, '"small grey mouse and the camera moves slowly"')
    names(neg_text.message, scene(2), "neg_text", 14, 8, '"mouse and the camera moves slowly"')


@pytest.mark.parametrize("extra", [0, 1])
def test_truncation_starts_one_token_past_the_limit(
    scene_tokenizer: SceneTokenizer, trained: Tokenizer, extra: int
) -> None:
    ids = ids_of(trained, "The bear looks up")
    encoded = scene_tokenizer.encode(storyboard(Scene("The bear looks up")), len(ids) + 1 - extra)
    assert len(encoded.truncations) == extra
    assert encoded.positive[0, -1] == END


def test_message_of_a_long_cut_is_one_short_line(scene_tokenizer: SceneTokenizer) -> None:
    (truncation,) = scene_tokenizer.encode(storyboard(Scene("The bear\nlooks up. " * 100)), 16).truncations
    assert "\n" not in truncation.message and len(truncation.message) < 200
    assert len(truncation.cut_text) > 1000


@pytest.mark.parametrize("token", ["<pad>", "</s>", SCENE_END_TOKEN, SCENE_START_TOKEN])
def test_control_tokens_in_prose_mean_nothing(scene_tokenizer: SceneTokenizer, trained: Tokenizer, token: str) -> None:
    encoded = scene_tokenizer.encode(storyboard(Scene(f"A bear {token} in{token} a boat")), 16)
    assert encoded.positive[0].tolist() == padded([*ids_of(trained, "A bear in a boat"), END], 16)
    only = scene_tokenizer.encode(storyboard(Scene(token)), 16)
    assert set(only.positive[0, 1:].tolist()) == {PAD} and only.truncations == ()


def test_examples_fit_the_tiny_preset(scene_tokenizer: SceneTokenizer) -> None:
    lengths = tiny("linear").text_lengths
    for path in sorted(EXAMPLES.glob("*.json*")):
        for board in load_storyboards(path):
            encoded = scene_tokenizer.encode(board, lengths[path.stem.rpartition("-")[2]])
            assert encoded.truncations == ()
            assert UNKNOWN not in encoded.positive and UNKNOWN not in encoded.negative


# Files


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_unreadable_tokenizer_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with refused_with(BundleError, path):
        SceneTokenizer.from_file(path)


def without_scene_tokens(trained: Tokenizer, folder: Path) -> Path:
    """T5's folder as Hugging Face holds it: the trained tokens alone."""
    content = json.loads(trained.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_tokenizer_file_without_scene_tokens(trained: Tokenizer, tmp_path: Path) -> None:
    path = without_scene_tokens(trained, tmp_path)
    with refused_with(BundleError, path, "<end_scene>", "<start_scene>", "export"):
        SceneTokenizer.from_file(path)


# T5 from Hugging Face


def test_t5_from_tokenizer_json(trained: Tokenizer, tmp_path: Path) -> None:
    without_scene_tokens(trained, tmp_path)
    assert load_t5_tokenizer(tmp_path, VOCAB_SIZE).to_str() == trained.to_str()


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_t5_from_sentencepiece(sentencepiece_folder: Path) -> None:
    from transformers import T5Tokenizer

    # 500 pieces and T5's 100 extra ids, as the real one has 32000 and 100.
    tokenizer = load_t5_tokenizer(sentencepiece_folder, 602)
    assert [tokenizer.token_to_id(token) for token in (SCENE_END_TOKEN, SCENE_START_TOKEN)] == [600, 601]
    text = "The bear looks at the ﬁsh  and a mouse."
    expected = T5Tokenizer.from_pretrained(sentencepiece_folder, local_files_only=True)(text).input_ids
    encoded = SceneTokenizer(tokenizer).encode(storyboard(Scene(text), Scene(text, True)), 64)
    assert encoded.positive[0].tolist() == padded([*expected[:-1], 600, END], 64)
    assert encoded.positive[1].tolist() == padded([601, *expected], 64)


def test_sentencepiece_ids_are_sentencepieces_own(sentencepiece_folder: Path) -> None:
    processor = spm.SentencePieceProcessor(model_file=str(sentencepiece_folder / "spiece.model"))
    tokenizer = load_t5_tokenizer(sentencepiece_folder, 602)
    for text in ("The bear looks at the ﬁsh  and a mouse.", "Ｆull width, ½ and “quotes”…", tiny_prose()[:2000]):
        assert ids_of(tokenizer, text) == processor.encode(text)


def test_t5_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with refused_with(CheckpointError, tmp_path, "tokenizer.json", "spiece.model"):
        load_t5_tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_t5_folder_with_a_damaged_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not\na tokenizer")
    with refused_with(CheckpointError, tmp_path / name):
        load_t5_tokenizer(tmp_path, VOCAB_SIZE)


def test_t5_of_another_size(trained: Tokenizer, tmp_path: Path) -> None:
    path = without_scene_tokens(trained, tmp_path)
    with refused_with(CheckpointError, path, 2000, 32100, "vocab_size", 32102):
        load_t5_tokenizer(tmp_path, 32102)


def test_t5_with_scene_tokens_already(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    with refused_with(CheckpointError, tmp_path / "tokenizer.json", "<end_scene>"):
        load_t5_tokenizer(tmp_path, VOCAB_SIZE)
