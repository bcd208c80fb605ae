"""The tokenizers that need no download (UTF-8 bytes, characters, byte-level BPE), and their loader.

The boundary token, where there is one, is the last id.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.data.hf_tokenizers import HFTokenizer
from lmscale_jax.data.tokenizer_base import FILE_NAME, ByteLevel, Tokenizer, byte_of_letter
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json

_PIECE_CHARACTERS = 100_000
# A word never ends in white space, so every word that is being read ends at such a place; and the
# words before it do not depend on what comes after it.
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n])")


class Bytes(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text; 256 is the boundary token."""

    name = "bytes"
    vocab_size = 257
    boundary = 256

    def __init__(self):
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids):
        ids = np.asarray(ids)
        return ids[ids != self.boundary].astype(np.uint8).tobytes().decode(errors="replace")


class Chars(Tokenizer):
    """One id per character of the source, in sorted order; no boundary token.

    This is the tokenizer of nanoGPT's shakespeare_char, id for id.
    """

    name = "char"
    boundary = None

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self._code_points = _code_points(self.characters)
        self.token_bytes = np.array([len(c.encode()) for c in self.characters], np.int32)

    def definition(self):
        return {"name": self.name, "characters": self.characters}

    def encode_batch(self, texts):
        """Encodes each text to int32 [tokens].

        Raises:
            InputError: a text has a character that the source did not have.
        """
        return [self._encode(text) for text in texts]

    def decode(self, ids):
        return "".join(self.characters[i] for i in np.asarray(ids))

    def _encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points)
        in_vocab = self._code_points[np.minimum(ids, self.vocab_size - 1)] == points
        if not in_vocab.all():
            character = text[int(np.argmin(in_vocab))]
            raise InputError(
                f"data.tokenizer=char: the character {character!r} (U+{ord(character):04X}) does "
                f"not occur in the source, so it has no id; use data.tokenizer=bytes or bpe"
            )
        return ids.astype(np.int32)


class BytePairs(ByteLevel):
    """Byte-level BPE: 256 single bytes, then merges, then the boundary token.

    There is no normalizer and every byte has an id, so decoding restores any text exactly. Words
    are split as GPT-2 splits them, and merges stay inside words.
    """

    name = "bpe"

    def __init__(self, vocab: list[str], merges: list[list[str]]):
        self.vocab, self.merges = vocab, merges
        self.boundary = len(vocab)
        self.vocab_size = len(vocab) + 1
        byte_of = byte_of_letter()
        self._bytes_of = [bytes(byte_of[letter] for letter in entry) for entry in vocab] + [b""]
        self.token_bytes = np.array([len(b) for b in self._bytes_of], np.int32)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BytePairs":
        """Learns `vocab_size` entries, the boundary token included; deterministic in the texts.

        Raises:
            InputError: the texts run out of pairs to merge before that.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.train_from_iterator(texts, trainer)
        model = json.loads(library.to_str())["model"]
        tokenizer = cls(sorted(model["vocab"], key=model["vocab"].get), model["merges"])
        if tokenizer.vocab_size < vocab_size:
            raise InputError(
                f"data.vocab_size={vocab_size}: this source is enough for {tokenizer.vocab_size} "
                f"entries only; set data.vocab_size={tokenizer.vocab_size} or give more text"
            )
        return tokenizer

    def definition(self):
        return {"name": self.name, "vocab": self.vocab, "merges": self.merges}

    @functools.cached_property
    def _library(self):
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers

        ids = {entry: i for i, entry in enumerate(self.vocab)}
        library = Library(models.BPE(ids, [tuple(pair) for pair in self.merges]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return library


_CLASSES = {"bytes": Bytes, "char": Chars, "bpe": BytePairs, "hf": HFTokenizer}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Loads the tokenizer that `save` wrote into `directory`.

    Raises:
        InputError: the file is missing or is not a tokenizer's definition.
    """
    path = Path(directory) / FILE_NAME
    try:
        definition = read_json(path)
        name = definition.pop("name")
        if name in _CLASSES:
            return _CLASSES[name](**definition)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable tokenizer ({error}); prepare again") from None
    raise InputError(f"{path}: name={name!r} is not bytes, char, bpe or hf; prepare again")


def pieces(text: str) -> Iterator[str]:
    """Yields a long text in pieces whose ids, joined, are the ids of the text.

    The BPE library takes some 200 bytes of memory for each character of a text.
    """
    start = 0
    while cut := _BETWEEN_WORDS.search(text, start + _PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
