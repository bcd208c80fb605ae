"""The benchmarks' PyTorch peer computes what ours does, for the same weights.

PyTorch is no dependency: it is looked for in this interpreter and in that of TORCH_PYTHON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import SHAPES, config_of, whole

PEER = Path(__file__).parents[1] / "benchmarks/peer_torch.py"
PYTHON = os.environ.get("TORCH_PYTHON") or (
    sys.executable if importlib.util.find_spec("torch") else None
)
SMALL = {"D": 16, "L": 2, "H": 4, "T": 12, "B": 3, "V": 29}
MODELS = {
    "gpt2, erf": SHAPES[1] | SMALL,
    "gpt2, biases": SHAPES[2] | SMALL | {"bias": True, "P": 20},
    "llama, grouped keys": SHAPES[4] | SMALL | {"K": 2, "F": 24},
}


def theirs(params: dict) -> dict:
    """Our parameters by the peer's names; its products are those of a matrix transposed."""
    blocks, named = params["blocks"], {}

    def norm(mine: dict, name: str) -> None:
        named[f"{name}.weight"] = mine["scale"]
        if "bias" in mine:
            named[f"{name}.bias"] = mine["bias"]

    def dense(parts: list[dict], name: str, width: int, inside: bool = True) -> None:
        flat = [np.reshape(p["weight"], (width, -1) if inside else (-1, width)) for p in parts]
        named[f"{name}.weight"] = np.concatenate(flat, axis=1).T
        if "bias" in parts[0]:
            named[f"{name}.bias"] = np.concatenate([np.reshape(p["bias"], -1) for p in parts])

    def at(tree, layer: int):
        return {k: at(v, layer) for k, v in tree.items()} if isinstance(tree, dict) else tree[layer]

    width = params["embed"]["tokens"].shape[1]
    named["tokens.weight"] = params["embed"]["tokens"]
    if "positions" in params["embed"]:
        named["positions.weight"] = params["embed"]["positions"]
    for layer in range(2):
        block, to = at(blocks, layer), f"blocks.{layer}"
        attention, mlp = block["attention"], block["mlp"]
        norm(block["attention_norm"], f"{to}.ln_1")
        norm(block["mlp_norm"], f"{to}.ln_2")
        dense([attention[n] for n in ("query", "key", "value")], f"{to}.qkv", width)
        dense([attention["out"]], f"{to}.out", width, inside=False)
        dense([mlp[n] for n in ("gate", "up") if n in mlp], f"{to}.up", width)
        dense([mlp["down"]], f"{to}.down", width, inside=False)
    norm(params["readout"]["norm"], "ln")
    if "weight" in params["readout"]:
        named["readout.weight"] = params["readout"]["weight"].T
    return named


@pytest.mark.skipif(PYTHON is None, reason="no PyTorch here; TORCH_PYTHON=PATH names one")
@pytest.mark.parametrize("name", MODELS)
def test_the_peer_has_the_same_loss_and_gradient(name, tmp_path):
    import jax
    import optax

    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model.build import build_model

    shape = MODELS[name]
    config = resolve(config_of(shape, "float32", 1), shape["V"])
    model = build_model(config, platform="cpu")
    rng = np.random.default_rng(0)
    # Far from the initial values, so that every part counts.
    params = jax.tree.map(
        lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), np.float32) + (x.ndim < 3),
        jax.eval_shape(lambda: model.init(jax.random.key(0))),
    )
    tokens = rng.integers(0, shape["V"], (shape["B"], shape["T"] + 1), np.int32)
    x, y = tokens[:, :-1], tokens[:, 1:]
    loss, gradient = jax.value_and_grad(lambda p: model.losses(p, x, y).mean())(params)

    inputs = {"weights": {k: np.asarray(v).tolist() for k, v in theirs(params).items()}}
    path = tmp_path / "given.json"
    path.write_text(json.dumps(inputs | {"tokens": x.tolist(), "targets": y.tolist()}))
    done = subprocess.run(
        [PYTHON, str(PEER), "loss", "--shape", json.dumps(shape), "--weights", str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss"] == pytest.approx(float(loss), rel=2e-5)
    assert result["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=2e-4)


def test_a_shape_says_all_of_a_config():
    from benchmarks.shapes import shape_of
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.configs import llama_50m
    from lmscale_jax.errors import InputError

    config = llama_50m.get_config()
    shape = shape_of(resolve(config, 32_000), 4)
    assert (shape["D"], shape["L"], shape["F"], shape["V"]) == (512, 8, 1408, 32_000)
    assert shape["head"] == "untied" and whole(shape)["B"] == 4
    config.model.qk_norm = "rmsnorm"
    with pytest.raises(InputError, match=r"config\.model\.qk_norm='rmsnorm'"):
        shape_of(resolve(config, 32_000), 4)
