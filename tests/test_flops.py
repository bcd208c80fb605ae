"""Counts, FLOPs and peaks, against hand counts and XLA's own."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs.base import get_config
from lmscale_jax.model import build, flops


def small(**changes) -> ConfigDict:
    """A resolved config of a model that compiles in a second."""
    config = get_config()
    defaults = {
        "model.n_layers": 2,
        "model.d_model": 64,
        "model.n_heads": 4,
        "data.seq_len": 32,
        "train.batch_size": 4,
        "model.attention": "plain",
    }
    config.update_from_flattened_dict(defaults | changes)
    return resolve(config, vocab_size=512)


def described(config) -> build.Model:
    return build.build_model(config, platform="cpu")


def test_named_models_train_on_the_web_or_on_this_machine():
    from lmscale_jax.configs import llama_100m
    from lmscale_jax.errors import InputError

    web, embedded = llama_100m.get_config(), llama_100m.get_config("embedded")
    # About 1,000 tokens a page: enough for one pass, and not twice as many.
    assert web.data.source == "fineweb_edu" and 2e6 < web.data.limit < 3e6
    assert (embedded.data.source, embedded.data.limit) == ("stdlib", 0)
    assert embedded.model == web.model and embedded.train == web.train
    with pytest.raises(InputError, match="embeded: use 'fineweb_edu' or 'embedded'"):
        llama_100m.get_config("embeded")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2_50m", 42_128_384),
        ("llama_50m", 58_466_816),
        ("transformer_pp_50m", 50_524_672),
        ("gpt2_100m", 96_242_688),
        ("llama_100m", 119_947_008),
        ("transformer_pp_100m", 119_850_240),
        ("gpt2_300m", 285_743_104),
        ("llama_300m", 322_479_104),
        ("transformer_pp_300m", 369_669_120),
    ],
)
def test_named_configs_have_exactly_the_published_counts(name, total):
    config = importlib.import_module(f"lmscale_jax.configs.{name}").get_config()
    n = flops.parameter_counts(described(resolve(config, config.data.vocab_size)).specs)
    assert n["total"] == total
    assert n["embedding"] + n["non_embedding"] == total


def test_non_embedding_count_does_not_depend_on_tying_window_or_vocabulary():
    n = {
        flops.parameter_counts(described(small(**change)).specs)["non_embedding"]
        for change in (
            {},
            {"model.head": "untied"},
            {"data.seq_len": 16},
            {"model.vocab_size": 999},
        )
    }
    assert len(n) == 1


def test_tiny_model_by_hand():
    # D=8, H=2, d=4, F=32, L=1, V=10, T=6; no biases, learned positions, tied.
    config = small(
        **{"model.n_layers": 1, "model.d_model": 8, "model.n_heads": 2, "data.seq_len": 6},
        **{"model.vocab_size": 512},
    )
    specs = described(config).specs
    products = 4 * 8 * 8 + 2 * 8 * 32
    norms = 3 * 8
    tables = 512 * 8 + 6 * 8
    assert flops.parameter_counts(specs) == {
        "total": products + norms + tables,
        "non_embedding": products + norms,
        "embedding": tables,
    }
    # Two products of 2 d multiplications and additions, 2 heads, (1 + ... + 6) / 6 keys on average.
    attention = 2 * 2 * 4 * 2 * 3.5
    per_token = flops.flops_per_token(config, specs)
    assert per_token["model"] == 3 * (2 * products + 2 * 512 * 8 + attention)
    assert per_token["6n"] == 6 * (products + norms + tables)
    assert per_token["6n_non_embedding"] == 6 * (products + norms)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.mlp": "swiglu", "model.head": "untied", "model.norm": "rmsnorm"},
        {"model.n_kv_heads": 2, "model.positions": "rope", "model.bias": True},
    ],
)
def test_forward_flops_agree_with_the_compiler(changes):
    # Wide enough that products outweigh what is not counted: norms, softmax, activations.
    # Unrolled, because the compiler counts the body of a loop once.
    wide = {"model.d_model": 256, "model.n_heads": 2, "data.seq_len": 64, "model.stack": "unroll"}
    config = small(**wide, **changes)
    model = build.build_model(config, platform="definition")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    compiled = jax.jit(model.logits).lower(shapes, tokens).compile()
    parts = flops.forward_flops(config, model.specs)
    # The definition computes the whole square of attention and masks half of it.
    ours = 4 * 64 * (parts["dense"] + parts["readout"] + 2 * parts["attention"])
    assert compiled.cost_analysis()["flops"] == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "flops_per_second"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_or_none(kind, flops_per_second):
    assert flops.peak_flops(kind, "bfloat16") == flops_per_second
    assert flops.peak_flops(kind, "float32") is None
