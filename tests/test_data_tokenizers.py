"""Tokenizers are lossless, deterministic and count bytes exactly."""

import numpy as np
import pytest

from lmscale_jax.data import tokenizers
from lmscale_jax.errors import InputError

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "Größe – naïve café, 日本語 🎉\r\n\t",
    "x = 1\n",
]


def random_texts(n=40):
    """Strings of every plane of Unicode except surrogates, and all awkward white space."""
    rng = np.random.default_rng(0)
    texts = [
        "",
        " ",
        "\n\n  \n",
        "\x00\x1f\x7f\x85\xa0\u2028",
        "<|endoftext|>",
        "e\u0301é",
        "👩‍👩‍👧",
    ]
    for _ in range(n):
        points = rng.integers(0, rng.choice([128, 2048, 65536, 0x110000]), rng.integers(1, 200))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.BytePairs.train(CORPUS, 280)


@pytest.fixture(params=["bytes", "bpe"])
def lossless(request, bpe):
    return {"bytes": tokenizers.Bytes(), "bpe": bpe}[request.param]


def test_decode_inverts_encode_for_any_text(lossless):
    texts = random_texts()
    for text, ids in zip(texts, lossless.encode_batch(texts), strict=True):
        assert lossless.decode(ids) == text
        assert ids.dtype == np.int32
        assert lossless.token_bytes[ids].sum() == len(text.encode())
        assert lossless.boundary not in ids


def test_marks_have_no_bytes_and_vanish(lossless):
    assert lossless.boundary == lossless.vocab_size - 1
    assert lossless.token_bytes[lossless.boundary] == 0
    assert len(lossless.token_bytes) == lossless.vocab_size
    (ids,) = lossless.encode_batch(["né"])
    assert lossless.decode([lossless.boundary, *ids, lossless.boundary]) == "né"


def test_half_a_character_decodes_to_a_replacement():
    assert tokenizers.Bytes().decode([0xC3, 0x41]) == "\ufffdA"


def test_bpe_training_is_deterministic_and_has_the_asked_size(bpe):
    retrained = tokenizers.BytePairs.train(iter(CORPUS), 280)
    assert bpe.vocab_size == retrained.vocab_size == 280
    assert bpe.fingerprint == retrained.fingerprint
    assert tokenizers.BytePairs.train(CORPUS, 279).fingerprint != bpe.fingerprint


def test_bpe_merges_what_is_frequent(bpe):
    (ids,) = bpe.encode_batch([CORPUS[0]])
    assert len(ids) < len(CORPUS[0]) / 2


def test_bpe_names_the_size_it_can_reach():
    with pytest.raises(InputError) as caught:
        tokenizers.BytePairs.train(["abab abab"], 1000)
    reachable = int(str(caught.value).split("set data.vocab_size=")[1].split()[0])
    assert 257 < reachable < 270
    assert tokenizers.BytePairs.train(["abab abab"], reachable).vocab_size == reachable


def test_char_is_nanogpts():
    text = "To be, or not to be\nthat is é"
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    tokenizer = tokenizers.Chars(text)
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == [stoi[character] for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.boundary is None and tokenizer.vocab_size == len(stoi)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_char_names_the_unknown_character():
    with pytest.raises(InputError, match=r"'z' \(U\+007A\)"):
        tokenizers.Chars("abc").encode_batch(["ab", "cz"])


def test_saved_is_loaded(tmp_path, bpe):
    for tokenizer in (tokenizers.Bytes(), tokenizers.Chars("hello\n"), bpe):
        tokenizer.save(tmp_path)
        loaded = tokenizers.load_tokenizer(tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.name, loaded.boundary) == (tokenizer.name, tokenizer.boundary)
        texts = ["hello", "oleh\n"]
        for ids, expected in zip(
            loaded.encode_batch(texts), tokenizer.encode_batch(texts), strict=True
        ):
            assert (ids == expected).all()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"name": "other"}', '{"name": "bpe"}'])
def test_bad_definition_is_an_input_error(tmp_path, content):
    if content is not None:
        (tmp_path / tokenizers.FILE_NAME).write_text(content)
    with pytest.raises(InputError, match="prepare again") as caught:
        tokenizers.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
