"""A gate on attention's output, for each head or channel, against none at equal parameters.

    python -m lmscale_jax.ladder --config=configs/ladders/gate.py --workdir=runs/gate

What the gates cost is taken from d_ff (`rungs.match`), or with "flops" from the FLOPs. The control
has the elementwise gate's weights and reads another position.
"""

from lmscale_jax.config.recipes import small_decoder
from lmscale_jax.configs import laddering


def get_config(match: str = "parameters"):
    run = small_decoder()

    c = laddering.get_config(run)
    c.question = "Does a gate on attention's output help at equal cost, and does it at scale?"
    c.switch = ("model.attn_gate", "model.gate_input")
    c.arms = {
        "none": {},
        "headwise": {"model": {"attn_gate": "headwise"}},
        "elementwise": {"model": {"attn_gate": "elementwise"}},
        "control": {"model": {"attn_gate": "elementwise", "gate_input": "earlier"}},
    }
    c.baseline = "none"
    c.rungs.sizes, c.rungs.held_out, c.rungs.match = (1e5, 2e5, 4e5), 8e5, match
    c.rungs.head_dim, c.rungs.aspect = 16, 32.0
    c.tokens.amounts = (8.0,)
    c.seeds = 3
    return c
