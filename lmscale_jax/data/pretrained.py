"""Published tokenizers: byte-level BPE as Hugging Face saves it, read from a local directory.

GPT-2, Llama 3, Qwen and others are of that kind. Nothing is fetched and no code of the directory is
run; other kinds (SentencePiece with a prefix space, WordPiece) are refused by name.
"""

import functools
import json
from pathlib import Path

import numpy as np

from lmscale_jax.data.tokenizers import ByteLevel, byte_of_letter
from lmscale_jax.errors import InputError

FAST, VOCAB, MERGES, SETTINGS = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
)  # fmt: skip


class Pretrained(ByteLevel):
    """The tokenizer of a directory. Its document mark is the `bos_token`, else the `eos_token`.

    Text that spells a special token is encoded as text, so no document can forge a boundary.
    """

    name = "hf"
    # Other patterns than GPT-2's may join what `pieces` would cut.
    cuttable = False

    def __init__(self, library: dict, boundary: str):
        from tokenizers import Tokenizer as Library

        self._definition = {"library": library, "boundary": boundary}
        self._library = Library.from_str(json.dumps(library))
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self.boundary = self._library.token_to_id(boundary)
        self.token_bytes = np.array([len(b) for b in self._bytes_of], np.int32)

    def definition(self):
        return {"name": self.name} | self._definition

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """What each id stands for; nothing for special tokens and for ids without an entry."""
        found, letters = [b""] * self.vocab_size, byte_of_letter()
        added = self._library.get_added_tokens_decoder()
        for entry, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in added:
                found[i] = b"" if added[i].special else entry.encode()
            else:
                found[i] = bytes(letters[letter] for letter in entry)
        return found


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
    kind, before = library["model"]["type"], library.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if kind != "BPE" or len(levels) != 1:
        raise InputError(
            f"{directory} is a {kind} tokenizer "
            f"({', '.join(str(p.get('type')) for p in parts)}); byte-level BPE would work"
        )
    if levels[0].get("add_prefix_space") or library.get("normalizer"):
        raise InputError(
            f"{directory} changes the text before it cuts it (add_prefix_space or a normalizer); "
            f"byte-level BPE without would work"
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
