"""What the models of the nanoGPT speedruns have in common."""

from ml_collections import ConfigDict

from lmscale_jax.config import corpora, keys


def embedded() -> ConfigDict:
    """12 blocks of width 768, ReLU², unit queries and keys, matrices by Muon.

    On the embedded corpus, with as many rows as GPT-2's padded vocabulary.
    """
    c = keys.get_config()
    m = c.model
    m.n_layers, m.d_model, m.n_heads, m.vocab_size = 12, 768, 6, 50_304
    m.mlp, m.norm, m.norm_eps, m.dtype = "relu2", "rmsnorm", 1.2e-7, "bfloat16"
    m.positions, m.qk_norm = "rope", "rmsnorm"
    c.parametrization.residual_init = "zeros"
    c.optim.name, c.optim.weight_decay, c.optim.clip = "muon", 0.0, 0.0
    c.schedule.name, c.schedule.warmup, c.schedule.final = "wsd", "0", 0.0
    c.data.vocab_size, c.data.seq_len, c.train.batch_size = 32_000, 1024, 512
    return c


def untied(c: ConfigDict) -> None:
    """The readout, rotation, scale of attention and AdamW of the two records."""
    m, p, o = c.model, c.parametrization, c.optim
    m.rope_channels, m.rope_theta, m.head, m.logit_softcap = "half", 1024.0, "untied", 15.0
    p.embed_std, p.head_init, p.attention_scale = 1.0, "zeros", 0.12 * 128**0.5
    o.muon_scale, o.beta1, o.beta2, o.eps = "kj", 0.8, 0.95, 1e-10


def on(c: ConfigDict, path: str) -> ConfigDict:
    """On shards of GPT-2's tokens, if a path is given."""
    return corpora.shards(c, path, vocab_size=50_304) if path else c
