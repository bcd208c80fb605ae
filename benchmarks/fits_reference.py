"""Fits reference data that may not be shipped, and prints a table:

    python -m benchmarks.fits_reference --data=DIR

DIR contains epoch_chinchilla/, isoflops/ and seed_runs/, as for tests/test_scaling_reference.py,
which compares the numbers with the known ones.
"""

from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import tables
from lmscale_jax import cli

DATA = flags.DEFINE_string("data", None, "directory of the reference data", required=True)
EXPERIMENTS = (
    "epochai_chinchilla__massivetext__chinchilla",
    "ml_scalefit__massivetext__chinchilla",
    "llama_3__exp_loss",
)
CURVES = ("optimal_lr_sgd_scaling", "vanilla_scaling_optimal_lr", "mup_scaling_experiments")


def row(name: str, table, delta: float) -> list[str]:
    """Fits one table and formats its row."""
    from lmscale_jax.scaling import fit_law

    result = fit_law(table, delta=delta, bootstrap=0)
    p = result.params
    values = [f"{p[k]:.6g}" for k in ("E", "A", "B", "alpha", "beta")]
    codes = ", ".join(dict.fromkeys(w["code"] for w in result.warnings))
    width = "least squares" if np.isinf(delta) else f"{delta:g}"
    return [name, str(len(table)), width, *values, f"{result.objective:.9e}", codes]


def main() -> None:
    from lmscale_jax.scaling import read_table
    from lmscale_jax.scaling.read import read_named

    folder = Path(DATA.value)
    all_runs = read_table(str(folder / "epoch_chinchilla/svg_extracted_data.csv"))
    # The first five rows are those that Besiroglu et al. (2024) excluded.
    without_first = all_runs.take(np.arange(len(all_runs)) >= 5)
    rows = [row("Chinchilla, digitised", without_first, d) for d in (1e-3, 1e-6, 1e-2, np.inf)]
    rows.append(row("Chinchilla, digitised, all", all_runs, 1e-3))
    for name in EXPERIMENTS:
        where = {"experiment": name, "outlier": "False"}
        rows.append(row(name, read_table(str(folder / "isoflops/isoflops.csv"), where=where), 1e-3))
    for name in ("kyo_takano", "olmo_ladder_c4", "olmo_ladder_pile", "olmo_ladder_wikitext"):
        rows.append(row(name, read_table(name), 1e-3))
    for name in CURVES:
        rows.append(row(f"{name}, curves", read_named(name, folder / "seed_runs"), 1e-3))
    head = ["data", "points", "delta", "E", "A", "B", "alpha", "beta", "F", "warnings"]
    print(tables.table(head, rows))


if __name__ == "__main__":
    cli.run_command(main)
