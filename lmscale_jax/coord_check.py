"""Checks that activations and updates keep their size as the model grows:

    python -m lmscale_jax.coord_check --workdir=runs/coords [--control=sp]

Exits with status 1 if a slope is out of bounds by more than its error, as it must be with a
control. With --seeds and more sizes the errors shrink.
"""

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.files import check_writable

CONFIG = cli.config_flag(default="configs/coord_check.py")
WORKDIR = cli.path_flag("workdir", "where coord_check.json and .png are written")
WIDTHS = flags.DEFINE_list("widths", [], "model.d_model; default 64,128,256,512,1024")
HEAD_DIMS = flags.DEFINE_list("head_dims", [], "sweep channels per head, heads as in the config")
DEPTHS = flags.DEFINE_list("depths", [], "sweep model.n_layers (parametrization.name=completep)")
STEPS = flags.DEFINE_integer(
    "steps", 0, "measured steps; 0: train.steps of the config", lower_bound=0
)
SEEDS = flags.DEFINE_integer("seeds", 3, "initialisations of each size", lower_bound=1)
CONTROL = flags.DEFINE_enum(
    "control", "none", ["none", "sp", "logits_sqrt", "no_lr_scaling", "no_eps_scaling"],
    "a deliberate mistake, which the check must detect",
)  # fmt: skip


def main() -> None:
    if not WORKDIR.value:
        raise InputError("--workdir is missing; use --workdir=runs/coords")
    sweeps = [flag for flag in (WIDTHS, HEAD_DIMS, DEPTHS) if flag.value]
    if len(sweeps) > 1:
        raise InputError(
            f"--{sweeps[0].name} and --{sweeps[1].name} are two sweeps; use one of them"
        )
    flag = sweeps[0] if sweeps else WIDTHS
    sizes = [_size(flag.name, text) for text in flag.value] or [64, 128, 256, 512, 1024]
    if len(set(sizes)) < 3:
        raise InputError(
            f"--{flag.name}={','.join(map(str, sizes))}: a slope with an error needs three "
            f"different sizes; use 64,128,256"
        )
    from lmscale_jax.model import mesh
    from lmscale_jax.reports.sweep_plots import draw_coord_check
    from lmscale_jax.sweeps import coord_check

    workdir = WORKDIR.value
    check_writable(workdir, "--workdir")
    config = CONFIG.value
    if STEPS.value:
        config.train.steps = STEPS.value
    sweep = {"widths": "width", "head_dims": "head_dim", "depths": "depth"}[flag.name]
    plan = coord_check.plan_sizes(config, sweep, sorted(set(sizes)), CONTROL.value)
    mesh.start_jax(config)
    result = coord_check.check_coordinates(plan, SEEDS.value, workdir, print)
    draw_coord_check(result, workdir / "coord_check.png")
    if result["verdict"] == "failed":
        certain = [failure for failure in result["failures"] if failure["certain"]]
        worst = certain[0]
        raise RunFailed(
            f"coordinate check: {len(certain)} slopes out of bounds beyond their errors, the first "
            f"{worst['tensor']} at step {worst['step']}: {worst['slope']}"
        )


def _size(name: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise InputError(f"--{name}={text} is no size; use --{name}=64,128,256")
    return int(text)


if __name__ == "__main__":
    cli.run_command(main)
