"""Tokenizers for bundles: one trained on the package's prose for small vocabularies, T5's for the full model.

Both use the ids of T5's control tokens: `<pad>` 0, `</s>` 1 and `<unk>` 2. The last two ids are the scene tokens: scene
end, then scene start.
"""

import math
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ttt_video_engine.runtime.errors import CheckpointError, ConfigError
from ttt_video_engine.runtime.tokenizer import END_TOKEN, PAD_TOKEN, SCENE_END_TOKEN, SCENE_START_TOKEN
from ttt_video_engine.runtime.tokenizer_file import read_tokenizer

_CONTROL_TOKENS = (PAD_TOKEN, END_TOKEN, "<unk>")
_NUM_SCENE_TOKENS = 2
_ASCII = [chr(code) for code in range(ord("!"), ord("~") + 1)]


def tiny_prose() -> str:
    """The package's prose. The tokenizer of the small presets is trained on it."""
    return resources.files("ttt_video_engine.export.sources").joinpath("prose.txt").read_text(encoding="utf-8")


def train_tokenizer(prose: str, vocab_size: int) -> Tokenizer:
    """A Unigram tokenizer of exactly `vocab_size` tokens, scene tokens included. The same prose gives the same file.

    Pieces are chosen by byte-pair merges and scored by their frequency in the prose. The library's own Unigram trainer
    sums in random order, so its file differs between runs. Raises ConfigError if the prose does not yield `vocab_size`
    tokens.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    wanted = vocab_size - len(_CONTROL_TOKENS) - _NUM_SCENE_TOKENS
    pieces = _frequent_pieces(normalizer.normalize_str(prose), max(wanted, 0))
    if len(pieces) != wanted:
        least = len(_CONTROL_TOKENS) + _NUM_SCENE_TOKENS + len(pieces)
        advice = "give more prose or a smaller vocab_size" if len(pieces) < wanted else f"must be at least {least}"
        raise ConfigError(f"vocab_size is {vocab_size}, but the prose yields {least} tokens: {advice}")
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in _CONTROL_TOKENS), *pieces], unk_id=2))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _CONTROL_TOKENS])
    return _with_scene_tokens(tokenizer)


def load_t5_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """T5's tokenizer from a Hugging Face folder, from `tokenizer.json` or `spiece.model`, with the scene tokens added.

    `vocab_size` is that of the text encoder, scene tokens included: 32102 for T5 v1.1. Raises CheckpointError if the
    files are missing, damaged, not T5's, or have another vocabulary size.
    """
    if (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        load = read_tokenizer
    elif (folder / "spiece.model").is_file():
        source = folder / "spiece.model"
        load = _from_sentencepiece
    else:
        raise CheckpointError(f"{folder}: holds neither tokenizer.json nor spiece.model; give T5's tokenizer folder")
    try:
        tokenizer = load(source)
    # The libraries raise plain Exception, with messages of several lines.
    except Exception as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{source}: not a T5 tokenizer ({cause}); download it again") from error
    for token_id, token in enumerate(_CONTROL_TOKENS):
        if tokenizer.token_to_id(token) != token_id:
            found = tokenizer.token_to_id(token)
            raise CheckpointError(f"{source}: {token} is {found}, must be {token_id}; give T5's tokenizer")
    for token in (SCENE_END_TOKEN, SCENE_START_TOKEN):
        if tokenizer.token_to_id(token) is not None:
            raise CheckpointError(f"{source}: already holds {token}; give T5's tokenizer as published")
    found, wanted = tokenizer.get_vocab_size(), vocab_size - _NUM_SCENE_TOKENS
    if found != wanted:
        raise CheckpointError(f"{source}: has {found} tokens, must have {wanted} for vocab_size {vocab_size}")
    return _with_scene_tokens(tokenizer)


def _frequent_pieces(prose: str, count: int) -> list[tuple[str, float]]:
    """Pieces with their log probabilities: printable ASCII, the prose's other characters, its most frequent merges.

    Returns `count` pieces: fewer if the prose has no more merges, more if it has too many distinct characters.
    """
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=_ASCII, show_progress=False)
    tokenizer.train_from_iterator([prose], trainer)
    words = Counter(word for word, _ in split.pre_tokenize_str(prose))
    # Occurrences inside longer pieces count too. One is added so that no frequency is zero.
    frequency = {piece: 1 + sum(n * word.count(piece) for word, n in words.items()) for piece in tokenizer.get_vocab()}
    total = sum(frequency.values())
    ordered = sorted(frequency, key=lambda piece: (-frequency[piece], piece))
    # Rounded, because the library's JSON reader changes the last bit of longer decimals.
    return [(piece, round(math.log(frequency[piece] / total), 6)) for piece in ordered]


_CONVERT = """
import sys
from transformers import T5Tokenizer
tokenizer = T5Tokenizer.from_pretrained(sys.argv[1], local_files_only=True).backend_tokenizer
open(sys.argv[2], "w", encoding="utf-8").write(tokenizer.to_str())
"""


def _from_sentencepiece(path: Path) -> Tokenizer:
    """Converts the file with transformers, in a subprocess because some damaged files crash it.

    Raises ValueError if the conversion fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "tokenizer.json"
        # -P: Python imports no module from the working directory.
        command = [sys.executable, "-P", "-c", _CONVERT, str(path.parent.absolute()), str(converted)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
            raise ValueError(f"transformers cannot convert it: {last[0]}")
        return read_tokenizer(converted)


def _with_scene_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Adds the two scene tokens after all others. With `normalized=False` only their exact spelling matches."""
    scene_tokens = (SCENE_END_TOKEN, SCENE_START_TOKEN)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in scene_tokens])
    return tokenizer
