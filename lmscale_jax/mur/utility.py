"""Computes the marginal utility of what a block adds to the residual stream, token by token.

h is the residual stream, δ = h after the block - h before it, and g the gradient of the *summed*
token loss by the stream after the block, through all that follows. To first order -<g, δ> is how
much the token's δ lowers the loss. With the summed loss nothing here depends on how many tokens
share a batch. All of it is float32.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmscale_jax.config.key import Modes

FLOAT = jnp.float32

# Statistics of the utilities of one layer; those of the first line cover all labelled tokens.
STATISTICS = (
    "mean", "p10", "p50", "p90", "frac_below_tau", "delta_norm", "grad_norm", "stderr", "quantile",
    "utility", "hinge",
)  # fmt: skip


class Measure(NamedTuple):
    """How utilities are measured.

    Attributes:
      metric: "cos", "proj" or "raw".
      eps: floor of a token's denominator, as a share of the mean denominator of the batch.
      level: the quantile that the statistic "quantile" is.
    """

    metric: str
    eps: float
    level: float = 0.5


def token_utilities(
    measure: Measure, g_NxD: jax.Array, delta_NxD: jax.Array, labelled_N: jax.Array
):
    """Returns [N]: -<g, δ> ("raw"), over |g| |δ| ("cos") or over |g|^2 ("proj").

    A denominator is at least `eps` times its mean over the labelled tokens, so a common factor of g
    changes no cosine, however small it is. Where a denominator is 0, so are the utility and its
    gradient.
    """
    g_NxD, delta_NxD = g_NxD.astype(FLOAT), delta_NxD.astype(FLOAT)
    raw_N = -(g_NxD * delta_NxD).sum(axis=-1)
    size_N = METRICS[measure.metric].denominator(g_NxD, delta_NxD)
    if size_N is None:
        return raw_N
    floor = measure.eps * masked_mean(size_N, labelled_N)
    positive_N = size_N > 0
    return jnp.where(
        positive_N, raw_N / jnp.maximum(jnp.where(positive_N, size_N, 1.0), floor), 0.0
    )


def safe_norms(x_NxD: jax.Array) -> jax.Array:
    """Returns [N] Euclidean norms, with a gradient of 0 where they are 0."""
    square_N = jnp.square(x_NxD.astype(FLOAT)).sum(axis=-1)
    positive_N = square_N > 0
    return jnp.where(positive_N, jnp.sqrt(jnp.where(positive_N, square_N, 1.0)), 0.0)


class Metric(NamedTuple):
    """One choice of mur.metric, the unit of utilities.

    Attributes:
      denominator: (g [N, D], δ [N, D]) -> [N], what -<g, δ> is divided by, or None.
      noise_floor: width -> standard deviation of the utility in a random direction; None: no
        such number.
    """

    denominator: Callable
    noise_floor: Callable = lambda width: None


METRICS = Modes(
    "mur.metric",
    {
        "cos": Metric(
            lambda g_NxD, delta_NxD: safe_norms(g_NxD) * safe_norms(delta_NxD),
            lambda width: width**-0.5,
        ),
        "proj": Metric(lambda g_NxD, delta_NxD: safe_norms(g_NxD) * safe_norms(g_NxD)),
        "raw": Metric(lambda g_NxD, delta_NxD: None),
    },
)


def masked_mean(values_N: jax.Array, labelled_N: jax.Array) -> jax.Array:
    """Averages over labelled tokens; 0 where there are none."""
    return jnp.where(labelled_N, values_N, 0.0).sum() / jnp.maximum(1, labelled_N.sum())


def token_weights(
    reduce: str, nll_BxT: jax.Array, labelled_BxT: jax.Array, key, k: int, share: float
) -> jax.Array:
    """Returns the tokens' weights in a layer's utility, [B, T] float32 with sum 1.

    "mean": all labelled tokens. "sample_k": `k` of each sequence, drawn without replacement, or all
    where fewer are labelled. "top_loss": the `share` of all with the highest loss.
    """
    chosen_BxT = REDUCTIONS[reduce].choose(nll_BxT, labelled_BxT, key, k, share)
    return chosen_BxT.astype(FLOAT) / jnp.maximum(1, chosen_BxT.sum())


def _all(nll_BxT, labelled_BxT, key, k: int, share: float) -> jax.Array:
    return labelled_BxT


def _drawn(nll_BxT, labelled_BxT, key, k: int, share: float) -> jax.Array:
    draw_BxT = jnp.where(labelled_BxT, jax.random.uniform(key, nll_BxT.shape), -1.0)
    lowest_Bx1 = jax.lax.top_k(draw_BxT, min(k, nll_BxT.shape[1]))[0][:, -1:]
    return labelled_BxT & (draw_BxT >= lowest_Bx1)


def _highest(nll_BxT, labelled_BxT, key, k: int, share: float) -> jax.Array:
    loss_BxT = jnp.where(labelled_BxT, nll_BxT, -jnp.inf)
    count = share_of(share, labelled_BxT.sum(), loss_BxT.size)
    lowest = jnp.sort(loss_BxT.ravel())[loss_BxT.size - jnp.maximum(1, count)]
    return labelled_BxT & (loss_BxT >= lowest)


def share_of(share: float, count: jax.Array, most: int) -> jax.Array:
    """Returns ceil(share * count), int32, for a traced count of at most `most`.

    In integers, because 0.07 * 100 is above 7 in float32.
    """
    p, q = Fraction(str(share)).as_integer_ratio()
    ceilings = jnp.array([-(-p * rest // q) for rest in range(min(q, most + 1))], jnp.int32)
    return ceilings[count] if q > most else p * (count // q) + ceilings[count % q]


class Reduction(NamedTuple):
    """One choice of mur.reduce: the tokens that a layer's utility averages.

    Attributes:
      choose: (nll [B, T], labelled [B, T], key, k, share) -> [B, T] bool, a subset of the labelled.
      draws: it needs a key.
    """

    choose: Callable
    draws: bool = False


REDUCTIONS = Modes(
    "mur.reduce",
    {
        "mean": Reduction(_all),
        "sample_k": Reduction(_drawn, draws=True),
        "top_loss": Reduction(_highest),
    },
)


def hinge(measure: Measure, g_NxD, delta_NxD, labelled_N, weight_N, tau) -> jax.Array:
    """Returns max(0, tau - utility), where utility is the weighted mean over tokens."""
    u_N = token_utilities(measure, g_NxD, delta_NxD, labelled_N)
    return jnp.maximum(0.0, tau - (weight_N * u_N).sum())


def utility_statistics(
    names: tuple[str, ...], measure: Measure, g_NxD, delta_NxD, labelled_BxT, weight_N, tau
) -> jax.Array:
    """Returns the named STATISTICS, [len(names)] float32.

    "p10", "p50", "p90": quantiles of the utility over labelled tokens; "quantile": that at
    `measure.level`. "frac_below_tau": share of labelled tokens below tau. "delta_norm",
    "grad_norm": means of |δ| and |g|. "stderr": standard error of the mean utility, with sequences
    as the independent draws. "utility": the weighted mean; "hinge": max(0, tau - utility).
    """
    labelled_N = labelled_BxT.reshape(-1)
    u_N = token_utilities(measure, g_NxD, delta_NxD, labelled_N)
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "quantile": measure.level}
    if levels.keys() & set(names):
        ordered_N, count = jnp.sort(jnp.where(labelled_N, u_N, jnp.inf)), labelled_N.sum()
    statistics = {
        **{name: lambda q=q: _quantile(ordered_N, count, q) for name, q in levels.items()},
        "mean": lambda: masked_mean(u_N, labelled_N),
        "frac_below_tau": lambda: masked_mean((u_N < tau).astype(FLOAT), labelled_N),
        "delta_norm": lambda: masked_mean(safe_norms(delta_NxD), labelled_N),
        "grad_norm": lambda: masked_mean(safe_norms(g_NxD), labelled_N),
        "stderr": lambda: _standard_error(u_N.reshape(labelled_BxT.shape), labelled_BxT),
        "utility": lambda: (weight_N * u_N).sum(),
        "hinge": lambda: jnp.maximum(0.0, tau - (weight_N * u_N).sum()),
    }
    return jnp.stack([statistics[name]() for name in names])


def _quantile(ordered_N: jax.Array, count, level: float) -> jax.Array:
    """Interpolates linearly in the first `count` values, which are in order."""
    position = level * jnp.maximum(count - 1, 0)
    low = jnp.floor(position).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
    return ordered_N[low] + (position - low) * (ordered_N[high] - ordered_N[low])


def _standard_error(u_BxT: jax.Array, labelled_BxT: jax.Array) -> jax.Array:
    """Returns the standard error of the mean over labelled tokens, a ratio of sums by sequence."""
    B, count_B = u_BxT.shape[0], labelled_BxT.sum(axis=1)
    total_B, count = jnp.where(labelled_BxT, u_BxT, 0.0).sum(axis=1), jnp.maximum(1, count_B.sum())
    residual_B = total_B - count_B * (total_B.sum() / count)
    return jnp.sqrt(B / max(1, B - 1) * jnp.square(residual_B).sum()) / count
