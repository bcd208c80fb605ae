"""Published tokenizers as Hugging Face saves them, read from a local directory.

Byte-level BPE (GPT-2, Llama 3, Qwen and others) and SentencePiece's BPE with bytes to fall back on
(Llama 2, Mistral). Nothing is fetched and no code of the directory is run; other kinds are refused
by name.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from lmscale_jax.data.tokenizers import ByteLevel, byte_of_letter
from lmscale_jax.errors import InputError

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


class Pretrained(ByteLevel):
    """The tokenizer of a directory. Its document mark is the `bos_token`, else the `eos_token`.

    Text that spells a special token is encoded as text, so no document can forge a boundary.

    SentencePiece writes spaces as U+2581 and puts one before every document. `decode` takes that
    one away again, and so does the mark, which counts for -1 byte: the bytes of a document are
    those of its text. A U+2581 of the text itself comes back as a space.
    """

    name = "hf"
    # Other patterns than GPT-2's may join what `pieces` would cut.
    cuttable = False

    def __init__(self, library: dict, boundary: str):
        from tokenizers import Tokenizer as Library

        self._definition = {"library": library, "boundary": boundary}
        self._spaced = is_spaced(library)
        self._library = Library.from_str(json.dumps(library))
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self.boundary = self._library.token_to_id(boundary)
        self.token_bytes = np.array([len(b) for b in self._bytes_of], np.int32)
        if self._spaced and self.boundary is not None:
            self.token_bytes[self.boundary] = -1

    def definition(self):
        return {"name": self.name} | self._definition

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """What each id stands for; nothing for special tokens and for ids without an entry."""
        found, letters = [b""] * self.vocab_size, {} if self._spaced else byte_of_letter()
        added = self._library.get_added_tokens_decoder()
        for entry, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in added:
                found[i] = b"" if added[i].special else entry.encode()
            elif not self._spaced:
                found[i] = bytes(letters[letter] for letter in entry)
            elif named := _BYTE.fullmatch(entry):
                found[i] = bytes([int(named[1], 16)])
            else:
                found[i] = entry.replace(SPACE, " ").encode()
        return found

    def decode(self, ids):
        if not self._spaced:
            return super().decode(ids)
        ids = np.asarray(ids)
        marks = np.flatnonzero(ids == self.boundary)
        texts = [super(Pretrained, self).decode(part) for part in np.split(ids, marks)]
        # What comes before the first mark is the middle of a document.
        return texts[0] + "".join(text.removeprefix(" ") for text in texts[1:])


def is_spaced(library: dict) -> bool:
    """Whether a definition is SentencePiece's BPE."""
    return library["model"]["type"] == "BPE" and bool(library["model"].get("byte_fallback"))


def load(directory: Path) -> Pretrained:
    """The tokenizer of a directory with tokenizer.json, or with vocab.json and merges.txt.

    Raises InputError where there is none, or one of another kind.
    """
    if not directory.is_dir():
        raise InputError(
            f"data.tokenizer_path={directory} is no directory; one with tokenizer.json, or with "
            f"vocab.json and merges.txt, would work"
        )
    library = _library(directory)
    _check_kind(library, directory)
    mark = _mark(directory)
    found = Pretrained(library, mark)
    if found.boundary is None:
        raise InputError(
            f"{directory}: its vocabulary has no entry {mark!r} to mark documents with"
        )
    return found


def _library(directory: Path) -> dict:
    """The definition as the tokenizers library writes it."""
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
    library.add_special_tokens([AddedToken(_mark(directory), special=True, normalized=False)])
    return json.loads(library.to_str())


def _check_kind(library: dict, directory: Path) -> None:
    """Only what loses no byte of a text and adds none."""
    if is_spaced(library):
        return _check_spaced(library, directory)
    kind, before = library["model"]["type"], library.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if kind != "BPE" or len(levels) != 1:
        raise InputError(
            f"{directory} is a {kind} tokenizer "
            f"({', '.join(str(p.get('type')) for p in parts)}); byte-level BPE would work, or "
            f"SentencePiece's BPE with byte_fallback"
        )
    if levels[0].get("add_prefix_space") or library.get("normalizer"):
        raise InputError(
            f"{directory} changes the text before it cuts it (add_prefix_space or a normalizer); "
            f"byte-level BPE without would work"
        )


def _check_spaced(library: dict, directory: Path) -> None:
    """Only the form that puts a space before every text, one that begins with a space too; the
    later one (Metaspace) leaves that out, so such a text cannot be told from one without."""
    normalizer, before = library.get("normalizer") or {}, library.get("pre_tokenizer") or {}
    if normalizer.get("normalizers") != _NORMALIZED or before:
        raise InputError(
            f"{directory} changes the text in a way that loses something (normalizer "
            f"{normalizer.get('type')}, pre_tokenizer {before.get('type')}); the normalizers "
            f"Prepend and Replace of {SPACE!r} alone would work"
        )


def _mark(directory: Path) -> str:
    """The text of the token that opens documents."""
    try:
        settings = json.loads((directory / SETTINGS).read_text())
    except FileNotFoundError:
        settings = {}
    except ValueError as error:
        raise InputError(f"{directory / SETTINGS} is no JSON ({error})") from None
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return token
    return "<|endoftext|>"
