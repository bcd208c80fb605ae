"""Published tokenizers as Hugging Face saves them, read from a local directory.

Reads byte-level BPE (GPT-2, Llama 3, Qwen and others) and SentencePiece's BPE with byte fallback
(Llama 2, Mistral); refuses other kinds. Downloads nothing and runs no code of the directory.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from lmscale_jax.data.tokenizer_base import ByteLevel, byte_of_letter
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json

FAST, VOCAB, MERGES, SETTINGS = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
)  # fmt: skip

SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
# One space before every text, and U+2581 for each.
_NORMALIZED = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


class HFTokenizer(ByteLevel):
    """A published tokenizer. Its boundary token is the `bos_token`, else the `eos_token`.

    Text that spells a special token is encoded as text, so no document can forge a boundary.

    SentencePiece writes spaces as U+2581 and puts one before every document. `decode` removes that
    one, and the boundary token counts for -1 byte: the bytes of a document are those of its text.
    A U+2581 of the text itself is decoded to a space.

    Args:
        library: the definition, as the tokenizers library writes it to JSON.
        boundary: text of the boundary token.
    """

    name = "hf"
    # Other split patterns than GPT-2's may join words that `pieces` would separate.
    piecewise = False

    def __init__(self, library: dict, boundary: str):
        from tokenizers import Tokenizer as Library

        self._definition = {"library": library, "boundary": boundary}
        self._sentencepiece = is_sentencepiece(library)
        self._library = Library.from_str(json.dumps(library))
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self.boundary = self._library.token_to_id(boundary)
        self.token_bytes = np.array([len(b) for b in self._bytes_of], np.int32)
        if self._sentencepiece and self.boundary is not None:
            self.token_bytes[self.boundary] = -1

    def definition(self):
        return {"name": self.name} | self._definition

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of each id; none for special tokens and for ids without an entry."""
        bytes_of = [b""] * self.vocab_size
        byte_of = {} if self._sentencepiece else byte_of_letter()
        added = self._library.get_added_tokens_decoder()
        for entry, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in added:
                bytes_of[i] = b"" if added[i].special else entry.encode()
            elif not self._sentencepiece:
                bytes_of[i] = bytes(byte_of[letter] for letter in entry)
            elif match := _BYTE.fullmatch(entry):
                bytes_of[i] = bytes([int(match[1], 16)])
            else:
                bytes_of[i] = entry.replace(SPACE, " ").encode()
        return bytes_of

    def decode(self, ids):
        if not self._sentencepiece:
            return super().decode(ids)
        ids = np.asarray(ids)
        starts = np.flatnonzero(ids == self.boundary)
        texts = [super(HFTokenizer, self).decode(part) for part in np.split(ids, starts)]
        # The ids before the first boundary are the middle of a document.
        return texts[0] + "".join(text.removeprefix(" ") for text in texts[1:])


def is_sentencepiece(library: dict) -> bool:
    """Tells whether a definition is SentencePiece's BPE with byte fallback."""
    return library["model"]["type"] == "BPE" and bool(library["model"].get("byte_fallback"))


def tokenizer_files(directory: Path) -> list[Path]:
    """Lists the files of the tokenizer in a directory; [] where there is none."""
    names = [FAST] if (directory / FAST).is_file() else [VOCAB, MERGES]
    paths = [directory / name for name in (*names, SETTINGS)]
    return [p for p in paths if p.is_file()] if all(p.is_file() for p in paths[:-1]) else []


def load_pretrained(directory: Path) -> HFTokenizer:
    """Loads the tokenizer of a directory with tokenizer.json, or with vocab.json and merges.txt.

    Raises:
        InputError: there is none, it is of another kind, or its boundary token has no id.
    """
    if not directory.is_dir():
        raise InputError(
            f"data.tokenizer_path={directory} is no directory; name one with tokenizer.json, or "
            f"with vocab.json and merges.txt"
        )
    library = _read_library(directory)
    _check_kind(library, directory)
    boundary = _boundary_text(directory)
    tokenizer = HFTokenizer(library, boundary)
    if tokenizer.boundary is None:
        raise InputError(
            f"{directory}: its vocabulary has no entry {boundary!r} to mark documents with; name "
            f"one that it has as bos_token in {SETTINGS}"
        )
    return tokenizer


def _read_library(directory: Path) -> dict:
    """Reads a tokenizer and returns its definition, as the tokenizers library writes it."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    try:
        if (directory / FAST).exists():
            return json.loads(Library.from_file(str(directory / FAST)).to_str())
        vocab, merges = directory / VOCAB, directory / MERGES
        if not (vocab.exists() and merges.exists()):
            raise InputError(
                f"data.tokenizer_path={directory} holds no {FAST}, nor {VOCAB} with {MERGES}; "
                f"save_pretrained of a fast tokenizer writes one"
            )
        library = Library(models.BPE.from_file(str(vocab), str(merges)))
    except InputError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{directory} holds no readable tokenizer ({error})") from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    boundary = AddedToken(_boundary_text(directory), special=True, normalized=False)
    library.add_special_tokens([boundary])
    return json.loads(library.to_str())


def _check_kind(library: dict, directory: Path) -> None:
    """Refuses tokenizers that lose bytes of a text or add some. Raises InputError."""
    if is_sentencepiece(library):
        return _check_sentencepiece(library, directory)
    kind, before = library["model"]["type"], library.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if kind != "BPE" or len(levels) != 1:
        raise InputError(
            f"{directory} is a {kind} tokenizer "
            f"({', '.join(str(p.get('type')) for p in parts)}); use byte-level BPE, or "
            f"SentencePiece's BPE with byte_fallback"
        )
    if levels[0].get("add_prefix_space") or library.get("normalizer"):
        raise InputError(
            f"{directory} changes the text before splitting it (add_prefix_space or a normalizer); "
            f"use byte-level BPE without either"
        )


def _check_sentencepiece(library: dict, directory: Path) -> None:
    """Refuses normalizers other than Prepend and Replace. Raises InputError.

    Those put a space before every text, also before one that begins with a space. The later form
    (Metaspace) does not, so a text with that space and one without get the same ids.
    """
    normalizer, before = library.get("normalizer") or {}, library.get("pre_tokenizer") or {}
    if normalizer.get("normalizers") != _NORMALIZED or before:
        raise InputError(
            f"{directory} changes the text in a way that loses something (normalizer "
            f"{normalizer.get('type')}, pre_tokenizer {before.get('type')}); use the "
            f"normalizers Prepend and Replace of {SPACE!r} alone"
        )


def _boundary_text(directory: Path) -> str:
    """Reads the text of the boundary token: `bos_token`, else `eos_token`, else GPT-2's."""
    try:
        settings = read_json(directory / SETTINGS)
    except FileNotFoundError:
        settings = {}
    except ValueError as error:
        raise InputError(f"{directory / SETTINGS} is not JSON ({error}); save it again") from None
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return token
    return "<|endoftext|>"
