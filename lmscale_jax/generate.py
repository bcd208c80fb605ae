"""Prints text from a trained run: python -m lmscale_jax.generate --workdir=W --prompt="def f("."""

import json
from pathlib import Path

from absl import flags

from lmscale_jax import command
from lmscale_jax.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "text to continue; empty: a new document")
TOKENS = flags.DEFINE_integer("tokens", 200, "tokens to add", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: the likeliest token", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 50, "likeliest tokens to draw from; 0: all", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "seed of the drawing")


def main() -> None:
    from ml_collections import ConfigDict

    workdir = Path(WORKDIR.value)
    if not (workdir / "run.json").exists():
        raise InputError(f"--workdir={workdir} holds no run.json; name the directory of a run")
    import jax

    from lmscale_jax.reports.closing import continued
    from lmscale_jax.run import checkpoint, mesh, train

    config = ConfigDict(json.loads((workdir / "run.json").read_text())["config"])
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    setup = train.prepare(config, workdir, say=lambda line: None)
    placed = mesh.param_shardings(setup.model.specs, setup.mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(setup.model.init, jax.random.key(0)),
        placed,
    )
    _, params = checkpoint.Checkpoints(workdir).params(abstract)
    how = {"temperature": TEMPERATURE.value, "top_k": TOP_K.value, "seed": SEED.value}
    print(continued(setup, params, TOKENS.value, PROMPT.value, **how))


if __name__ == "__main__":
    command.run(main)
