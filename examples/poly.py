"""An MLP whose activation has a learned scalar; `model.mlp = here(__file__) + "poly.py:PolyMLP"`.

down(relu(up x)^power + share * up x): with power 2 and share "none" it is the choice relu2.
"""

import jax

from lmscale_jax.api import Dense, Key, nnx, pointwise, scalar


class PolyMLP(nnx.Module):
    """The MLP of a block: called with the normed stream [N, D], it returns [N, D]."""

    # config.own.poly.power and config.own.poly.share: checked, hashed and tuned like all keys.
    KEYS = {
        "power": Key(2, "exponent of the rectified part", low=1, high=8),
        "share": Key("learned", "factor of the linear part", choices=("learned", "none")),
    }
    # Settings with which this is the baseline relu2, for the checks before a ladder.
    OFF = {"power": 2, "share": "none"}

    @staticmethod
    def d_ff(width: int) -> int:
        """Returns the default of model.d_ff."""
        return 4 * width

    def __init__(self, model, settings):
        # The names of the axes decide initial values, rates, sharding and counts.
        self.up = Dense({"embed": model.d_model}, {"mlp": model.d_ff}, model.bias)
        self.down = Dense({"mlp": model.d_ff}, {"embed": model.d_model}, model.bias, residual=True)
        self.rectify = pointwise(lambda up: jax.nn.relu(up) ** settings.power)
        if settings.share == "learned":
            self.share = scalar(0.0)

    def __call__(self, x_NxD, context):
        up_NxF = self.up(x_NxD, context)
        hidden_NxF = self.rectify(up_NxF)
        if hasattr(self, "share"):
            hidden_NxF += self.share[...].astype(up_NxF.dtype) * up_NxF
        return self.down(hidden_NxF, context)
