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
from lmscale_jax.configs import base
from lmscale_jax.config.resolve import resolve
from lmscale_jax.evals import perplexity
from lmscale_jax.model.mesh import make_mesh, start_jax
from lmscale_jax.train import checkpoint
from lmscale_jax.train.setup import TrainStep, build_setup


def setup(changes):
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    config = resolve(config, 64)
    start_jax(config)
    return build_setup(config, 0)


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
