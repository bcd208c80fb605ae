"""GPT-2, Llama and Transformer++ at about 50M, 100M and 300M parameters.

At one size the three differ in the block alone: depth, width, heads, batch, learning rate and data
are the same, so that a difference in loss can be laid to the block. Their parameter counts are not
equal (Transformer++ gates an MLP of the full 4 d_model, Llama reads out with a matrix of its own);
compare them by counts or FLOPs, not by name.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from lmscale_jax.config.keys import get_config as base
from lmscale_jax.errors import InputError

# Where the tokens come from: FineWeb-Edu off the hub, or the standard library's source, 30 MB of
# text on every machine, of which these budgets are many epochs, as `--explain` counts.
WEB, EMBEDDED = "fineweb_edu", "embedded"


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape and recipe of one size.

    The budget is about 20 tokens per parameter, where more parameters and more tokens buy about
    the same (Hoffmann et al. 2022, arXiv 2203.15556).

    Batch and peak learning rate follow GPT-3's smallest models (Brown et al. 2020, arXiv
    2005.14165, table 2.1: 0.5M tokens, with 6e-4 at 125M and 3e-4 at 350M parameters); below 300M
    the batch is smaller, so that a budget this short still has several thousand steps. `accum`
    keeps a micro-batch at 16,384 tokens, which one accelerator with 16 GiB holds and 8 or 16
    devices divide.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_ff_llama: int
    seq_len: int
    batch_size: int
    accum: int
    tokens: float
    lr: float


SIZES = {
    # 131,072 tokens a step, 7,630 steps
    "50m": Size(8, 512, 8, 1408, seq_len=512, batch_size=256, accum=8, tokens=1e9, lr=1e-3),
    # 262,144 tokens a step, 7,630 steps
    "100m": Size(10, 768, 12, 2048, seq_len=512, batch_size=512, accum=16, tokens=2e9, lr=6e-4),
    # 524,288 tokens a step, 11,445 steps
    "300m": Size(20, 1024, 16, 2816, seq_len=1024, batch_size=512, accum=32, tokens=6e9, lr=3e-4),
}


def gpt2(size: str, corpus: str = WEB) -> ConfigDict:
    """GPT-2 (Radford et al. 2019): LayerNorm, GELU, biases, learned positions, tied readout.

    Its dropout of 0.1 is left at 0: it served many passes over little data, costs loss in a single
    pass over much, and would rule out the fused attention kernels.
    """
    config = _recipe(SIZES[size], corpus)
    config.model.bias = True
    config.model.max_seq_len = 1024
    return config


def llama(size: str, corpus: str = WEB) -> ConfigDict:
    """Llama (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, SwiGLU, RoPE, no biases, untied."""
    config = _recipe(SIZES[size], corpus)
    model = config.model
    model.norm, model.mlp, model.positions, model.head = "rmsnorm", "swiglu", "rope", "untied"
    model.d_ff = SIZES[size].d_ff_llama
    config.parametrization.residual_init = "plain"
    return config


def transformer_pp(size: str, corpus: str = WEB) -> ConfigDict:
    """Transformer++ of the Marginal Utility Regularization study.

    RMSNorm and a SwiGLU of the full 4 d_model, but with biases, learned positions and a tied
    readout. Its dropout of 0.1 is left at 0, as in `gpt2`.
    """
    config = _recipe(SIZES[size], corpus)
    model = config.model
    model.norm, model.mlp, model.bias = "rmsnorm", "swiglu", True
    model.d_ff = 4 * model.d_model
    model.max_seq_len = 1024
    config.parametrization.residual_init = "plain"
    return config


def _recipe(size: Size, corpus: str) -> ConfigDict:
    """What the three families share at one size."""
    config = base()
    model = config.model
    model.n_layers, model.d_model, model.n_heads = size.n_layers, size.d_model, size.n_heads
    model.dtype = "bfloat16"
    config.optim.lr = size.lr
    # 380 to 570 steps: several times the memory of the second moment (1 / (1 - beta2) = 20 steps),
    # and near GPT-3's 715.
    config.schedule.warmup = "5%"
    # Steps, not train.tokens: so that --config.train.steps=20 alone is a valid override.
    config.train.steps = math.ceil(size.tokens / (size.batch_size * size.seq_len))
    config.train.batch_size, config.train.accum = size.batch_size, size.accum
    config.data.vocab_size = 32_000
    config.data.seq_len = size.seq_len
    if corpus == WEB:
        # A page has about 1,000 tokens; a sixth more than one pass needs.
        config.data.source, config.data.limit = WEB, round(7 / 6 * size.tokens / 1000)
    elif corpus != EMBEDDED:
        raise InputError(f"--config=...:{corpus}: {WEB!r} or {EMBEDDED!r} would work")
    return config
