"""A training step over simulated devices, as a program of its own: python -c PROGRAM, configs."""

import json
import os
import subprocess
import sys

from conftest import ROOT

PROLOGUE = """
import json
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from lmscale_jax.configs import base
from lmscale_jax.config.resolve import resolve
from lmscale_jax.data.batches import Batch
from lmscale_jax.evals import perplexity
from lmscale_jax.model.mesh import make_mesh, start_jax
from lmscale_jax.model.build import build_model
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.optim import build as optim
from lmscale_jax.train import checkpoint, step


def setup(changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    config = resolve(config, 64)
    start_jax(config)
    grid = make_mesh(config)
    model = build_model(config, platform="cpu", mesh=grid)
    transform = optim.build_optimizer(config, model.param_rules, grid, "cpu")
    placed = step.train_state_shardings(config, model, transform, grid)
    return config, grid, model, transform, placed


def abstract(config, grid, model, transform, placed):
    shapes = jax.eval_shape(lambda: step.initial_state(config, model, transform, 0))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )
    rows = (config.train.batch_size, config.data.seq_len)
    tokens = jax.ShapeDtypeStruct(rows, np.int32, sharding=NamedSharding(grid, BATCH))
    return state, Batch(tokens, tokens)


def compiled_step(config, grid, model, transform, placed):
    state_and_batch = abstract(config, grid, model, transform, placed)
    return step.TrainStep(config, model, grid, placed).lower(*state_and_batch).compile()


argument = json.loads(sys.argv[1])
"""


def run(program: str, argument) -> str:
    """What it prints. Raises AssertionError with its last lines where it fails."""
    command = [sys.executable, "-c", PROLOGUE + program, json.dumps(argument)]
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout
