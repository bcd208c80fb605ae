"""Scores forecasts of runs held out from real tables, by family of tables and by kind of fold:

    python -m benchmarks.forecast_folds [--tables=DIR] [--out=FILE.json]

Of each table the dearer half or quarter, the largest size, or the largest 30 % of sizes are held
out, and forecast as `fit --law=auto` does. --tables adds the tables under DIR that may not be
shipped: isoflops/isoflops.csv, one for each value of its column experiment, and
epoch_chinchilla/*.csv.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError
from lmscale_jax.scaling import fit_law, forecast, read_table
from lmscale_jax.scaling.forecast import forecast_averaged, forecast_from_fit, law_discrepancy
from lmscale_jax.scaling.table_file import read_columns

TABLES = flags.DEFINE_string("tables", None, "directory with further tables")
OUT = flags.DEFINE_string("out", None, "JSON file to write")
MOST_TARGETS = 25


def families() -> dict[str, list]:
    """Reads the tables: {family: tables}."""
    by_family = {
        "OLMo ladder": [read_table(f"olmo_ladder_{k}") for k in ("c4", "pile", "wikitext")],
        "Takano": [read_table("kyo_takano")],
    }
    if TABLES.value:
        folder = Path(TABLES.value)
        file = folder / "isoflops" / "isoflops.csv"
        names = sorted(set(read_columns(file)["experiment"]))
        by_family["isoFLOP"] = [
            read_table(str(file), where={"experiment": x, "outlier": "False"}) for x in names
        ]
        epoch = next((folder / "epoch_chinchilla").glob("*.csv"))
        by_family["Epoch"] = [read_table(str(epoch))]
    return by_family


def folds(table) -> dict[str, np.ndarray]:
    """Returns the rows held out of each fold [R]."""
    c, n = table.c, table.n
    sizes = np.unique(np.round(np.log(n), 3))
    of_run = np.round(np.log(n), 3)
    return {
        "C above the median": c > np.median(c) * 1.001,
        "C above 75 %": c > np.quantile(c, 0.75) * 1.001,
        "largest n": of_run == sizes[-1],
        "largest 30 % of n": of_run >= sizes[int(0.7 * len(sizes))],
    }


def score(table, held_out: np.ndarray) -> dict | None:
    """Computes coverage, median width and mean error of the forecasts; None without a fit."""
    train = table.take(~held_out)
    rows = np.flatnonzero(held_out)
    rows = rows[:: max(1, len(rows) // MOST_TARGETS)]
    try:
        if forecast.richest_law(train) == "chinchilla":
            result = fit_law(train, law="chinchilla", bootstrap=200)
            shared = law_discrepancy(result)

            def predict(**target):
                return forecast_from_fit(result, **target, tau_and_cuts=shared)
        else:

            def predict(**target):
                return forecast_averaged(train, **target)

        forecasts = [predict(n=table.n[i], d=table.d[i], c=table.c[i]) for i in rows]
    except InputError:
        return None
    came = table.loss[rows]
    low, high, loss = (np.array([p[k] for p in forecasts]) for k in ("low", "high", "loss"))
    return {
        "law": forecasts[0]["law"],
        "runs": len(rows),
        "covered": float(((low <= came) & (came <= high)).mean()),
        "width": float(np.median((high - low) / loss)),
        "bias": float((loss / came - 1).mean()),
    }


def main() -> None:
    scores: dict = {}
    for family, family_tables in families().items():
        for table in family_tables:
            for fold, held_out in folds(table).items():
                if (result := score(table, held_out)) is not None:
                    scores.setdefault(family, {}).setdefault(fold, []).append(result)
        print(f"{family}: {len(family_tables)} tables", flush=True)
    rows = []
    for family, by_fold in scores.items():
        for fold, results in by_fold.items():
            mean = {k: np.mean([r[k] for r in results]) for k in ("covered", "width", "bias")}
            least = min(r["covered"] for r in results)
            shares = [f"{mean['covered']:.2f}", f"{least:.2f}"]
            sizes = [f"{100 * mean['width']:.1f} %", f"{100 * mean['bias']:+.1f} %"]
            rows.append([family, fold, str(len(results)), *shares, *sizes])
    header = ["tables", "held out", "folds", "covered", "least", "width", "bias"]
    print(tables.table(header, rows))
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_command(main)
