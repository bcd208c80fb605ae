"""The keys that a query attends to, against a count of the pairs that the mask leaves."""

import gpt2_shards
import numpy as np
import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base, speedrun_record26
from lmscale_jax.data import documents, prepare
from lmscale_jax.data.shards import Shards
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, flops, skip_connections, visible_keys
from lmscale_jax.model.sizes import describe_shape

T = 40


def make(**changes):
    config = base.get_config()
    small = {
        "model.n_layers": 6, "model.d_model": 32, "model.n_heads": 2, "data.seq_len": T,
        "train.steps": 9,
    }  # fmt: skip
    config.update_from_flattened_dict(small | {k.replace("__", "."): v for k, v in changes.items()})
    return resolve(config, 257)


def mask_of(window, block: int, segments_BxT) -> np.ndarray:
    """The definition: a key is not after its query, in its window and in its document."""
    query, key = np.arange(T)[:, None], np.arange(T)
    mask = query >= key
    if window is not None:
        mask &= query // block - key // block < window
    if segments_BxT is None:
        return mask
    return mask & (segments_BxT[:, :, None] == segments_BxT[:, None, :])


def counted(config, segments_BxT=None) -> float:
    """Visible pairs by query: the mask of every step, block and sequence, added up."""
    model, total = config.model, 0
    full_blocks = skip_connections.full_window_blocks(model)
    steps = range(config.train.steps) if model.window_growth else [None]
    for step in steps:
        windows = skip_connections.attention_windows(
            config, step if step is None else np.array(step, np.float32)
        )
        for layer in range(model.n_layers):
            window = windows and windows[0 if layer in full_blocks else 1]
            total += float(np.mean(mask_of(window, model.window_block, segments_BxT).sum(axis=-1)))
    return total / (len(steps) * model.n_layers)


WINDOWS = [
    {},
    {"window_layers": "all", "window": 7},
    {"window_layers": "ends", "window": 5},
    {"window_layers": "fourth", "window": 24, "window_block": 8},
    {"window_layers": "ends", "window": 40, "window_block": 16},
    {"window_layers": "ends", "window": 23, "window_block": 6, "window_growth": "100%"},
    {"window_layers": "all", "window": 300, "window_block": 3, "window_growth": "5"},
]


def prefixed(changes: dict) -> dict:
    return {f"model__{name}": value for name, value in changes.items()}


@pytest.mark.parametrize("changes", WINDOWS, ids=str)
def test_windows_are_counted_as_the_mask_leaves_them(changes):
    config = make(**prefixed(changes))
    assert visible_keys.mean_visible(config) == pytest.approx(counted(config), rel=1e-12)


@pytest.mark.parametrize(
    ("window", "block", "keys"), [(128, 1, 124.03), (128, 128, 64.5), (256, 128, 184.5)]
)
def test_windows_of_a_known_size(window, block, keys):
    config = make(data__seq_len=2048, model__window_layers="all", model__window=window,
                  model__window_block=block)  # fmt: skip
    assert visible_keys.mean_visible(config) == pytest.approx(keys, abs=0.005)


def test_record_26_counts_its_growth():
    """Against the sum over its steps; its windows at the end alone would count nearly twice."""
    config = speedrun_record26.get_config()
    config.data.seq_len, config.model.mask = 2048, "causal"
    growing = visible_keys.mean_visible(resolve(config))
    config.model.window_growth = "0"
    assert visible_keys.mean_visible(resolve(config)) == pytest.approx(756.14, abs=0.05)
    assert 300 < growing < 450


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard whose documents are shorter and longer than a window, and one to hold out."""
    folder = tmp_path_factory.mktemp("documents")
    chance = np.random.default_rng(0)
    lengths = [1, 2, 3, 7, 13, 39, 40, 41, 90, 5, 1, 11]
    tokens = np.concatenate([[256, *chance.integers(0, 256, n - 1)] for n in lengths])
    gpt2_shards.write_shard(folder / "train.bin", tokens)
    gpt2_shards.write_shard(folder / "val.bin", tokens[:60])
    return {
        "data__source": "bin", "data__path": f"{folder}/*.bin", "data__cache": f"{folder}/cache",
        "data__document_mark": 256, "model__vocab_size": 257, "model__mask": "document",
    }  # fmt: skip


@pytest.mark.parametrize("changes", WINDOWS, ids=str)
def test_documents_are_counted_as_the_mask_leaves_them(changes, shards):
    """Against windows that begin at every token of the stream, which follows itself."""
    config = make(**shards, **prefixed(changes))
    data = prepare.prepare_data(config.data, 257, log=lambda line: None)
    stream = data.train.read(0, data.train.n_tokens)
    rows = (np.arange(len(stream))[:, None] + np.arange(T)) % len(stream)
    segments_BxT = np.cumsum(stream[rows] == 256, axis=1)
    expected = counted(config, segments_BxT)
    assert visible_keys.mean_visible(config) == pytest.approx(expected, rel=1e-9)
    assert expected < counted(config)


def test_every_count_of_flops_has_them(shards):
    """The plan of a ladder, the forecast and --explain ask one function."""
    plain, masked = (make(**shards | {"model__mask": mask}) for mask in ("causal", "document"))
    specs = build.build_model(plain, platform="cpu").specs
    fewer = 4 * 32 * 6 * (visible_keys.mean_visible(plain) - visible_keys.mean_visible(masked))
    each = [flops.flops_per_token(config, specs)["model"] for config in (plain, masked)]
    assert each[0] - each[1] == pytest.approx(3 * fewer) and fewer > 0
    assert describe_shape(masked)[1] == each[1]
    text = visible_keys.describe_visible(masked)
    assert "expected from the documents of the training tokens" in text
    absent = make(model__mask="document", data__source="stdlib", data__cache=shards["data__cache"])
    assert "not counted: the data is not prepared" in visible_keys.describe_visible(absent)


def test_ages_of_a_stream_by_hand():
    # Documents of 2, 1 and 4 tokens; the first has lost its mark.
    assert documents.count_ages([2, 3], 7, 5).tolist() == [7, 4, 2, 1, 0]
    with pytest.raises(InputError, match=r"none of the 7 training tokens is a document mark"):
        documents.count_ages([], 7, 5)


def test_marks_are_found_across_shards(tmp_path):
    gpt2_shards.write_shard(tmp_path / "a.bin", np.array([9, 1, 9]))
    gpt2_shards.write_shard(tmp_path / "b.bin", np.array([2, 9]))
    assert Shards([tmp_path / "a.bin", tmp_path / "b.bin"], 10).find(9).tolist() == [0, 2, 4]
