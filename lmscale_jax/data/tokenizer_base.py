"""The interface of all tokenizers, and the base of those with byte-level BPE.

A tokenizer is its `definition`, a small JSON object: that is what is saved, and its hash is the
`fingerprint` that ties shards to the tokenizer that wrote them.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.files import atomic_write

FILE_NAME = "tokenizer.json"


class TokenIds(NamedTuple):
    """What a model must know of the ids that it reads.

    Attributes:
        vocab_size: number of ids, the boundary token included; 0: not known.
        boundary: id of the token before every document; None: there is none.
    """

    vocab_size: int
    boundary: int | None


def token_ids_of(holder) -> TokenIds:
    """Returns the ids of a tokenizer, or of prepared data."""
    return TokenIds(holder.vocab_size, holder.boundary)


class Tokenizer:
    """The interface of a tokenizer.

    Attributes:
        name: "bytes", "char", "bpe" or "hf".
        vocab_size: number of ids, the boundary token included.
        boundary: id of the token that is put before every document, or None. No text is ever
            encoded to it, so no document can forge a boundary.
        token_bytes: int32 [vocab_size], UTF-8 bytes that each id stands for; 0 for the boundary.
        piecewise: whether encoding the `pieces` of a text one by one gives the ids of the text.
    """

    name: str
    vocab_size: int
    boundary: int | None
    token_bytes: np.ndarray
    piecewise: bool = True

    def definition(self) -> dict:
        """Returns what is needed to rebuild this tokenizer, as JSON values."""
        return {"name": self.name}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encodes each text to int32 [tokens], without the boundary token."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Decodes ids to text; boundaries vanish, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` into an existing directory."""
        atomic_write(Path(directory) / FILE_NAME, self._json())

    def _json(self) -> str:
        return json.dumps(self.definition(), sort_keys=True)


class ByteLevel(Tokenizer):
    """Byte-level BPE.

    Subclasses set `_library`, a tokenizer of the tokenizers package, and `_bytes_of`, a list of the
    bytes that each id stands for.
    """

    def encode_batch(self, texts):
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids):
        return b"".join(self._bytes_of[i] for i in np.asarray(ids)).decode(errors="replace")


def byte_of_letter() -> dict[str, int]:
    """Maps the 256 letters in which byte-level BPE spells its vocabulary to their bytes.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, have the letters
    from U+0100 on.
    """
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    other_bytes = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(letters[len(printable) :], other_bytes, strict=True))
