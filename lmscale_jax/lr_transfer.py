"""Finds the best learning rate of every width, under sp and under the config's parametrization:

python -m lmscale_jax.lr_transfer --workdir=runs/transfer
"""

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError
from lmscale_jax.files import check_writable

CONFIG = cli.config_flag(default="configs/lr_transfer.py")
WORKDIR = cli.path_flag("workdir", "where lr_transfer.json and .png are written")
WIDTHS = flags.DEFINE_list("widths", ["16", "32", "64", "128"], "model.d_model")
LOG2_LRS = flags.DEFINE_list(
    "log2_lrs", [str(e) for e in range(-10, -1)], "log2 of the peak learning rates"
)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each cell", lower_bound=1)


def main() -> None:
    if not WORKDIR.value:
        raise InputError("--workdir is missing; use --workdir=runs/transfer")
    workdir = WORKDIR.value
    check_writable(workdir, "--workdir")
    if (workdir / "lr_transfer.json").exists():
        raise InputError(f"--workdir={workdir} holds a sweep already; use a new --workdir")
    widths = sorted({int(w) for w in _numbers(WIDTHS)})
    rates = sorted(set(_numbers(LOG2_LRS)))
    if len(widths) < 2 or len(rates) < 3:
        raise InputError(
            f"--widths={len(widths)} and --log2_lrs={len(rates)} values: a drift needs two widths "
            f"and three learning rates; use --widths=16,128 --log2_lrs=-8,-7,-6"
        )
    from lmscale_jax.model import mesh
    from lmscale_jax.reports.sweep_plots import draw_lr_transfer
    from lmscale_jax.sweeps import lr_transfer

    lr_transfer.sweep_arms(CONFIG.value, widths)
    mesh.start_jax(CONFIG.value)
    result = lr_transfer.sweep_rates(CONFIG.value, widths, rates, SEEDS.value, workdir, print)
    draw_lr_transfer(result, workdir / "lr_transfer.png")


def _numbers(flag) -> list[float]:
    try:
        return [float(text) for text in flag.value]
    except ValueError:
        raise InputError(
            f"--{flag.name}={','.join(flag.value)} are no numbers; use {','.join(flag.default)}"
        ) from None


if __name__ == "__main__":
    cli.run_command(main)
