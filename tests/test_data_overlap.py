"""Runs of tokens that both sides have, against sets of tuples."""

import numpy as np
import pytest

from lmscale_jax.configs import base
from lmscale_jax.data import encode, prepare
from lmscale_jax.data.shards import Shards, ShardWriter


def written(folder, tokens, name):
    writer = ShardWriter(folder, name, 300, shard_tokens=97)
    writer.add(np.asarray(tokens))
    writer.close()
    return Shards([folder / shard["name"] for shard in writer.shards], 300)


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1 << 22, 50])
def test_shared_runs_are_counted(tmp_path, length, chunk, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK", chunk)
    chance = np.random.default_rng(length)
    train, val = (chance.integers(0, 7, n) for n in (400, 250))
    val[40:60] = train[100:120]
    result = encode.measure_overlap(
        written(tmp_path, train, "train"), written(tmp_path, val, "val"), length, 0
    )

    def runs(tokens):
        each = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
        return [(i, run) for i, run in enumerate(each) if 0 not in run]

    train_runs = {run for _, run in runs(train)}
    shared = [i for i, run in runs(val) if run in train_runs]
    assert result["runs"] == len(runs(val))
    assert result["shared"] == pytest.approx(len(shared) / len(runs(val)))
    covered = {i + j for i in shared for j in range(length)}
    assert result["tokens"] == pytest.approx(len(covered) / len(val))


def test_no_run_fits(tmp_path):
    result = encode.measure_overlap(
        written(tmp_path, [1, 2], "train"), written(tmp_path, [3, 0, 4], "val"), 2, 0
    )
    assert result == {"length": 2, "runs": 0, "shared": 0.0, "tokens": 0.0}


def test_preparing_reports_it(tmp_path):
    quote = "a sentence that everybody copies from everybody else, word for word, once more. "
    (tmp_path / "a.txt").write_text("\n\n".join(f"{quote}{i} {i**3} {i**5}" for i in range(60)))
    data = base.get_config().data
    data.source, data.path, data.document = "text", str(tmp_path / "a.txt"), "paragraph"
    data.tokenizer, data.cache, data.overlap = "bytes", str(tmp_path / "cache"), 20
    lines = []
    data = prepare.prepare_data(data, 0, log=lines.append)
    assert 0.5 < data.manifest["overlap"]["shared"] < 1
    assert any("validation runs of 20 tokens" in line for line in lines)
