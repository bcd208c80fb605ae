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
from lmscale_jax.reports import final_summary, pairs, run_report
from lmscale_jax.scaling import read_table
from lmscale_jax.train import evaluation, restore

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


def random_gpt2(width=16, vocab=211) -> tuple[dict, dict]:
    """A random GPT-2 as save_pretrained names its tensors, and its config.json."""
    chance = np.random.default_rng(0)
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (24, width), "ln_f.weight": (width,),
              "ln_f.bias": (width,)}  # fmt: skip
    for name, ins, out in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4),
                           ("mlp.c_proj", 4, 1)):  # fmt: skip
        shapes |= {f"h.0.{name}.weight": (ins * width, out * width)}
        shapes |= {f"h.0.{name}.bias": (out * width,)}
    shapes |= {f"h.0.ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    settings = {"model_type": "gpt2", "n_layer": 1, "n_embd": width, "n_head": 2,
                "n_positions": 24, "vocab_size": vocab}  # fmt: skip
    tensors = {f"transformer.{k}": chance.normal(0, 0.1, s) for k, s in shapes.items()}
    return tensors, settings


def random_llama(width=16, vocab=211) -> tuple[dict, dict]:
    """A random Llama with grouped keys."""
    chance = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,), f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        f"{layer}self_attn.q_proj.weight": (width, width),
        f"{layer}self_attn.k_proj.weight": (width // 2, width),
        f"{layer}self_attn.v_proj.weight": (width // 2, width),
        f"{layer}self_attn.o_proj.weight": (width, width),
        f"{layer}mlp.gate_proj.weight": (24, width), f"{layer}mlp.up_proj.weight": (24, width),
        f"{layer}mlp.down_proj.weight": (width, 24),
    }  # fmt: skip
    settings = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": width,
                "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
                "vocab_size": vocab}  # fmt: skip
    return {k: chance.normal(0, 0.1, s) for k, s in shapes.items()}, settings


def saved(directory, tensors, settings):
    directory.mkdir()
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, directory / hf.WEIGHTS, metadata={"format": "pt"})
    (directory / hf.CONFIG).write_text(json.dumps(settings))
    return tensors


def assert_exported(workdir, directory, tensors):
    """What the command writes for --to_hf: the same names and the same bits."""
    loaded = restore.load_run(workdir)
    hf.write_hf(directory, loaded.run.config, loaded.params)
    again = load_file(directory / hf.WEIGHTS)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k].view(np.uint32), tensors[k].view(np.uint32)) for k in again)
    return loaded


@pytest.mark.parametrize(
    "random_model", [random_gpt2, pytest.param(random_llama, marks=pytest.mark.slow)]
)
def test_in_and_out_without_data_and_tokenizer(random_model, tmp_path):
    tensors = saved(tmp_path / "in", *random_model())
    imported = restore.import_run(None, tmp_path / "in", tmp_path / "w", lambda line: None)
    assert imported["final"]["val_loss"] is None
    assert json.loads((tmp_path / "w" / "run.json").read_text())["status"] == "finished"
    loaded = assert_exported(tmp_path / "w", tmp_path / "out", tensors)
    # A document of nothing begins with some token; a prompt has no ids.
    assert len(final_summary.sample_text(loaded.run, loaded.params, 3).split()) == 3
    with pytest.raises(InputError, match="--prompt=hello: the run's data has no tokenizer"):
        final_summary.sample_text(loaded.run, loaded.params, 3, "hello")
    with pytest.raises(InputError, match=r"source='none' has no held-out tokens"):
        evaluation.evaluate_run(tmp_path / "w", ["perplexity"], 0, 0, lambda line: None)
    assert not (tmp_path / "w" / "eval.json").exists()
    # Reports show what there is of it, and fits say in one line that it measures nothing.
    page = run_report.report_run(pairs.read_run(tmp_path / "w"), tmp_path / "report")
    assert "not evaluated" in page.read_text()
    with pytest.raises(InputError, match="1 finished run without a validation loss"):
        read_table(str(tmp_path / "w"))


@pytest.mark.slow
def test_the_tokenizer_beside_the_weights_is_the_model_s(tmp_path, corpus):
    """With it text is sampled without data, and the data of a config are read and evaluated."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|endoftext|>"])
    tensors = saved(tmp_path / "in", *random_gpt2(vocab=257))
    library.save(str(tmp_path / "in" / "tokenizer.json"))
    restore.import_run(None, tmp_path / "in", tmp_path / "w", lambda line: None)
    loaded = assert_exported(tmp_path / "w", tmp_path / "out", tensors)
    assert final_summary.sample_text(loaded.run, loaded.params, 3, "hello").startswith("hello")
    restore.copy_tokenizer(loaded.run.config.data, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    config = base.get_config()
    config.data.source, config.data.path, config.data.vocab_size = "text", str(corpus), 300
    config.data.cache, config.data.seq_len, config.eval.tokens = str(tmp_path / "c"), 24, 500
    # Of another architecture: the weights bring their own.
    config.model.logit_softcap, config.parametrization.output_scale = 15.0, 1.0
    config.parametrization.name, config.parametrization.base_width = "mup", 64
    imported = restore.import_run(config, tmp_path / "in", tmp_path / "v", lambda line: None)
    assert imported["final"]["val_tokens"] == 500 and imported["final"]["bits_per_byte"] > 0
    assert imported["config"]["data"]["tokenizer_path"] == str(tmp_path / "in")
    assert imported["config"]["model"]["logit_softcap"] == 0.0
    assert imported["config"]["parametrization"]["name"] == "sp"


@pytest.mark.parametrize("command", [["convert", "--from_hf=none", "--workdir=none"],
                                     ["prepare", "--source=text", "--path=none"]],
                         ids=["convert", "prepare"])  # fmt: skip
def test_a_config_of_another_kind_is_one_line(command):
    status, _, err = run(*command, "--config=configs/ladders/quickstart.py")
    assert status == 2 and err.count("\n") == 1 and "is not a key" in err, err
