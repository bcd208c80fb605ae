"""Tokenizers behind one interface: UTF-8 bytes, characters, and byte-level BPE.

A tokenizer is its `definition`, a small JSON object: that is what is saved, and its hash is the
`fingerprint` that ties shards to the tokenizer that wrote them. The document mark, where there is
one, is the last id: text can never spell it, so no document can forge a boundary.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError

FILE_NAME = "tokenizer.json"
_PIECE_CHARACTERS = 100_000
# A word never ends in white space, so one always ends here; and the words before this place do not
# depend on what comes after it.
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer:
    """What every tokenizer offers.

    Attributes:
        name: "bytes", "char", "bpe" or "hf".
        vocab_size: number of ids, the document mark included.
        boundary: id of the mark that is put before every document, or None.
        token_bytes: int32 [vocab_size], UTF-8 bytes that each id stands for; 0 for the mark.
        cuttable: the ids of `pieces` of a text joined are the ids of the text.
    """

    name: str
    vocab_size: int
    boundary: int | None
    token_bytes: np.ndarray
    cuttable: bool = True

    def definition(self) -> dict:
        """All that is needed to build this tokenizer again, as JSON."""
        return {"name": self.name}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], without the document mark."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of `ids`; marks vanish, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` into an existing directory."""
        (Path(directory) / FILE_NAME).write_text(self._json(), encoding="utf-8")

    def _json(self) -> str:
        return json.dumps(self.definition(), sort_keys=True)


class Bytes(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text; 256 is the document mark."""

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
    """One id per character of the source, in sorted order; no document mark.

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
        """As for every tokenizer.

        Raises:
            InputError: a text has a character that the source did not have.
        """
        return [self._encode(text) for text in texts]

    def decode(self, ids):
        return "".join(self.characters[i] for i in np.asarray(ids))

    def _encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points)
        known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            character = text[int(np.argmin(known))]
            raise InputError(
                f"data.tokenizer=char: the character {character!r} (U+{ord(character):04X}) does "
                f"not occur in the source, so it has no id; use data.tokenizer=bytes or bpe"
            )
        return ids.astype(np.int32)


class ByteLevel(Tokenizer):
    """What byte-level BPE has in common: `_library` of the tokenizers package, and `_bytes_of`, the
    bytes that each id stands for."""

    def encode_batch(self, texts):
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids):
        return b"".join(self._bytes_of[i] for i in np.asarray(ids)).decode(errors="replace")


class BytePairs(ByteLevel):
    """Byte-level BPE: 256 single bytes, then merges, then the document mark.

    There is no normalizer and every byte has an id, so decoding gives back any text exactly. Words
    are cut as GPT-2 cuts them, and merges stay inside words.
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
        """Learns `vocab_size` entries, the document mark included; the same texts, the same merges.

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


def load(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`.

    Raises:
        InputError: the file is missing or is not a tokenizer's definition.
    """
    path = Path(directory) / FILE_NAME
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        match definition.pop("name"):
            case "bytes":
                return Bytes()
            case "char":
                return Chars(**definition)
            case "bpe":
                return BytePairs(**definition)
            case "hf":
                from lmscale_jax.data.pretrained import Pretrained

                return Pretrained(**definition)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable tokenizer ({error}); prepare again") from None
    raise InputError(f"{path}: neither bytes, char, bpe nor hf; prepare again")


def pieces(text: str) -> Iterator[str]:
    """Cuts a long text where it makes no difference: the pieces' ids joined are the text's ids.

    The BPE library takes some 200 bytes of memory for each character that it is given at once.
    """
    start = 0
    while cut := _BETWEEN_WORDS.search(text, start + _PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def byte_of_letter() -> dict[str, int]:
    """The byte behind each of the 256 letters in which byte-level BPE spells its vocabulary.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, got the letters
    from U+0100 on.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    hidden = sorted(set(range(256)) - set(plain.values()))
    return plain | dict(zip(letters[len(plain) :], hidden, strict=True))
