"""Weights written as Hugging Face's and read back, without its packages but safetensors."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import run
from safetensors.numpy import load_file, save_file

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, hf

GPT2 = {"mlp": "gelu", "norm": "layernorm", "bias": True, "positions": "learned", "head": "tied"}
LLAMA = {"mlp": "swiglu", "norm": "rmsnorm", "bias": False, "positions": "rope"}
SHAPES = {
    "gpt2": GPT2,
    "llama": LLAMA | {"head": "untied", "n_kv_heads": 4},
    "llama GQA, tied": LLAMA | {"head": "tied", "n_kv_heads": 2, "head_dim": 16},
}


def resolved(**model):
    config = base.get_config()
    with config.ignore_type():
        config.model.update({"n_layers": 3, "d_model": 32, "n_heads": 4, "vocab_size": 61} | model)
    config.data.seq_len = 24
    return resolve(config)


@pytest.fixture
def written(tmp_path):
    """Makes a directory of weights by the name of their shape: (directory, their own values)."""

    def make(name):
        config = resolved(**SHAPES[name])
        model = build.build_model(config, platform="cpu")
        noise = np.random.default_rng(0)
        start = model.init(jax.random.key(0))
        params = jax.tree.map(lambda x: np.asarray(x) + noise.normal(size=x.shape), start)
        params = jax.tree.map(np.float32, params)
        hf.write_hf(tmp_path / "out", config, params)
        return tmp_path / "out", params

    return make


def read(directory):
    config = resolved(**{"n_kv_heads": 0, "head_dim": 0} | hf.read_config(directory))
    return hf.read_params(directory, config.model, build.build_model(config, platform="cpu").specs)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_is_read_back_to_the_bit(name, written):
    directory, params = written(name)
    assert_same(read(directory), params)


def test_linear_layers_lie_as_in_transformers(written):
    """Conv1D of GPT-2 keeps [in, out] with query, key and value side by side; Linear [out, in]."""
    directory, params = written("gpt2")
    tensors, layer = load_file(directory / hf.WEIGHTS), "transformer.h.1."
    query = params["blocks"]["attention"]["query"]["weight"][1].reshape(32, 32)
    np.testing.assert_array_equal(tensors[f"{layer}attn.c_attn.weight"][:, :32], query)
    up = params["blocks"]["mlp"]["up"]["weight"][1]
    np.testing.assert_array_equal(tensors[f"{layer}mlp.c_fc.weight"], up)
    assert tensors[f"{layer}attn.c_attn.bias"].shape == (96,)


def test_several_files_are_read(written, tmp_path):
    directory, params = written("llama")
    tensors = load_file(directory / hf.WEIGHTS)
    (directory / hf.WEIGHTS).unlink()
    names = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == file}, directory / file)
    (directory / hf.INDEX).write_text(json.dumps({"weight_map": names}))
    assert_same(read(directory), params)


def test_what_we_do_not_have_is_refused_by_name(written):
    directory, _ = written("llama")
    path = directory / hf.CONFIG
    settings = json.loads(path.read_text())
    for change, message in (
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "mamba"}, "model_type='mamba' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            hf.read_config(directory)
    path.write_text(json.dumps(settings | {"intermediate_size": 72}))
    with pytest.raises(InputError, match="but blocks/mlp/gate/weight needs"):
        read(directory)
    path.write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"tensor model\.layers\.3\..* is missing"):
        read(directory)
    path.write_text(json.dumps(settings | {"num_hidden_layers": 2}))
    with pytest.raises(InputError, match=r"model\.layers\.2\..* are not supported"):
        read(directory)
    path.write_text(json.dumps(settings))
    content = (directory / hf.WEIGHTS).read_bytes()
    (directory / hf.WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read(directory)
    (directory / hf.WEIGHTS).rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match="is a pickle and is not opened"):
        read(directory)


def test_what_transformers_does_not_have_is_refused_by_name():
    for changes, message in (
        ({"mlp": "relu2"}, "config.model.mlp='relu2' is not supported"),
        ({"attn_gate": "const"}, "config.model.attn_gate='const' is not supported"),
        ({"bias": False}, "config.model.bias=False is not supported"),
    ):
        with pytest.raises(InputError, match=message):
            hf.hf_family(resolved(**GPT2 | changes))
    config = base.get_config()
    config.model.bias, config.model.vocab_size = True, 61
    config.parametrization.name, config.parametrization.base_width = "mup", 64
    with pytest.raises(InputError, match=r"parametrization\.name='mup' multiplies"):
        hf.hf_family(resolve(config))


def test_a_directory_in_use_is_left_alone(written):
    directory, params = written("gpt2")
    before = (directory / hf.WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="is not empty; use a new directory"):
        hf.write_hf(directory, resolved(**GPT2), params)
    assert (directory / hf.WEIGHTS).read_bytes() == before


def test_without_safetensors_one_line_says_what_to_install(written, tmp_path, monkeypatch):
    directory, params = written("gpt2")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(InputError, match=r"pip install 'lmscale_jax\[hf\]'"):
        read(directory)
    with pytest.raises(InputError, match=r"pip install 'lmscale_jax\[hf\]'"):
        hf.write_hf(tmp_path / "again", resolved(**GPT2), params)
    assert not (tmp_path / "again").exists()


def test_the_command_wants_one_direction(tmp_path):
    status, _, err = run("convert", f"--workdir={tmp_path}")
    assert status == 2 and err.count("\n") == 1 and "--from_hf or --to_hf" in err
