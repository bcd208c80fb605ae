"""Marginal Utility Regularization on the embedded corpus: six small blocks, a minute on a CPU.

    python -m lmscale_jax.main --config=configs/mur_small.py:update --workdir=runs/small_update

The arms differ only in `mur.*`; benchmarks/mur_study.py runs them all over several seeds.
"""

from lmscale_jax.configs import base

# Unlike configs/mur.py, strong enough to do something in 300 steps: at tau = 0.1 a utility of 0
# makes the factor 1.5, and λ is ten times the original's.
_ACTING = {"tau": 0.1, "warmup": "5%", "ramp": "10%"}
ARMS = {
    "baseline": {},
    "diagnose": {"mode": "diagnose", "tau": 0.1},
    "loss": {"mode": "loss", "lambda_max": 1.0} | _ACTING,
    "update": {"mode": "update", "alpha": 5.0} | _ACTING,
    "grads": {"mode": "update", "alpha": 5.0, "apply_to": "grads"} | _ACTING,
}


def get_config(arm: str = "update"):
    c = base.get_config()
    c.model.n_layers, c.model.d_model, c.model.n_heads = 6, 64, 4
    c.model.norm, c.model.mlp, c.model.positions = "rmsnorm", "swiglu", "rope"
    # About 1 / sqrt(width); GPT-2's 0.02 is meant for 768 channels.
    c.parametrization.init_std = 0.08
    c.data.vocab_size, c.data.seq_len = 1024, 128
    c.optim.lr = 4e-3
    c.train.steps, c.train.batch_size = 300, 8
    c.eval.every, c.eval.tokens, c.eval.sample = 0, 50_000, 0
    c.checkpoint.every = 0
    c.mur.update(ARMS[arm])
    return c
