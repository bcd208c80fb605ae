"""The sweep algebra and the size solver."""

import pytest

from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.lab import sizes, sweep
from lmscale_jax.lab.sweep import axis, chain, prefix, product, where, zipped


def test_grids_nest():
    rates, seeds = prefix("optim", axis("lr", [1e-3, 2e-3])), axis("seed", [0, 1])
    grid = product(rates, zipped(seeds, axis("data.seed", [0, 1])))
    assert len(grid) == 4
    assert grid[1] == {"optim.lr": 1e-3, "seed": 1, "data.seed": 1}
    more = chain(grid, product(rates, axis("seed", [2])), grid)
    assert len(more) == 6 and more[:4] == grid
    assert where(lambda cell: cell["seed"] == 2, more) == more[4:]
    assert product() == [{}] and zipped() == []
    # A key on both sides with one value is no clash.
    assert product(seeds[:1], seeds[:1]) == [{"seed": 0}]


def test_clashes_and_lengths_are_named():
    with pytest.raises(InputError, match="seed is given as 0 and as 1"):
        product(axis("seed", [0]), axis("seed", [1]))
    with pytest.raises(InputError, match="2, 3 cells"):
        zipped(axis("seed", [0, 1]), axis("data.seed", [0, 1, 2]))
    with pytest.raises(InputError, match=r"optim\.rl is not a key; did you mean"):
        sweep.apply(base.get_config(), {"optim.rl": 1})


def test_apply_leaves_the_base_alone():
    config = base.get_config()
    cell = sweep.apply(config, {"model.mlp": "swiglu", "optim.lr": 1})
    assert (cell.model.mlp, cell.optim.lr) == ("swiglu", 1) and config.model.mlp == "gelu"


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("target", [3e6, 10e6, 85e6])
def test_sizes_meet_their_target(mlp, target):
    config = base.get_config()
    config.model.mlp = mlp
    shape = sizes.solve(config, target, head_dim=32, vocab_size=4096)
    counts = sizes.count(sizes.resized(config, shape), 4096)
    assert abs(counts["non_embedding"] / target - 1) <= 0.02
    assert shape.n == counts["non_embedding"]
    assert 40 <= shape.d_model / shape.n_layers <= 100


def test_total_parameters_count_the_tables():
    config = base.get_config()
    shape = sizes.solve(config, 20e6, "total", head_dim=32, vocab_size=32_000)
    assert abs(sizes.count(sizes.resized(config, shape), 32_000)["total"] / 20e6 - 1) <= 0.02


def test_an_unreachable_size_names_the_nearest():
    # The embedding alone is larger, as in a "3M" model with 50k tokens.
    with pytest.raises(InputError, match=r"no model of 3,000,000 total .* nearest has 3,2"):
        sizes.solve(base.get_config(), 3e6, "total", head_dim=64, vocab_size=50_257)
