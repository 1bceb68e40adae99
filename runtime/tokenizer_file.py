"""Validates `tokenizer.json` against a schema before the tokenizers library reads it.

With some files, the library aborts the process or exhausts the memory: a damaged character map, replacements that
lengthen the text, an unknown token that does not exist. The schema accepts what T5's tokenizers and ours consist of: a
Unigram model, and normalizers that lengthen a text by a small factor at most.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from tokenizers import Tokenizer

MAX_FILE_BYTES = 32 << 20  # twice the size of mT5's, which has 250,000 pieces
_MAX_REPLACEMENT_BYTES = 64  # of one character; the longest of NFKC has 33

# The patterns of the public T5 tokenizers and ours. None matches the empty string, none backtracks.
_Pattern = Literal[r"\s+", " {2,}"]


class _Precompiled(Struct, tag="Precompiled"):
    precompiled_charsmap: str


class _Nfkc(Struct, tag="NFKC"):
    pass


class _Strip(Struct, tag="Strip"):
    pass


class _Regex(Struct, rename={"regex": "Regex"}):
    regex: _Pattern


class _Replace(Struct, tag="Replace"):
    pattern: _Regex
    content: Annotated[str, Meta(max_length=1)]


class _Sequence(Struct, tag="Sequence"):
    normalizers: Annotated[list["_Normalizer"], Meta(max_length=8)]


_Normalizer = _Precompiled | _Nfkc | _Strip | _Replace | _Sequence


class _WhitespaceSplit(Struct, tag="WhitespaceSplit"):
    pass


class _Metaspace(Struct, tag="Metaspace"):
    pass


class _PreTokenizers(Struct, tag="Sequence"):
    pretokenizers: Annotated[list[_WhitespaceSplit | _Metaspace], Meta(max_length=8)]


class _Unigram(Struct):
    unk_id: Annotated[int, Meta(ge=0)]
    vocab: Annotated[list[tuple[str, float]], Meta(min_length=1, max_length=1 << 20)]
    type: Literal["Unigram"] = "Unigram"


class _AddedToken(Struct):
    id: Annotated[int, Meta(ge=0, lt=1 << 21)]
    content: Annotated[str, Meta(min_length=1, max_length=256)]


class _File(Struct):
    model: _Unigram
    added_tokens: list[_AddedToken]
    normalizer: _Normalizer | None = None
    pre_tokenizer: _WhitespaceSplit | _Metaspace | _PreTokenizers | None = None


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`. Raises OSError, or ValueError with the reason why it is not a T5 tokenizer."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    return parse_tokenizer(content)


def parse_tokenizer(content: bytes) -> Tokenizer:
    """As `read_tokenizer`, for the content of a file."""
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"is over {MAX_FILE_BYTES >> 20} MiB")
    try:
        parsed = msgspec.json.decode(content, type=_File)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if parsed.model.unk_id >= len(parsed.model.vocab):
        raise ValueError(f"unk_id is {parsed.model.unk_id}, the vocabulary has {len(parsed.model.vocab)} pieces")
    for normalizer in _flat(parsed.normalizer):
        if isinstance(normalizer, _Precompiled):
            _check_character_map(normalizer.precompiled_charsmap)
    tokenizer = Tokenizer.from_str(content.decode())
    # Every id is a row of the text encoder's embedding.
    ids = tokenizer.get_vocab().values()
    if sorted(ids) != list(range(len(ids))):
        raise ValueError(f"the ids of its {len(ids)} tokens are not 0 … {len(ids) - 1}")
    return tokenizer


def _flat(normalizer: _Normalizer | None) -> Iterator[_Normalizer]:
    if isinstance(normalizer, _Sequence):
        for part in normalizer.normalizers:
            yield from _flat(part)
    elif normalizer is not None:
        yield normalizer


def _check_character_map(encoded: str) -> None:
    """Raises ValueError unless every lookup in SentencePiece's `precompiled_charsmap` stays inside it.

    The map is the trie's size in bytes as uint32, the trie, and replacements that each end with a zero byte. The trie
    is a double array of uint32 units (Darts-clone): a unit at p points, for a byte c, to p ^ offset ^ c. With bit 8 set
    it also points to a value at p ^ offset, which is the position of a replacement.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"precompiled_charsmap is not base64 ({error})") from error
    size = int.from_bytes(data[:4], "little")
    replacements = np.frombuffer(data[4 + size :], np.uint8)
    if not size or size % 4 or not len(replacements) or replacements[-1]:
        raise ValueError(f"precompiled_charsmap is damaged: {len(data)} bytes, of which its trie takes {size}")
    longest = int(np.diff(np.flatnonzero(replacements == 0), prepend=-1).max())
    if longest > _MAX_REPLACEMENT_BYTES:
        raise ValueError(f"precompiled_charsmap replaces a character by {longest} bytes")
    bytes(replacements).decode()
    units = np.frombuffer(data[4 : 4 + size], "<u4")
    inner = np.flatnonzero(units >> 31 == 0)
    links = units[inner]
    targets = inner ^ ((links >> 10) << ((links & (1 << 9)) >> 6)).astype(np.int64)
    values = units[targets[(links & (1 << 8)) != 0] % len(units)] & ((1 << 31) - 1)
    if (targets | 0xFF).max(initial=0) >= len(units) or values.max(initial=0) >= len(replacements):
        raise ValueError("precompiled_charsmap is damaged: its trie points outside it")
    if ((replacements[values] & 0xC0) == 0x80).any():
        raise ValueError("precompiled_charsmap is damaged: a replacement starts inside a character")
