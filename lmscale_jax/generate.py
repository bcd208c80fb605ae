"""Prints text from a trained run: python -m lmscale_jax.generate --workdir=W --prompt="def f("."""

from absl import flags

from lmscale_jax import cli

WORKDIR = cli.path_flag("workdir", "directory of a run", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "text to continue; empty: a new document")
TOKENS = flags.DEFINE_integer("tokens", 200, "tokens to add", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: the likeliest token", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 50, "likeliest tokens to draw from; 0: all", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "seed of the sampling")
cli.trust_flag()


def main() -> None:
    from lmscale_jax.reports.final_summary import sample_text
    from lmscale_jax.train import restore

    loaded = restore.load_run(WORKDIR.value)
    options = {"temperature": TEMPERATURE.value, "top_k": TOP_K.value, "seed": SEED.value}
    print(sample_text(loaded.run, loaded.params, TOKENS.value, PROMPT.value, **options))


if __name__ == "__main__":
    cli.run_command(main)
