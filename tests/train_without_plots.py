"""The command `main` without the plots at its end, which take as long as these small runs."""

from lmscale_jax import cli, main
from lmscale_jax.reports import plots

if __name__ == "__main__":
    plots.draw_run = lambda workdir: []
    cli.run_command(main.main)
