"""The solver of model shapes for a target number of parameters."""

import pytest

from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.model import sizes


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("target", [3e6, 10e6, 85e6])
def test_sizes_meet_their_target(mlp, target):
    config = base.get_config()
    config.model.mlp = mlp
    shape = sizes.solve_shape(config, target, head_dim=32, vocab_size=4096)
    counts = sizes.count_parameters(sizes.with_shape(config, shape), 4096)
    assert abs(counts["non_embedding"] / target - 1) <= 0.02
    assert shape.n == counts["non_embedding"]
    assert 40 <= shape.d_model / shape.n_layers <= 100


def test_total_parameters_count_the_tables():
    config = base.get_config()
    shape = sizes.solve_shape(config, 20e6, "total", head_dim=32, vocab_size=32_000)
    assert (
        abs(sizes.count_parameters(sizes.with_shape(config, shape), 32_000)["total"] / 20e6 - 1)
        <= 0.02
    )


def test_an_unreachable_size_names_the_nearest():
    # The embedding alone is larger, as in a "3M" model with 50k tokens.
    with pytest.raises(InputError, match=r"no model of 3,000,000 total .* nearest has 3,2"):
        sizes.solve_shape(base.get_config(), 3e6, "total", head_dim=64, vocab_size=50_257)
