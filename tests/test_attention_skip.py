"""Blocks without attention: what they keep, cost and refuse.

Their oracle is in test_skip_connections.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import make, tokens

from lmscale_jax.config.resolve import validate
from lmscale_jax.configs import base
from lmscale_jax.configs import coord_check as family
from lmscale_jax.errors import InputError
from lmscale_jax.evals import suites
from lmscale_jax.model import flops, memory, param
from lmscale_jax.sweeps import coord_check
from lmscale_jax.train import diagnostics


def test_blocks_without_attention():
    """The others keep their initial values; FLOPs and memory are those of what is there."""
    config, model, _ = make(n_layers=4, attention_skip="2")
    full = make(n_layers=4)
    params = model.init(jax.random.key(0))
    rows, other = param.named(params), param.named(full[1].init(jax.random.key(0)))
    assert rows.keys() == other.keys()
    for path, wanted in other.items():
        kept = [0, 1, 3] if path.startswith("blocks/attention") else slice(None)
        np.testing.assert_array_equal(rows[path], np.asarray(wanted)[kept])
    mine, theirs = (
        flops.forward_flops(c, m.specs) for c, m in ((config, model), (full[0], full[1]))
    )
    assert mine["attention"] == 0.75 * theirs["attention"]
    assert theirs["dense"] - mine["dense"] == 2 * 4 * config.model.d_model**2
    taps = model.taps(params, tokens(2), lambda _, x: jnp.abs(x).mean())["blocks"]
    assert len(taps["mlp"]) == 4 and len(taps["attention"]) == len(taps["scores"]) == 3
    assert param.row_layers(model.specs["blocks"], 3) == (0, 1, 3)
    stored = [
        memory.mean_block_bytes(c, m.specs, {}, "plain").total
        for c, m in ((config, model), (full[0], full[1]))
    ]
    none = memory.block_bytes(config, model.specs, {}, "plain", attending=0.0).total
    assert stored[0] == pytest.approx((3 * stored[1] + none) / 4)


def test_measurements_have_a_row_for_each_block():
    """Of what a block lacks it is nan, and nothing in a sum over its parameters."""
    model, params = make(n_layers=4, attention_skip="2", norm="rmsnorm")[1:]
    norms = diagnostics.layer_norms(model, params, params, params)["param_norm_layers"]
    blocks = param.named(params["blocks"])
    squares = np.zeros(4)
    for path, x in blocks.items():
        layers = [0, 1, 3] if path.startswith("attention") else [0, 1, 2, 3]
        squares[layers] += np.square(x).reshape(len(layers), -1).sum(axis=1)
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)
    by_layer = diagnostics.by_layer(model.specs, jnp.arange(3.0))
    np.testing.assert_array_equal(by_layer, [0, 1, np.nan, 2])


REFUSED = {
    "no such block": ({"model.attention_skip": "4"}, "does not list different blocks.*; use ''"),
    "all": ({"model.n_layers": 1, "model.attention_skip": "0"}, "no block with attention; use ''"),
    "freezing": ({"freeze.mode": "random"}, "attention_skip='1' does not support freeze.mode"),
    **{
        f"mur: {mode}": ({"mur.mode": mode}, "attention_skip='1' does not support mur.mode")
        for mode in ("diagnose", "loss", "update")
    },
    "redundancy": ({"eval.redundancy_every": "2"}, "does not support eval.redundancy_every"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_needs_equal_blocks_is_refused(changes, message):
    config = base.get_config()
    config.model.attention_skip = "1"
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        validate(config)


def test_suites_and_depths_are_refused():
    model = make(attention_skip="1")[0].model
    for name in ("redundancy", "mur", "attention"):
        with pytest.raises(InputError, match=f"skip='1' does not support --suites={name}"):
            suites.check_suite(["perplexity", name], model)
    config = family.get_config()
    config.model.attention_skip, config.parametrization.name = "1", "completep"
    config.parametrization.base_depth = 2
    with pytest.raises(InputError, match="does not support a sweep over depth"):
        coord_check.plan_sizes(config, "depth", [2, 4, 8])
