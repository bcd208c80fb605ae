"""Prepared data: the split, the cache, what survives a kill, and shards used where they lie."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmscale_jax.configs.base import get_config
from lmscale_jax.data import encode, tokenizers
from lmscale_jax.data.prepare import (
    find_manifest,
    find_token_ids,
    prepare_data,
    prepare_directory,
)
from lmscale_jax.data.shards import ShardWriter
from lmscale_jax.data.tokenizers import BytePairs
from lmscale_jax.errors import InputError

DOCUMENTS = [f"Document {i} says {i * i} and nœthing else.\n" for i in range(300)]


def config(tmp_path, **keys):
    data = get_config().data
    data.update({"cache": str(tmp_path / "cache"), "source": "text", "tokenizer": "bytes"} | keys)
    return data


def lines_config(tmp_path, documents=DOCUMENTS, **keys):
    path = tmp_path / "text.txt"
    path.write_text("".join(documents))
    return config(tmp_path, path=str(path), **({"document": "line", "vocab_size": 270} | keys))


def quiet(line):
    """Takes the log's place."""


def documents_of(prepared, side):
    shards = getattr(prepared, side)
    tokens = shards.read(0, shards.n_tokens)
    starts = np.flatnonzero(tokens == prepared.boundary)
    assert starts[0] == 0
    return [prepared.tokenizer.decode(piece) for piece in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_hash_split_loses_and_shares_nothing(tmp_path, tokenizer):
    cfg = lines_config(tmp_path, tokenizer=tokenizer, vocab_size=270)
    prepared = prepare_data(cfg, 0, log=quiet)
    train, val = documents_of(prepared, "train"), documents_of(prepared, "val")
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert 1 <= len(val) <= 40  # 15 are expected
    for side, documents in (("train", train), ("val", val)):
        counts = prepared.manifest["splits"][side]
        assert counts["documents"] == len(documents)
        assert counts["bytes"] == len("".join(documents).encode())
        assert counts["tokens"] == getattr(prepared, side).n_tokens
    assert prepared.vocab_size == find_token_ids(cfg).vocab_size == len(prepared.token_bytes)


def test_split_depends_neither_on_order_nor_on_other_documents(tmp_path):
    first = prepare_data(lines_config(tmp_path), 0, log=quiet)
    shuffled = list(np.random.default_rng(0).permutation(DOCUMENTS))
    second = prepare_data(lines_config(tmp_path, shuffled), 0, log=quiet)
    fewer = prepare_data(lines_config(tmp_path, DOCUMENTS[:200]), 0, log=quiet)
    assert set(documents_of(first, "val")) == set(documents_of(second, "val"))
    assert set(documents_of(fewer, "val")) == set(documents_of(first, "val")) & set(DOCUMENTS[:200])
    assert first.fingerprint != second.fingerprint


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    once = prepare_data(lines_config(tmp_path), 0, log=quiet)
    twice = prepare_data(lines_config(tmp_path, DOCUMENTS + DOCUMENTS[50:]), 0, log=quiet)
    assert twice.manifest["source"]["duplicates_dropped"] == 250
    assert twice.fingerprint == once.fingerprint
    assert twice.val_fingerprint == once.val_fingerprint


def place(text):
    """Where a document's content hash falls in [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def test_bpe_is_trained_on_the_training_documents_only(tmp_path):
    strange = [text for i in range(1000) if place(text := f"{'zq' * 40}{i}\n") < 0.05]
    prepared = prepare_data(
        lines_config(tmp_path, DOCUMENTS + strange, tokenizer="bpe"), 0, log=quiet
    )
    expected = [text for text in DOCUMENTS if place(text) < 0.05] + strange
    assert documents_of(prepared, "val") == expected
    assert "zq" not in prepared.tokenizer.vocab
    assert "zq" in BytePairs.train(DOCUMENTS + strange, 270).vocab


@pytest.mark.parametrize("n", [10, 999, 1003, 12345])
def test_tail_split_of_one_text_is_nanogpts(tmp_path, n):
    data = "".join(chr(97 + i % 7) for i in range(n))
    (tmp_path / "input.txt").write_text(data)
    cfg = config(tmp_path, path=str(tmp_path / "input.txt"), tokenizer="char")
    cfg.update(split="tail", val_fraction=0.1)
    prepared = prepare_data(cfg, 0, log=quiet)
    chars = sorted(set(data))
    train = [chars.index(c) for c in data[: int(n * 0.9)]]
    val = [chars.index(c) for c in data[int(n * 0.9) :]]
    assert prepared.train.read(0, prepared.train.n_tokens).tolist() == train
    assert prepared.val.read(0, prepared.val.n_tokens).tolist() == val
    assert prepared.vocab_size == find_token_ids(cfg).vocab_size == 7
    assert prepared.boundary is None


def test_tail_split_cuts_across_documents(tmp_path):
    prepared = prepare_data(lines_config(tmp_path, split="tail", val_fraction=0.25), 0, log=quiet)
    text = "".join(DOCUMENTS)
    cut = int(len(text) * 0.75)
    assert "".join(documents_of(prepared, "train")) == text[:cut]
    assert "".join(documents_of(prepared, "val")) == text[cut:]


def test_the_cache_is_reused_until_source_or_settings_change(tmp_path):
    cfg = lines_config(tmp_path)
    lines = []
    first = prepare_data(cfg, 0, log=lines.append)
    assert any("prepared in" in line for line in lines)
    assert prepare_data(cfg, 0, log=pytest.fail).manifest == first.manifest
    cfg.val_fraction = 0.2
    lines.clear()
    assert prepare_data(cfg, 0, log=lines.append).val.n_tokens > first.val.n_tokens
    assert lines
    lines.clear()
    prepare_data(lines_config(tmp_path, [*DOCUMENTS, "new\n"]), 0, log=lines.append)
    assert lines
    assert len(shown(tmp_path / "cache")) == 3


def shown(directory):
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def test_the_same_documents_give_the_same_shards_bit_for_bit(tmp_path):
    cfg = lines_config(tmp_path, tokenizer="bpe", vocab_size=270)
    first = prepare_directory(cfg, tmp_path / "a", log=quiet)
    second = prepare_directory(cfg, tmp_path / "b", log=quiet)
    assert first.manifest == second.manifest
    assert first.fingerprint == second.fingerprint


def test_a_damaged_cache_is_made_again(tmp_path):
    cfg = lines_config(tmp_path)
    first = prepare_data(cfg, 0, log=quiet)
    shard = first.train.paths[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    again = prepare_data(cfg, 0, log=quiet)
    assert again.train.scan() == again.manifest["splits"]["train"]["fingerprint"]


PREPARE = """
import sys
from lmscale_jax.configs.base import get_config
from lmscale_jax.data.prepare import prepare_data
data = get_config().data
data.update(source="text", path=sys.argv[1], cache=sys.argv[2], document="line", vocab_size=300)
print("go", flush=True)
print(prepare_data(data, 0, log=lambda line: print(line, flush=True)).fingerprint)
"""


def start_prepare(text_path, cache):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", PREPARE, str(text_path), str(cache)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_killed_and_concurrent_prepares_leave_nothing_half_written(tmp_path):
    text_path, cache = tmp_path / "text.txt", tmp_path / "cache"
    text_path.write_text("".join(f"{line[:-1]} {n}\n" for n in range(100) for line in DOCUMENTS))
    killed_midway = 0
    for delay in (0.0, 0.1, 0.2):
        process = start_prepare(text_path, cache)
        assert process.stdout.readline() == "go\n"
        process.stdout.readline()  # its first line of progress: the work is under way
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        named = [path for path in cache.iterdir() if not path.name.startswith(".")]
        killed_midway += not named
        for path in named:
            assert (path / "manifest.json").is_file()
    assert killed_midway
    pair = [start_prepare(text_path, cache) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum("prepared in" in line for output in outputs for line in output) <= 1
    (directory,) = shown(cache)
    names = {"manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"}
    assert {path.name for path in directory.iterdir()} == names


def test_prepare_to_fills_only_an_empty_directory(tmp_path):
    cfg, out = lines_config(tmp_path), tmp_path / "out"
    out.mkdir()
    first = prepare_directory(cfg, out, log=quiet)
    assert prepare_directory(cfg, out, log=pytest.fail).manifest == first.manifest
    assert sorted(p.name for p in shown(tmp_path)) == ["out", "text.txt"]
    cfg.val_fraction = 0.3
    before = (out / "manifest.json").read_text()
    with pytest.raises(InputError, match="holds something else"):
        prepare_directory(cfg, out, log=quiet)
    assert (out / "manifest.json").read_text() == before


def test_a_prepared_directory_is_a_bin_source(tmp_path):
    shards = prepare_directory(lines_config(tmp_path), tmp_path / "out", log=quiet)
    cfg = config(tmp_path, source="bin", path=str(tmp_path / "out"))
    data = prepare_data(cfg, 0, log=quiet)
    assert data.fingerprint == shards.fingerprint
    assert data.tokenizer.name == "bytes"
    assert data.vocab_size == find_token_ids(cfg).vocab_size == 257
    cfg.document_mark = 256
    assert prepare_data(cfg, 0, log=quiet).boundary == 256
    cfg.document_mark = 7
    with pytest.raises(InputError, match=r"document_mark=7: .* documents begin with 256; use -1"):
        prepare_data(cfg, 0, log=quiet)
    cfg.val_path = "x.bin"
    with pytest.raises(InputError, match=r"leave data\.val_path empty"):
        prepare_data(cfg, 0, log=quiet)


def test_a_glob_of_prepared_shards_finds_their_manifest_or_is_refused(tmp_path):
    shards = prepare_directory(lines_config(tmp_path), tmp_path / "out", log=quiet)
    cfg = config(tmp_path, source="bin", path=f"{tmp_path}/out/*.bin")
    data = prepare_data(cfg, 0, log=quiet)
    assert (
        data.fingerprint == shards.fingerprint
        and data.vocab_size == find_token_ids(cfg).vocab_size == 257
    )
    assert (data.tokenizer.name, data.boundary) == ("bytes", 256)
    assert data.token_bytes is not None and find_manifest(cfg) == shards.manifest
    write_shard(tmp_path, "web_train", [1, 2, 3])
    for path, counts in (
        (f"{tmp_path}/out/train*.bin", "1 of the 2 shards .* 0 other files"),
        (f"{tmp_path}/out/*.bin,{tmp_path}/web_train*.bin", "2 of the 2 shards .* 1 other files"),
        (str(tmp_path), "2 of the 2 shards .* 1 other files"),
    ):
        with pytest.raises(InputError, match=rf"names {counts}.*use data\.path={tmp_path}/out"):
            prepare_data(config(tmp_path, source="bin", path=path), 1000, log=quiet)


def test_bare_shards_say_their_tokens_and_their_mark(tmp_path):
    write_shard(tmp_path, "web_train", np.arange(900))
    write_shard(tmp_path, "web_val", np.arange(50))
    cfg = config(tmp_path, source="bin", path=f"{tmp_path}/web_*.bin", document_mark=7)
    assert prepare_data(cfg, 1000, log=quiet).boundary == 7
    assert find_manifest(cfg)["splits"]["train"]["tokens"] == 900
    cfg.document_mark = 1000
    with pytest.raises(InputError, match=r"document_mark=1000 is not below model\.vocab_size=1000"):
        prepare_data(cfg, 1000, log=quiet)


def write_shard(directory, prefix, tokens):
    writer = ShardWriter(directory, prefix, 1000)
    writer.add(np.asarray(tokens))
    writer.close()


def test_bare_shards_are_checked_once(tmp_path):
    write_shard(tmp_path, "web_train", np.arange(900))
    write_shard(tmp_path, "web_val", np.arange(50))
    cfg = config(tmp_path, source="bin", path=f"{tmp_path}/web_*.bin")
    lines = []
    first = prepare_data(cfg, 1000, log=lines.append)
    assert (first.train.n_tokens, first.val.n_tokens) == (900, 50)
    assert len(lines) == 2
    assert prepare_data(cfg, 1000, log=pytest.fail).fingerprint == first.fingerprint
    with pytest.raises(InputError, match="token 500 has id 500, beyond the vocabulary of 500"):
        prepare_data(cfg, 500, log=quiet)
    assert find_token_ids(cfg).vocab_size == 0
    cfg.update(path=f"{tmp_path}/web_val*.bin", val_path=f"{tmp_path}/web_train*.bin")
    swapped = prepare_data(cfg, 1000, log=quiet)
    assert (swapped.train.n_tokens, swapped.val.n_tokens) == (50, 900)


def test_bad_bin_sources(tmp_path):
    write_shard(tmp_path, "train", [1, 2, 3])
    cfg = config(tmp_path, source="bin", path=str(tmp_path))
    with pytest.raises(InputError, match=r"model\.vocab_size=0: .*for example 50257"):
        prepare_data(cfg, 0, log=quiet)
    with pytest.raises(InputError, match=r"set data\.val_path"):
        prepare_data(cfg, 1000, log=quiet)
    cfg.val_path = str(tmp_path / "train_000000.bin")
    with pytest.raises(InputError, match="none is left for training"):
        prepare_data(cfg, 1000, log=quiet)
    cfg.val_path = f"{tmp_path}/../{tmp_path.name}/*.bin"
    with pytest.raises(InputError, match="none is left for training"):
        prepare_data(cfg, 1000, log=quiet)
    cfg.path = str(tmp_path / "none")
    with pytest.raises(InputError, match=r"no \.bin file there"):
        prepare_data(cfg, 1000, log=quiet)
    with pytest.raises(InputError, match="prepared already"):
        prepare_directory(cfg, tmp_path / "out", log=quiet)


def test_a_directory_that_was_tampered_with_is_refused(tmp_path):
    out = tmp_path / "out"
    prepare_directory(lines_config(tmp_path), out, log=quiet)
    cfg = config(tmp_path, source="bin", path=str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="format 99, not 1"):
        prepare_data(cfg, 0, log=quiet)
    manifest["splits"]["train"]["tokens"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="train shards are not the manifest's"):
        prepare_data(cfg, 0, log=quiet)
    manifest["splits"]["train"]["tokens"] -= 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    prepare_data(cfg, 0, log=quiet)
    shard = out / "val_000000.bin"
    body = bytearray(shard.read_bytes())
    body[-2] ^= 1
    shard.write_bytes(body)
    with pytest.raises(InputError, match=r"val_000000\.bin: changed since its manifest"):
        prepare_data(cfg, 0, log=quiet)
    (out / "tokenizer.json").write_text('{"name": "char", "characters": "ab"}')
    with pytest.raises(InputError, match=r"tokenizer\.json is not the manifest's"):
        prepare_data(cfg, 0, log=quiet)


@pytest.mark.parametrize(
    "documents, keys, expected",
    [
        ([""], {}, "no text there"),
        (["one\n"], {"document": "file"}, "data.split=tail or data.document=paragraph"),
        (["one\n"], {}, "documents: 1, characters: 4"),
        (["o"], {"split": "tail"}, "use more text"),
        (DOCUMENTS, {"tokenizer": "bpe", "vocab_size": 99999}, "is enough"),
    ],
)
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path, documents, keys, expected):
    with pytest.raises(InputError) as caught:
        prepare_data(lines_config(tmp_path, documents, **keys), 0, log=quiet)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_model_vocabulary_must_hold_the_tokenizers(tmp_path):
    cfg = lines_config(tmp_path)
    with pytest.raises(InputError, match=r"model\.vocab_size=256: .*set model\.vocab_size=257"):
        prepare_data(cfg, 256, log=quiet)
    assert prepare_data(cfg, 320, log=quiet).vocab_size == 257


def test_a_cache_that_cannot_be_written_names_itself(tmp_path):
    cfg = lines_config(tmp_path)
    (tmp_path / "file").write_text("in the way")
    cfg.cache = str(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot be written .*set data\.cache"):
        prepare_data(cfg, 0, log=quiet)


def test_cache_directory_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LMSCALE_CACHE", str(tmp_path / "elsewhere"))
    prepare_data(lines_config(tmp_path, cache=""), 0, log=quiet)
    (directory,) = shown(tmp_path / "elsewhere")
    assert directory.name.startswith("text-bytes-")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_long_documents_are_cut_without_a_trace(tmp_path, tokenizer, monkeypatch):
    rng = np.random.default_rng(0)
    letters = list("ab \n\t'é1!\u3000\x1c_日")
    documents = ["".join(rng.choice(letters, rng.integers(1, 400))) for _ in range(60)]
    for i, document in enumerate(documents):
        (tmp_path / f"{i:02d}.txt").write_bytes(document.encode())
    cfg = config(tmp_path, path=f"{tmp_path}/*.txt", tokenizer=tokenizer, vocab_size=300)
    whole = prepare_directory(cfg, tmp_path / "whole", log=quiet)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", 10)
    monkeypatch.setattr(encode, "_BLOCK_CHARACTERS", 100)
    cut = prepare_directory(cfg, tmp_path / "cut", log=quiet)
    assert cut.manifest == whole.manifest
    assert documents_of(cut, "train") + documents_of(cut, "val") == sorted(
        dict.fromkeys(documents), key=lambda document: place(document) < 0.05
    )
