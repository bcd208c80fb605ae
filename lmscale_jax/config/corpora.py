"""Runs that ladders have in common: small ones on the embedded corpus, larger ones on shards."""

from ml_collections import ConfigDict

from lmscale_jax.config import keys


def embedded() -> ConfigDict:
    """A small decoder of the Llama family on the Python standard library's source."""
    run = keys.get_config()
    run.model.norm, run.model.mlp, run.model.positions = "rmsnorm", "swiglu", "rope"
    run.data.vocab_size, run.data.seq_len = 1024, 128
    run.optim.lr, run.train.batch_size = 6e-3, 16
    # About 1 / sqrt(width): with GPT-2's 0.02, meant for 768 channels, arms lose 0.2 to 0.7 nats
    # at 100k parameters, not the same amount, and not the same at every rate.
    run.parametrization.init_std = 0.08
    run.eval.every, run.eval.tokens, run.eval.sample, run.eval.baselines = 0, 200_000, 0, False
    run.log.tensorboard = False
    return run


def shards(run: ConfigDict, path: str, vocab_size: int = 50_257) -> ConfigDict:
    """The run's data from .bin shards, those with "val" in their name held out.

    `vocab_size` is that of the tokenizer that made them, by default GPT-2's.
    """
    run.data.source, run.data.path = "bin", path
    run.data.tokenizer, run.data.vocab_size = "bpe", 4096
    run.model.vocab_size = vocab_size
    run.eval.every, run.eval.tokens, run.eval.sample = 0, 2_000_000, 0
    return run
