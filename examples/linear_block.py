"""A block; `model.block = here(__file__) + "linear_block.py:LinearBlock"`.

Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) and the MLP read one norm of the
stream, in parallel. `parts` declares the norm and the MLP that the config names.
"""

import jax
import jax.numpy as jnp

from lmscale_jax.api import Dense, nnx


class LinearAttention(nnx.Module):
    """phi(q) S / phi(q) z, with the sums S of phi(k) v and z of phi(k) over keys so far."""

    def __init__(self, model):
        width = {"embed": model.d_model}
        heads = {"heads": model.n_heads, "head_dim": model.head_dim}
        self.heads, self.size = model.n_heads, model.head_dim
        self.query, self.key = Dense(width, heads, model.bias), Dense(width, heads, model.bias)
        self.value = Dense(width, heads, model.bias)
        self.out = Dense(heads, width, model.bias, residual=True)

    def __call__(self, x_NxD, context):
        def by_head(dense):
            y_NxC = dense(x_NxD, context).astype(jnp.float32)
            return context.unflatten(y_NxC.reshape(len(y_NxC), self.heads, self.size))

        q, k = (1 + jax.nn.elu(by_head(dense)) for dense in (self.query, self.key))
        # Every weight phi(q) phi(k), the definition; a kernel would carry S along the sequence.
        weights_BxHxTxS = jnp.einsum("bthd,bshd->bhts", q, k)
        weights_BxHxTxS = jnp.where(context.visible()[:, None], weights_BxHxTxS, 0.0)
        weights_BxHxTxS /= weights_BxHxTxS.sum(-1, keepdims=True)
        o_BxTxHxd = jnp.einsum("bhts,bshd->bthd", weights_BxHxTxS, by_head(self.value))
        o_NxC = context.flatten(o_BxTxHxd).reshape(len(x_NxD), -1)
        return self.out(o_NxC.astype(x_NxD.dtype), context)

    def flops(self, seq_len, visible):
        """Counts what is computed here, two products for each key of the sequence."""
        return 2 * 2.0 * seq_len * self.heads * self.size


class LinearBlock(nnx.Module):
    """The stream plus linear attention and the MLP of its norm."""

    def __init__(self, model, settings, parts):
        self.norm, self.mlp = parts.norm(), parts.mlp()
        self.attention = LinearAttention(model)

    def attend(self, h_NxD, context):
        """Returns the stream after attention; measurements skip either half of a block."""
        y_NxD = self.attention(self.norm(h_NxD, context), context)
        return h_NxD + context.scales.branch * y_NxD.astype(h_NxD.dtype)

    def feed(self, h_NxD, context):
        """Returns the stream after the MLP."""
        y_NxD = self.mlp(self.norm(h_NxD, context), context)
        h_NxD = h_NxD + context.scales.branch * y_NxD.astype(h_NxD.dtype)
        context.tap("residual", lambda: h_NxD)
        return h_NxD
