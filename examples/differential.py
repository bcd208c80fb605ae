"""Differential attention.

`model.attention_module = here(__file__) + "differential.py:Differential"`.

Each head subtracts two attention maps, softmax(q1 k1) - share softmax(q2 k2) (Ye et al. 2024, arXiv
2410.05258), with a learned share for each block.
"""

import jax
import jax.numpy as jnp

from lmscale_jax.api import Dense, Key, nnx, rotate, scalar


class Differential(nnx.Module):
    """Called with the normed stream [N, D] of N = B * T tokens, it returns [N, D]."""

    KEYS = {"share": Key(0.2, "initial share of the second map", low=0.0, high=1.0)}

    def __init__(self, model, settings):
        width = {"embed": model.d_model}
        heads = {"heads": model.n_heads, "head_dim": model.head_dim}
        self.heads, self.size = model.n_heads, model.head_dim
        self.query1, self.query2 = Dense(width, heads, model.bias), Dense(width, heads, model.bias)
        self.key1, self.key2 = Dense(width, heads, model.bias), Dense(width, heads, model.bias)
        self.value = Dense(width, heads, model.bias)
        self.out = Dense(heads, width, model.bias, residual=True)
        self.share = scalar(settings.share)

    def __call__(self, x_NxD, context):
        # Never reshape to [B, T]: a mesh may order the tokens differently (mesh.sequence).
        def by_head(dense):
            y_NxC = dense(x_NxD, context)
            return context.unflatten(y_NxC.reshape(len(y_NxC), self.heads, self.size))

        map1 = self.map(by_head(self.query1), by_head(self.key1), context)
        map2 = self.map(by_head(self.query2), by_head(self.key2), context)
        weights_BxHxTxS = map1 - self.share[...] * map2
        v_BxSxHxd = by_head(self.value)
        o_BxTxHxd = jnp.einsum(
            "bhts,bshd->bthd", weights_BxHxTxS.astype(v_BxSxHxd.dtype), v_BxSxHxd
        )
        return self.out(context.flatten(o_BxTxHxd).reshape(len(x_NxD), -1), context)

    def map(self, q_BxTxHxd, k_BxSxHxd, context):
        """Returns the weights of each query over the keys that it sees, float32 [B, H, T, S]."""
        if context.rope is not None:
            q_BxTxHxd, k_BxSxHxd = rotate(q_BxTxHxd, context.rope), rotate(k_BxSxHxd, context.rope)
        scores = jnp.einsum("bthd,bshd->bhts", q_BxTxHxd, k_BxSxHxd).astype(jnp.float32)
        visible_BxTxS = context.visible()
        scores = jnp.where(visible_BxTxS[:, None], context.scales.attention * scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1)

    def flops(self, seq_len, visible):
        """Counts the forward FLOPs of a token in products that are no Dense: 3 for each key."""
        return 3 * 2.0 * visible * self.heads * self.size
