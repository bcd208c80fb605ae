"""Fits scaling laws to a table or to finished runs.

python -m lmscale_jax.fit --input=results.csv --law=chinchilla --out=fit.json
python -m lmscale_jax.fit --input=results.csv --compare=gelu,swiglu --out=verdict.json
python -m lmscale_jax.fit --input=kyo_takano --forecast_n=1e9 --forecast_d=2e10
python -m lmscale_jax.fit --datasets=DIR --dataset=list
"""

import json
import sys
from pathlib import Path

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError
from lmscale_jax.files import check_writable

INPUT = flags.DEFINE_string(
    "input", None, "table file, directory of runs or of curves, or name of a bundled table"
)
LAW = flags.DEFINE_string(
    "law", "chinchilla", "chinchilla, power, power_floor or isoflop; auto: what ladders use"
)
DELTA = flags.DEFINE_float("delta", None, "width of Huber's loss in ln L; default: from residuals")
OUT = cli.path_flag("out", "JSON file to write; a plot FILE.png is written too")
COLUMNS = flags.DEFINE_list("columns", [], "OUR_NAME:FILE_NAME, such as n:params, or n:1")
WHERE = flags.DEFINE_list("where", [], "rows to use, column:value")
VARIANT = flags.DEFINE_string("variant", None, "fits only the rows of this variant")
POINTS = flags.DEFINE_string("points", "final", "final: last row of each run; curve: all rows")
BEST = flags.DEFINE_bool("best", False, "uses only the lowest loss of each n and d, as of sweeps")
SKIP = flags.DEFINE_float("skip", 0.0, "with --points=curve, per cent to omit at the start of runs")
FLOOR = flags.DEFINE_float("floor", None, "pins E, nats per token")
REPETITION = flags.DEFINE_string("repetition", None, "R* of repeated data, or fit")
CLUSTER = flags.DEFINE_string("cluster", "run", "resampling unit: run, cell, size or row")
BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 2000, "draws; 0: no intervals; of the test of --compare at most 499", lower_bound=0
)
LEVEL = flags.DEFINE_float("level", 0.95, "level of the intervals and of the test")
SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap")
COMPARE = flags.DEFINE_list(
    "compare", None, "two variants: does one gain with scale, or by a constant factor?"
)
EFFECT = flags.DEFINE_float("effect", 0.1, "smallest relative change of the exponent that matters")
TARGET_C = flags.DEFINE_float("target_c", None, "further FLOPs at which --compare reports the gain")
FORECAST_N = flags.DEFINE_float("forecast_n", None, "parameters of the run to predict")
FORECAST_D = flags.DEFINE_float("forecast_d", None, "tokens of the run to predict")
FORECAST_C = flags.DEFINE_float("forecast_c", None, "FLOPs of the run to predict")
FORECAST_LEVEL = flags.DEFINE_float("forecast_level", 0.9, "level of the forecast's interval")
BUDGET = flags.DEFINE_float("budget", None, "FLOPs for which to compute the optimal run")
ADVISE = flags.DEFINE_float("advise", None, "FLOPs for new runs that improve the forecast most")
DATASETS = cli.path_flag("datasets", "directory of the named data sets")
DATASET = flags.DEFINE_list("dataset", None, "list, all, or names of data sets under --datasets")
# What the test of two arms cannot follow, and why.
NOT_IN_COMPARISON = {
    "delta": "whose test is by least squares",
    "cluster": "whose unit is the cell, all seeds of one size in one arm",
    "repetition": "which takes the compute of a run and not its distinct tokens",
}
TEST_DRAWS = 499
# Bytes from which on it is said that a file is being read.
LARGE_FILE = 5e6


def main() -> None:
    if DATASET.value is not None:
        _fit_named()
        return
    if not INPUT.value:
        raise InputError("--input is missing; use --input=results.csv or --input=kyo_takano")
    _check_flags()
    from lmscale_jax.scaling import read

    paths = _paths()
    pairs = {"columns": _pairs("columns", COLUMNS.value), "where": _pairs("where", WHERE.value)}
    points = "best" if BEST.value else POINTS.value
    path = Path(INPUT.value)
    if path.is_file() and path.stat().st_size > LARGE_FILE:
        _say(f"reading {path} ({path.stat().st_size / 1e6:.0f} MB)")
    table = read.read_table(INPUT.value, points=points, skip=SKIP.value, **pairs)
    if VARIANT.value is not None:
        table = table.arm(VARIANT.value)
    if COMPARE.value is not None:
        written, draw = _compare_arms(table)
    elif LAW.value == "isoflop":
        written, draw = _fit_isoflop(table)
    else:
        written, draw = _fit_law(table)
    _write(paths, written, draw)


def _say(line: str) -> None:
    """Prints a line of progress, beside the results."""
    print(line, file=sys.stderr, flush=True)


