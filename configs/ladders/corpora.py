"""Where the larger ladders read their tokens: shards that the user prepared or downloaded."""

from ml_collections import ConfigDict


def shards(run: ConfigDict, path: str, vocab_size: int = 50_257) -> ConfigDict:
    """The run's data from .bin shards, those with "val" in their name held out.

    `vocab_size` is that of the tokenizer that made them, by default GPT-2's.
    """
    run.data.source, run.data.path = "bin", path
    run.data.tokenizer, run.data.vocab_size = "bpe", 4096
    run.model.vocab_size = vocab_size
    run.eval.every, run.eval.tokens, run.eval.sample = 0, 2_000_000, 0
    return run
