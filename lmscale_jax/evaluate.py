"""Evaluates a run on its held-out tokens: python -m lmscale_jax.evaluate --workdir=runs/first

Writes eval.json beside run.json, or in --out. For an unfinished run it takes the newest checkpoint
and says so.
"""

from absl import flags

from lmscale_jax import cli
from lmscale_jax.files import check_writable

WORKDIR = cli.path_flag("workdir", "directory of a run", required=True)
SUITES = flags.DEFINE_list(
    "suites", ["perplexity", "redundancy", "mur"], "what is evaluated: any of these, and attention"
)
STEP = flags.DEFINE_integer("step", 0, "checkpoint; 0: the newest", lower_bound=0)
TOKENS = flags.DEFINE_integer(
    "tokens", 0, "held-out tokens of redundancy and mur; 0: as eval.tokens", lower_bound=0
)
OUT = cli.path_flag("out", "directory for eval.json; default: that of the run")
cli.trust_flag()


def main() -> None:
    from lmscale_jax.train.evaluation import evaluate_run

    folder = OUT.value or WORKDIR.value
    check_writable(folder, "--out" if OUT.value else "--workdir", remedy_flag="--out")
    path = evaluate_run(WORKDIR.value, SUITES.value, STEP.value, TOKENS.value, print, folder)
    print(f"written              {path}")


if __name__ == "__main__":
    cli.run_command(main)