def _check_flags() -> None:
    if COMPARE.value is not None and len(COMPARE.value) != 2:
        raise InputError(
            f"--compare={','.join(COMPARE.value)} must name two variants; use --compare=gelu,swiglu"
        )
    single = {"--forecast_n": FORECAST_N, "--forecast_d": FORECAST_D, "--forecast_c": FORECAST_C,
              "--budget": BUDGET, "--advise": ADVISE}  # fmt: skip
    single_flags = [name for name, flag in single.items() if flag.value is not None]
    if single_flags and (COMPARE.value is not None or LAW.value == "isoflop"):
        other = "--compare" if COMPARE.value is not None else "--law=isoflop"
        raise InputError(f"{single_flags[0]} does nothing with {other}; remove one of them")
    if COMPARE.value is not None:
        for name, why in NOT_IN_COMPARISON.items():
            if flags.FLAGS[name].present:
                raise InputError(
                    f"--{name}={flags.FLAGS[name].value} does nothing with --compare, {why}; "
                    f"remove it, or fit one arm with --variant={COMPARE.value[0]}"
                )
    if BEST.value and flags.FLAGS["points"].present and POINTS.value != "final":
        raise InputError(
            f"--points={POINTS.value} does nothing with --best, which takes the last row of each "
            "run; remove one of them"
        )
    if ADVISE.value is not None and not any(name.startswith("--forecast") for name in single_flags):
        raise InputError(
            f"--advise={ADVISE.value:g} needs a run to predict; add --forecast_n and --forecast_d"
        )
    if TARGET_C.value is not None and COMPARE.value is None:
        raise InputError(f"--target_c={TARGET_C.value:g} needs two arms; use --compare=gelu,swiglu")


def _pairs(flag: str, values: list[str]) -> dict:
    """Parses a flag's list of NAME:VALUE into {name: value}."""
    pairs = {}
    for value in values:
        name, colon, theirs = value.partition(":")
        if not colon:
            raise InputError(f"--{flag}={value} must be NAME:VALUE; use --{flag}=n:params")
        # Without a header a position may stand first, as in 1:n.
        pairs |= {theirs: name} if flag == "columns" and name.isdigit() else {name: theirs}
    return pairs


def _paths() -> tuple[Path, Path] | None:
    """Returns the paths (JSON, PNG) of --out, or None without --out.

    An earlier result of this command is replaced with a message; other files are never overwritten.

    Raises:
        InputError: the name is not *.json, its directory is missing, or it is another file.
    """
    if not OUT.value:
        return None
    out = OUT.value
    if out.suffix != ".json":
        raise InputError(f"--out={out} must end in .json; use {out}.json")
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: directory {out.parent} does not exist; create it first")
    check_writable(out.parent, "--out", remedy_flag="--out")
    plot = out.with_suffix(".png")
    if out.exists():
        try:
            ours = json.loads(out.read_text(encoding="utf-8")).get("command") == "fit"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise InputError(f"--out={out} exists and is no result of fit; use another file")
        print(f"replacing the earlier {out}", file=sys.stderr)
    elif plot.exists():
        raise InputError(f"--out={out}: {plot} exists already; use another file")
    return out, plot


def _settings() -> dict:
    """Collects the arguments of a fit from the flags."""
    return {
        "delta": DELTA.value,
        "floor": FLOOR.value,
        "repetition": REPETITION.value,
        "bootstrap": BOOTSTRAP.value,
        "level": LEVEL.value,
        "cluster": CLUSTER.value,
        "seed": SEED.value,
        "say": _say,
    }


def _fit_law(table):
    """Fits one law: (JSON to write, function that draws the plot)."""
    from lmscale_jax.reports import fit_plots
    from lmscale_jax.scaling import fit_law, next_runs
    from lmscale_jax.scaling import summary as describe
    from lmscale_jax.scaling.forecast import (
        forecast_averaged,
        forecast_from_fit,
        richest_law,
    )

    auto = LAW.value == "auto"
    result = fit_law(table, law=richest_law(table) if auto else LAW.value, **_settings())
    written = result.to_json()
    lines = describe.fit_lines(result)
    target = {"n": FORECAST_N.value, "d": FORECAST_D.value, "c": FORECAST_C.value}
    if any(v is not None for v in target.values()):
        level = FORECAST_LEVEL.value
        if auto and result.law.name != "chinchilla":
            prediction = forecast_averaged(table, **target, level=level)
        else:
            prediction = forecast_from_fit(result, **target, level=level)
        written["forecast"] = prediction
        printed_codes = {w["code"] for w in written["warnings"]}
        written["warnings"] += [w for w in prediction["warnings"] if w["code"] not in printed_codes]
        lines += describe.forecast_lines(prediction, printed_codes)
        if ADVISE.value is not None:
            written["advice"] = next_runs.rank_next_runs(
                result, ADVISE.value, **target, tau=prediction["tau"]
            )
            lines += describe.advice_lines(written["advice"])
    if BUDGET.value is not None:
        written["plan"] = next_runs.plan_optimum(result, BUDGET.value)
        lines += describe.plan_lines(written["plan"])
    print("\n".join(lines))
    return written, lambda path: fit_plots.plot_fit(result, path)


