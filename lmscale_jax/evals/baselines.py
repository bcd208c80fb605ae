"""What a model must beat: unigram and bigram models of the same tokens."""

import numpy as np

MOST_TOKENS = 50_000_000


def losses(train, val, vocab_size: int, val_tokens: int) -> dict[str, float]:
    """Held-out losses in nats a token: {"unigram", "bigram"}.

    `train` and `val` are token streams with `n_tokens` and `read(start, length)`; the counts come
    from at most the first 50M training tokens. The unigram adds one to every count. The bigram
    interpolates with it by Witten and Bell's weight n(a) / (n(a) + t(a)), where n(a) counts the
    occurrences of a and t(a) its different successors (1991, IEEE Trans. Inf. Theory 37).
    """
    seen = np.asarray(train.read(0, min(train.n_tokens, MOST_TOKENS)), np.int64)
    held = np.asarray(val.read(0, min(val.n_tokens, val_tokens + 1 or val.n_tokens)), np.int64)
    unigram_V = (np.bincount(seen, minlength=vocab_size) + 1.0) / (len(seen) + vocab_size)
    pairs, counts = np.unique(seen[:-1] * vocab_size + seen[1:], return_counts=True)
    first = pairs // vocab_size
    follow_V = np.bincount(first, weights=counts, minlength=vocab_size)
    kinds_V = np.bincount(first, minlength=vocab_size)
    wanted = held[:-1] * vocab_size + held[1:]
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[at] == wanted, counts[at], 0)
    a, b = held[:-1], held[1:]
    # An unseen a has n = t = 0: then the unigram alone speaks.
    bigram = (count + kinds_V[a] * unigram_V[b]) / np.maximum(1, follow_V[a] + kinds_V[a])
    bigram = np.where(follow_V[a] > 0, bigram, unigram_V[b])
    return {
        "unigram": float(-np.log(unigram_V[b]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }
