"""Measures the documents of training tokens, which decide what a document mask leaves visible."""

from collections.abc import Sequence

import numpy as np

from lmscale_jax.data import open_shards, prepare
from lmscale_jax.data.shards import Shards
from lmscale_jax.errors import InputError

# By data, vocabulary and length; of data that are prepared.
_ages: dict[str, np.ndarray] = {}


def token_ages(config) -> np.ndarray | None:
    """Computes the distribution of training tokens' ages, or None where data are not prepared.

    The age of a token is the number of tokens from the first of its document to itself, both
    counted. Parts of a mixture count by their shares.

    Args:
      config: resolved.

    Returns:
      float64 [seq_len]: entry k is the fraction of tokens whose age is above k.

    Raises:
      InputError: no token is a document mark.
    """
    data_cfg, ids, length = config.data, config.model.ids, config.data.seq_len
    key = repr((data_cfg.to_dict(), ids))
    if key not in _ages:
        if prepare.find_manifest(data_cfg) is None:
            return None
        data = prepare.prepare_data(data_cfg, ids, log=lambda line: None)
        cache = prepare.cache_root(data_cfg)
        parts = data.mixture or ((data.train, 1),)
        total = sum(weight for _, weight in parts)
        _ages[key] = sum(
            float(weight / total) * _ages_of(shards, data.boundary, length, cache)
            for shards, weight in parts
        )
    return _ages[key]


def _ages_of(shards: Shards, mark: int, length: int, cache) -> np.ndarray:
    counts = open_shards.note_of_shards(
        "documents", shards, cache, [mark, length], lambda: count_ages(shards.find(mark),
        shards.n_tokens, length).tolist(),
    )  # fmt: skip
    return np.array(counts) / shards.n_tokens


def count_ages(starts: Sequence[int], n_tokens: int, length: int) -> np.ndarray:
    """Counts the tokens of a stream whose age is above k, for k below `length`: int64 [length].

    Args:
      starts: positions of the document marks, ascending; tokens before the first are a document.
      n_tokens: tokens of the stream.

    Raises:
      InputError: there is no mark.
    """
    if not len(starts):
        raise InputError(
            f"config.model.mask='document': none of the {n_tokens:,} training tokens is a document "
            f"mark; set data.document_mark to the id with which documents begin, or use 'causal'"
        )
    lengths = np.diff(np.unique(np.concatenate([[0], starts, [n_tokens]])))
    n_longer = len(lengths) - np.cumsum(np.bincount(np.minimum(lengths, length), minlength=length))
    return n_tokens - np.concatenate([[0], np.cumsum(n_longer[: length - 1])])
