"""GPT-2, Llama and Transformer++ at about 50M, 100M and 300M parameters.

At one size the three differ only in the block: depth, width, heads, batch, learning rate and data
are the same, so that the block explains a difference in loss. Their parameter counts differ
(Transformer++ gates an MLP of the full 4 d_model, Llama has an untied readout); compare them by
counts or FLOPs.

Also the settings that the nanoGPT speedruns share, and those that ladders share: small runs on the
embedded corpus, larger ones on shards.
"""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from lmscale_jax.config import keys
from lmscale_jax.config.keys import get_config as base
from lmscale_jax.errors import InputError

# Corpora: FineWeb-Edu from the hub, or the source of Python's standard library. The latter is 30 MB
# of text on every machine; these budgets are many epochs of it, which `--explain` counts.
WEB, EMBEDDED = "fineweb_edu", "embedded"
# The id of <|endoftext|>, with which the speedruns' shards begin every document.
GPT2_MARK = 50_256


@dataclasses.dataclass(frozen=True)
class FamilySize:
    """The shape and recipe of one size.

    The budget is about 20 tokens per parameter, the compute-optimal ratio of Hoffmann et al. 2022
    (arXiv 2203.15556).

    Batch and peak learning rate follow GPT-3's smallest models (Brown et al. 2020, arXiv
    2005.14165, table 2.1: 0.5M tokens, with 6e-4 at 125M and 3e-4 at 350M parameters); below 300M
    the batch is smaller, so that a budget this short still has several thousand steps.

    `accum` divides the batch into micro-batches, {name of a memory: parts}: by default one GPU with
    80 GB holds them, with `:16gb` an accelerator with 16 GB, each with a quarter to spare
    (tests/test_config_memory.py). `remat` names the memories that need model.remat="block" too.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_ff_llama: int
    seq_len: int
    batch_size: int
    accum: dict[str, int]
    tokens: float
    lr: float
    remat: tuple[str, ...] = ()


# The memory of the accelerator that micro-batches are for; the first is the default.
MEMORIES = ("80gb", "16gb")


def split_options(text: str) -> tuple[str, str]:
    """Splits the argument of a config, "embedded,16gb", into ("embedded", "16gb")."""
    words = text.split(",")
    memory = next((word for word in words if word in MEMORIES), MEMORIES[0])
    return ",".join(word for word in words if word not in MEMORIES), memory


SIZES = {
    # 131,072 tokens a step, 7,630 steps
    "50m": FamilySize(
        8, 512, 8, 1408, seq_len=512, batch_size=256, accum={"80gb": 2, "16gb": 8}, tokens=1e9,
        lr=1e-3,
    ),
    # 262,144 tokens a step, 7,630 steps
    "100m": FamilySize(
        10, 768, 12, 2048, seq_len=512, batch_size=512, accum={"80gb": 4, "16gb": 16}, tokens=2e9,
        lr=6e-4,
    ),
    # 524,288 tokens a step, 11,445 steps
    "300m": FamilySize(
        20, 1024, 16, 2816, seq_len=1024, batch_size=512, accum={"80gb": 16, "16gb": 64},
        tokens=6e9, lr=3e-4, remat=("16gb",),
    ),
}  # fmt: skip


def gpt2(size: str, options: str = WEB) -> ConfigDict:
    """GPT-2 (Radford et al. 2019): LayerNorm, GELU, biases, learned positions, tied readout.

    Dropout is 0 instead of 0.1: it helps in many passes over little data, costs loss in a single
    pass over much, and excludes the fused attention kernels.
    """
    config = _recipe(SIZES[size], options)
    config.model.bias = True
    config.model.max_seq_len = 1024
    return config


def llama(size: str, options: str = WEB) -> ConfigDict:
    """Llama (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, SwiGLU, RoPE, no biases, untied."""
    config = _recipe(SIZES[size], options)
    model = config.model
    model.norm, model.mlp, model.positions, model.head = "rmsnorm", "swiglu", "rope", "untied"
    model.d_ff = SIZES[size].d_ff_llama
    config.parametrization.residual_init = "plain"
    return config


def transformer_pp(size: str, options: str = WEB) -> ConfigDict:
    """Transformer++ of the Marginal Utility Regularization study.

    RMSNorm and a SwiGLU of the full 4 d_model, but with biases, learned positions and a tied
    readout. Dropout is 0 instead of 0.1, as in `gpt2`.
    """
    config = _recipe(SIZES[size], options)
    model = config.model
    model.norm, model.mlp, model.bias = "rmsnorm", "swiglu", True
    model.d_ff = 4 * model.d_model
    model.max_seq_len = 1024
    config.parametrization.residual_init = "plain"
    return config


def _recipe(size: FamilySize, options: str) -> ConfigDict:
    """Returns what the three families share at one size. Raises InputError."""
    corpus, memory = split_options(options)
    corpus = corpus or WEB
    config = base()
    model = config.model
    if memory in size.remat:
        # As a scan: compiled for an H100 so, and no compiler merges what is recomputed.
        model.remat, model.stack = "block", "scan"
    model.n_layers, model.d_model, model.n_heads = size.n_layers, size.d_model, size.n_heads
    model.dtype = "bfloat16"
    config.optim.lr = size.lr
    # 380 to 570 steps: several times the memory of the second moment (1 / (1 - beta2) = 20 steps),
    # and near GPT-3's 715.
    config.schedule.warmup = "5%"
    # Steps, not train.tokens: so that --config.train.steps=20 alone is a valid override.
    config.train.steps = math.ceil(size.tokens / (size.batch_size * size.seq_len))
    config.train.batch_size, config.train.accum = size.batch_size, size.accum[memory]
    config.data.vocab_size = 32_000
    config.data.seq_len = size.seq_len
    if corpus == WEB:
        # A page has about 1,000 tokens; a sixth more than one pass needs.
        config.data.source, config.data.limit = WEB, round(7 / 6 * size.tokens / 1000)
    elif corpus != EMBEDDED:
        raise InputError(
            f"--config=...:{corpus}: use {WEB!r} or {EMBEDDED!r}, and '16gb' after a comma or alone"
        )
    return config


def speedrun_base() -> ConfigDict:
    """Returns what the speedruns share: 12 blocks of width 768, ReLU², QK norm, Muon.

    The corpus is the embedded one, the vocabulary as large as GPT-2's padded one.
    """
    c = keys.get_config()
    m = c.model
    m.n_layers, m.d_model, m.n_heads, m.vocab_size = 12, 768, 6, 50_304
    m.mlp, m.norm, m.norm_eps, m.dtype = "relu2", "rmsnorm", 1.2e-7, "bfloat16"
    m.positions, m.qk_norm = "rope", "rmsnorm"
    c.parametrization.residual_init = "zeros"
    c.optim.name, c.optim.weight_decay, c.optim.clip = "muon", 0.0, 0.0
    c.schedule.name, c.schedule.warmup, c.schedule.final = "wsd", "0", 0.0
    # 64 rows of 1,024 at a time: what one GPU with 80 GB holds, and 8 devices divide.
    c.data.vocab_size, c.data.seq_len, c.train.batch_size, c.train.accum = 32_000, 1024, 512, 8
    return c


def untie_readout(c: ConfigDict) -> None:
    """Sets the untied readout, RoPE, attention scale and AdamW of the two records."""
    m, p, o = c.model, c.parametrization, c.optim
    m.rope_channels, m.rope_theta, m.head, m.logit_softcap = "half", 1024.0, "untied", 15.0
    p.embed_std, p.head_init, p.attention_scale = 1.0, "zeros", 0.12 * 128**0.5
    o.muon_scale, o.beta1, o.beta2, o.eps = "kj", 0.8, 0.95, 1e-10


def on_path(c: ConfigDict, path: str) -> ConfigDict:
    """Returns the run on shards of GPT-2's tokens, or unchanged for path ''."""
    return on_shards(c, path, vocab_size=50_304) if path else c


def small_decoder() -> ConfigDict:
    """Returns a small Llama on the source of Python's standard library."""
    run = keys.get_config()
    run.model.norm, run.model.mlp, run.model.positions = "rmsnorm", "swiglu", "rope"
    run.data.vocab_size, run.data.seq_len = 1024, 128
    run.optim.lr, run.train.batch_size = 6e-3, 16
    # About 1 / sqrt(width): with GPT-2's 0.02, meant for 768 channels, arms lose 0.2 to 0.7 nats
    # at 100k parameters, an amount that differs by arm and by rate.
    run.parametrization.init_std = 0.08
    run.eval.every, run.eval.tokens, run.eval.sample, run.eval.baselines = 0, 200_000, 0, False
    run.log.tensorboard = False
    return run


def on_shards(run: ConfigDict, path: str, vocab_size: int = 50_257) -> ConfigDict:
    """Sets .bin shards as the run's data; those with "val" in their name are held out.

    A prepared directory, or a glob of its shards, says its vocabulary and document mark itself.
    Bare shards are taken for GPT-2's; `vocab_size` are the rows of the model's tables for them.
    """
    run.data.source, run.data.path = "bin", path
    run.data.tokenizer, run.data.vocab_size = "bpe", 4096
    first = Path(path.partition(",")[0]).expanduser()
    if ((first if first.is_dir() else first.parent) / "manifest.json").is_file():
        run.model.vocab_size = 0
    else:
        run.model.vocab_size, run.data.document_mark = vocab_size, GPT2_MARK
    run.eval.every, run.eval.tokens, run.eval.sample = 0, 2_000_000, 0
    return run
