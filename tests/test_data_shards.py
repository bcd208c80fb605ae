"""Shards: the file format, windows across files, and damage that is told, not read."""

import hashlib
import struct

import numpy as np
import pytest

from lmscale_jax.data.shards import Shards, ShardWriter
from lmscale_jax.errors import InputError


def write(directory, tokens, vocab_size=1000, shard_tokens=100_000_000, prefix="train"):
    writer = ShardWriter(directory, prefix, vocab_size, shard_tokens)
    for piece in np.array_split(tokens, 5):
        writer.add(piece)
    writer.close()
    return writer


def paths_of(directory):
    return sorted(directory.glob("*.bin"))


def test_a_file_is_the_speedruns_format(tmp_path):
    write(tmp_path, np.array([7, 0, 65535, 3]), vocab_size=65536)
    content = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<3i", content[:12]) == (20240520, 1, 4)
    assert content[12:1024] == bytes(1012)
    assert struct.unpack("<4H", content[1024:]) == (7, 0, 65535, 3)


def test_large_vocabularies_take_uint32(tmp_path):
    tokens = np.array([1, 65536, 99_999])
    write(tmp_path, tokens, vocab_size=100_000)
    content = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<3i", content[:12]) == (20240520, 2, 3)
    shards = Shards(paths_of(tmp_path), 100_000)
    assert (shards.read(0, 3) == tokens).all()
    shards.scan()


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 999, 1000, 5000])
def test_windows_cross_shard_ends(tmp_path, shard_tokens):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 1000)
    writer = write(tmp_path, tokens, shard_tokens=shard_tokens)
    shards = Shards(paths_of(tmp_path), 1000)
    assert shards.n_tokens == 1000
    assert len(shards.paths) == -(-1000 // shard_tokens)
    assert (shards.read(0, 1000) == tokens).all()
    for length in (1, 5, 64):
        starts_B = np.append(rng.integers(0, 1000 - length, 50), [0, 1000 - length])
        windows_BxT = shards.gather(starts_B, length)
        assert windows_BxT.dtype == np.int32
        assert (windows_BxT == tokens[starts_B[:, None] + np.arange(length)]).all()
    expected = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    assert shards.scan() == writer.fingerprint == expected


def test_written_hashes_are_those_of_the_files(tmp_path):
    writer = write(tmp_path, np.arange(100), shard_tokens=30)
    assert [shard["tokens"] for shard in writer.shards] == [30, 30, 30, 10]
    for shard in writer.shards:
        content = (tmp_path / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_an_unfinished_shard_has_no_name(tmp_path):
    writer = ShardWriter(tmp_path, "train", 1000)
    writer.add(np.arange(100))
    assert paths_of(tmp_path) == []
    writer.close()
    assert len(paths_of(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_windows_beyond_the_stream_raise(tmp_path):
    write(tmp_path, np.arange(10))
    shards = Shards(paths_of(tmp_path), 1000)
    for start in (-1, 8):
        with pytest.raises(IndexError):
            shards.gather(np.array([start]), 3)


def header(*numbers):
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


BAD = {
    "missing": (None, "no such shard"),
    "empty": (b"", "no header instead of 20240520"),
    "wrong magic": (header(20240521, 1, 1) + b"\0\0", "magic 20240521 instead of 20240520"),
    "text": (b"Once upon a time" * 100, "not a token shard"),
    "short header": (header(20240520, 1, 1)[:500], "not a token shard"),
    "version": (header(20240520, 3, 1) + b"\0\0", "version 3"),
    "truncated": (header(20240520, 1, 9) + b"\0" * 16, "says 9 tokens and the file has 8"),
    "odd": (header(20240520, 1, 9) + b"\0" * 17, "says 9 tokens and the file has 8"),
    "too long": (header(20240520, 1, 7) + b"\0" * 16, "says 7 tokens and the file has 8"),
    "no tokens": (header(20240520, 1, 0), "says 0 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_one_line_that_names_the_file(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "bad.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Shards([path], 100)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_scan_finds_ids_beyond_the_vocabulary(tmp_path):
    tokens = np.zeros(5000, int)
    tokens[4321] = 100
    write(tmp_path, tokens, shard_tokens=3000)
    Shards(paths_of(tmp_path), 101).scan()
    with pytest.raises(InputError, match=r"train_000001.bin: token 1321 has id 100, beyond .* 100"):
        Shards(paths_of(tmp_path), 100).scan()
