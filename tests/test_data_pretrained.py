"""Published tokenizers from local directories: lossless, the same ids as the library's own."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_data_tokenizers import CORPUS, random_texts

from lmscale_jax.config.resolve import resolve, validate
from lmscale_jax.configs import base
from lmscale_jax.data import hf_tokenizers, prepare, tokenizers
from lmscale_jax.errors import InputError

GPT2 = Path(
    os.environ.get("LMSCALE_GPT2", Path(__file__).parents[2] / "shared/data/gpt2_tokenizer")
)


@pytest.fixture(scope="module")
def library():
    """A byte-level BPE of the tokenizers library, with special and other added tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return path


def test_ids_are_the_library_s_own_and_lose_nothing(library, folder):
    ours = hf_tokenizers.load_pretrained(folder)
    assert ours.vocab_size == library.get_vocab_size()
    assert ours.boundary == library.token_to_id("<|endoftext|>")
    for text in [*CORPUS, *random_texts(), "if x:\n        return 1"]:
        ids = ours.encode_batch([text])[0]
        assert ours.decode(ids) == text
        assert ours.token_bytes[ids].sum() == len(text.encode())
        # A document cannot forge its own end.
        assert ours.boundary not in ids
        if "<|endoftext|>" not in text:
            assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert ours.token_bytes[ours.boundary] == 0


def test_saved_and_read_again_it_is_the_same(folder, tmp_path):
    ours = hf_tokenizers.load_pretrained(folder)
    ours.save(tmp_path)
    loaded = tokenizers.load_tokenizer(tmp_path)
    assert loaded.fingerprint == ours.fingerprint and loaded.boundary == ours.boundary
    assert loaded.encode_batch(CORPUS)[0].tolist() == ours.encode_batch(CORPUS)[0].tolist()


def test_the_older_two_files_are_read_too(library, folder, tmp_path):
    model = json.loads(library.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    ours, theirs = hf_tokenizers.load_pretrained(tmp_path), hf_tokenizers.load_pretrained(folder)
    assert ours.boundary == len(model["vocab"])
    for text in ("def add(a, b):\n", "naïve café"):
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_batch([text])[0].tolist()


def test_data_is_prepared_with_it_and_again_when_it_changes(folder, corpus, tmp_path):
    config = base.get_config()
    config.data.source, config.data.path, config.data.tokenizer = "text", str(corpus), "hf"
    config.data.tokenizer_path, config.data.cache = str(folder), str(tmp_path)
    config.data.val_fraction = 0.2
    data = prepare.prepare_data(config.data, 0, log=lambda line: None)
    ours = hf_tokenizers.load_pretrained(folder)
    assert data.vocab_size == ours.vocab_size == prepare.find_token_ids(config.data).vocab_size
    resolved = resolve(config, data.vocab_size)
    assert resolved.model.vocab_size == ours.vocab_size
    tokens = np.array(data.val.read(0, 2000))
    text = data.tokenizer.decode(tokens)
    assert (tokens == ours.boundary).any() and len(text) > 2000
    assert prepare.find_manifest(config.data) is not None
    (folder / "special_tokens_map.json").write_text("{}")
    assert prepare.find_manifest(config.data) is None


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """SentencePiece's kind, as Llama 2's is saved."""
    from tokenizers import Tokenizer, models, trainers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, show_progress=False)
    texts = [word for text in CORPUS for word in text.replace(" ", " \u2581").split(" ")]
    tokenizer.train_from_iterator(texts, trainer)
    library = json.loads(tokenizer.to_str())
    library["added_tokens"] = [t for t in library["added_tokens"] if t["id"] < 3]
    library["normalizer"] = {"type": "Sequence", "normalizers": hf_tokenizers._NORMALIZED}
    path = tmp_path_factory.mktemp("spaced")
    (path / "tokenizer.json").write_text(json.dumps(library))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return path


def test_sentencepiece_loses_nothing_either(spaced):
    from tokenizers import Tokenizer

    ours, library = (
        hf_tokenizers.load_pretrained(spaced),
        Tokenizer.from_file(str(spaced / "tokenizer.json")),
    )
    texts = [*CORPUS, *random_texts(), " two  spaces first", "über 東京 \x00 \n\n end "]
    texts = [text for text in texts if text and "\u2581" not in text]
    stream, size = [], 0
    for text in texts:
        ids = ours.encode_batch([text])[0]
        if not any(mark in text for mark in ("<s>", "</s>", "<unk>")):
            assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        document = [ours.boundary, *ids]
        assert ours.boundary == 1 and 1 not in ids
        assert ours.decode(document) == text
        assert ours.token_bytes[document].sum() == len(text.encode())
        stream, size = stream + document, size + len(text.encode())
    assert ours.decode(stream) == "".join(texts) and ours.token_bytes[stream].sum() == size
    # The middle of a document keeps its spaces.
    middle = ours.encode_batch(["a b"])[0]
    assert ours.decode(middle) == " a b"


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"GPT-2's vocabulary is not at {GPT2}")
def test_gpt2_s_own_vocabulary():
    ours = hf_tokenizers.load_pretrained(GPT2)
    assert ours.vocab_size == 50_257 and ours.boundary == 50_256
    assert ours.encode_batch(["Hello world"])[0].tolist() == [15496, 995]
    for text in [*CORPUS, *random_texts()]:
        assert ours.decode(ours.encode_batch([text])[0]) == text


def test_other_kinds_are_refused_by_name(folder, tmp_path):
    with pytest.raises(InputError, match="is no directory"):
        hf_tokenizers.load_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json, nor vocab\.json"):
        hf_tokenizers.load_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="holds no readable tokenizer"):
        hf_tokenizers.load_pretrained(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    for change, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"BPE tokenizer \(Whitespace\)"),
        ({"normalizer": {"type": "NFC"}}, "changes the text before"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition | change))
        with pytest.raises(InputError, match=message):
            hf_tokenizers.load_pretrained(tmp_path)
    other = definition | {"model": definition["model"] | {"byte_fallback": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="in a way that loses something"):
        hf_tokenizers.load_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(InputError, match="no entry '<s>'"):
        hf_tokenizers.load_pretrained(tmp_path)
    config = base.get_config()
    config.data.tokenizer = "hf"
    with pytest.raises(InputError, match=r"config\.data\.tokenizer_path=''"):
        validate(config)
