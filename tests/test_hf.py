"""Weights of transformers' own models in and out: the same logits, the same bits."""

import json

import jax
import numpy as np
import pytest
from conftest import flags, run

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.model import build

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("safetensors", reason="needs safetensors")

from lmscale_jax.model import hf  # noqa: E402

VOCAB, T = 61, 24


def theirs(name):
    """A randomly initialised model of transformers, its biases and gains away from 0 and 1."""
    shapes = {
        "gpt2": lambda: transformers.GPT2Config(
            n_layer=3, n_embd=32, n_head=4, n_positions=T, vocab_size=VOCAB
        ),
        "gpt2 erf, narrow": lambda: transformers.GPT2Config(
            n_layer=2, n_embd=24, n_head=2, n_inner=40, n_positions=32, vocab_size=VOCAB,
            activation_function="gelu",
        ),
        "llama": lambda: llama(num_key_value_heads=4),
        "llama GQA, tied": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
        "llama heads of another size": lambda: llama(num_key_value_heads=1, head_dim=16),
    }  # fmt: skip
    config = shapes[name]()
    torch.manual_seed(0)
    kind = transformers.GPT2LMHeadModel if "gpt2" in name else transformers.LlamaForCausalLM
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def llama(**changes):
    return transformers.LlamaConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=56,
        vocab_size=VOCAB, max_position_embeddings=64, **changes,
    )  # fmt: skip


NAMES = ["gpt2", "gpt2 erf, narrow", "llama", "llama GQA, tied", "llama heads of another size"]


def ours(directory):
    config = base.get_config()
    with config.ignore_type():
        config.model.update(hf.read_config(directory))
    config.data.seq_len = T
    config = resolve(config)
    model = build.build_model(config, platform="cpu")
    return config, model, hf.read_params(directory, config.model, model.specs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    peer = theirs(name)
    peer.save_pretrained(tmp_path / "in")
    config, model, params = ours(tmp_path / "in")
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, T))
    with torch.no_grad():
        wanted = peer(torch.from_numpy(ids)).logits.numpy()
    logits = np.asarray(jax.jit(model.logits)(params, ids))
    np.testing.assert_allclose(logits, wanted, atol=2e-5, rtol=2e-5)
    hf.write_hf(tmp_path / "out", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(peer)
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.from_numpy(ids)).logits.numpy(), wanted)
    _, _, back = ours(tmp_path / "out")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_files_are_read(tmp_path):
    peer = theirs("llama")
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    single, several = ours(tmp_path / "one")[2], ours(tmp_path / "many")[2]
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(several), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_published_kind_of_model_can_be_evaluated(settings, tmp_path):
    """In, evaluated, out again, as a user does it."""
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, n_positions=32, vocab_size=257)
    )
    peer.save_pretrained(tmp_path / "in")
    data = {k: v for k, v in settings.items() if k.startswith(("data.", "eval.tokens"))}
    status, _, err = run(
        "convert", f"--from_hf={tmp_path / 'in'}", f"--workdir={tmp_path / 'w'}",
        "--config=configs/base.py", *flags(data),
    )  # fmt: skip
    assert status == 0, err
    status, _, err = run(
        "evaluate", f"--workdir={tmp_path / 'w'}", "--suites=perplexity,redundancy,attention"
    )
    assert status == 0, err
    scores = json.loads((tmp_path / "w" / "eval.json").read_text())
    assert len(scores["block_influence"]) == 3 and abs(scores["val_loss"] - np.log(257)) < 0.2
    assert len(scores["attention"]["sink"]) == 3 and scores["complete"]
    status, _, err = run("convert", f"--workdir={tmp_path / 'w'}", f"--to_hf={tmp_path / 'out'}")
    assert status == 0, err
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for a, b in zip(peer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