def _compare_arms(table):
    """Compares two arms: (JSON to write, function that draws the plot)."""
    from lmscale_jax.reports import fit_plots
    from lmscale_jax.scaling import compare_arms, fit_law
    from lmscale_jax.scaling import summary as describe
    from lmscale_jax.scaling.forecast import richest_law

    settings = _settings()
    verdict = compare_arms(
        table,
        *COMPARE.value,
        level=LEVEL.value,
        effect=EFFECT.value,
        target_c=TARGET_C.value,
        bootstrap=min(BOOTSTRAP.value, TEST_DRAWS),
        seed=SEED.value,
        floor=FLOOR.value,
    )
    print("\n".join(describe.verdict_lines(verdict)))
    # The arms of a ladder lie on one curve in C, which does not identify the default law.
    chosen = LAW.value if flags.FLAGS["law"].present else richest_law(table.arm(COMPARE.value[0]))
    arms = {name: fit_law(table.arm(name), law=chosen, **settings) for name in COMPARE.value}
    shown = {name: result.to_json() for name, result in arms.items()}
    for name, result in arms.items():
        print(f"{name}:")
        print("\n".join(describe.fit_lines(result)))
    # The first arm's law is at the top level, as in a fit without comparison.
    written = shown[COMPARE.value[0]] | verdict | {"arms": shown}
    written["warnings"] = verdict["warnings"] + [
        {"code": w["code"], "message": f"{name}: {w['message']}"}
        for name, result in shown.items()
        for w in result["warnings"]
        if w not in verdict["warnings"]
    ]
    return written, lambda path: fit_plots.plot_comparison(verdict, table, arms, path)


def _fit_isoflop(table):
    """Fits isoFLOP minima: (JSON to write, function that draws the plot)."""
    from lmscale_jax.reports import fit_plots
    from lmscale_jax.scaling import fit_isoflop
    from lmscale_jax.scaling import summary as describe

    settings = _settings()
    summary, curves = fit_isoflop(table, **settings)
    print("\n".join(describe.isoflop_lines(summary, table)))
    best = summary["methods"].get("cubic") or summary["methods"]["parabola"]
    surface = curves["surface"]
    written = surface.to_json() | {
        "law": "isoflop",
        "params": {"a": best["a"], "k": best["k"]},
        "formula": "n* = k c^a",
        "intervals": best["intervals"],
        "warnings": summary["warnings"],
        "isoflop": summary,
    }
    return written, lambda path: fit_plots.plot_isoflop(summary, curves, path)


def _write(paths, written: dict, draw) -> None:
    """Writes the plot and the JSON, if --out is set."""
    if paths is None:
        return
    from lmscale_jax.files import write_json

    out, plot = paths
    try:
        draw(plot)
        write_json(out, {"command": "fit", **written})
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}; use another file") from None
    print(f"wrote {out} and {plot}")


def _fit_named() -> None:
    """Lists the named data sets, or fits those of --dataset side by side."""
    from lmscale_jax.reports import fit_plots
    from lmscale_jax.scaling import fit_law, read
    from lmscale_jax.scaling import summary as describe

    if not DATASETS.value:
        raise InputError("--dataset needs --datasets=DIR, the directory with their folders")
    if not DATASETS.value.is_dir():
        raise InputError(
            f"--datasets={DATASETS.value} is no directory; use the one with the data sets"
        )
    if DATASET.value == ["list"]:
        for name in read.DATASETS:
            files = read.locate_named(name, DATASETS.value)
            print(f"{name:<28} {len(files)} files" if files else f"{name:<28} not there")
        return
    everything = DATASET.value == ["all"]
    names = list(read.DATASETS) if everything else DATASET.value
    paths, results = _paths(), {}
    points = POINTS.value if flags.FLAGS["points"].present else "curve"
    for name in names:
        try:
            table = read.read_named(name, DATASETS.value, points, SKIP.value)
            results[name] = fit_law(table, law=LAW.value, **_settings())
        except InputError as error:
            # One unusable set among several is reported; a single one is an error.
            if len(names) == 1:
                raise
            print(f"{name}: not fitted: {' '.join(str(error).split())}")
    for name, result in results.items():
        print(f"{name}:")
        print("\n".join(describe.fit_lines(result)))
    if not results:
        raise InputError(
            f"--datasets={DATASETS.value}: no data set could be fitted; see the lines above"
        )
    print("\n".join(describe.table_lines(results)))
    first = next(iter(results.values()))
    shown = {name: result.to_json() for name, result in results.items()}
    _write(
        paths, first.to_json() | {"datasets": shown}, lambda path: fit_plots.plot_fit(first, path)
    )


if __name__ == "__main__":
    cli.run_command(main)
