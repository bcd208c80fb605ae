"""Measures by simulation how often intervals and verdicts are right, and prints a table:

    python -m benchmarks.calibration [--length=full] [--only=law,arms] [--out=FILE.json]
    python -m benchmarks.calibration --before=OLD.json --after=NEW.json

The second form only sets two results side by side, as in docs/calibration.md.
"""

import json
import multiprocessing
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import tables
from benchmarks.calibration_rows import Outcome, Row, all_rows
from lmscale_jax import cli

# Only the command has them: tests import this file beside others with flags of these names.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
LENGTH = flags.DEFINE_enum("length", "short", ["short", "full"], "draws", flag_values=FLAGS)
ONLY = flags.DEFINE_list("only", [], "kinds of rows: law, ... (see `all_rows`)", flag_values=FLAGS)
COUNT = flags.DEFINE_integer("draws", None, "draws a row, not of --length", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "JSON file; its rows are kept", flag_values=FLAGS)
WORKERS = flags.DEFINE_integer("workers", 2, "processes", flag_values=FLAGS)
BEFORE = flags.DEFINE_string("before", None, "JSON of an earlier version", flag_values=FLAGS)
AFTER = flags.DEFINE_string("after", None, "JSON to set beside --before", flag_values=FLAGS)
DRAWS = {"short": 100, "full": 400}


def measure(row: Row, draws: int) -> dict:
    """Simulates a row: {statement: share of hits, its standard error, bias, width, share stated}.

    Each draw has its own generator, so that the first draws of a longer run are the same.
    """
    outcomes: dict[str, list[Outcome]] = {}
    for i in range(draws):
        rng = np.random.default_rng([i, *row.name.encode()])
        for statement, outcome in row.draw(rng).items():
            outcomes.setdefault(statement, []).append(outcome)
    return {statement: summarise(drawn) for statement, drawn in outcomes.items()}


def summarise(outcomes: list[Outcome]) -> dict:
    """Averages the outcomes of one statement; None where nothing was stated."""
    hits = [o.hit for o in outcomes if o.hit is not None]
    share = float(np.mean(hits)) if hits else None
    error, width = (np.array([getattr(o, k) for o in outcomes]) for k in ("error", "width"))
    return {
        "share": share,
        "se": _binomial_error(sum(hits), len(hits)) if hits else None,
        "bias": float(np.median(error)) if np.isfinite(error).any() else None,
        "width": float(np.nanmedian(width)) if np.isfinite(width).any() else None,
        "stated": len(hits) / len(outcomes),
        "draws": len(outcomes),
    }


def _binomial_error(hits: int, count: int) -> float:
    """Adds one hit and one miss, so that 0 and 1 have an error too."""
    share = (hits + 1) / (count + 2)
    return float(np.sqrt(share * (1 - share) / count))


def _measured(job: tuple[int, int]) -> tuple[str, dict]:
    row = all_rows()[job[0]]
    return row.name, measure(row, job[1])


def _is_measured(results: dict, row: Row, count: int) -> bool:
    return row.name in results and all(v["draws"] >= count for v in results[row.name].values())


HEAD = ["table", "noise", "runs", "statement", "nominal"]


def table_text(columns: dict[str, dict]) -> str:
    """Formats results side by side as Markdown, in the order of `all_rows`."""
    head, lines = list(HEAD), []
    for title in columns:
        head += [f"{title}: share", "bias", "width", "stated"]
    for row in all_rows():
        results = [column.get(row.name, {}) for column in columns.values()]
        for statement in dict.fromkeys(k for result in results for k in result):
            line = [f"{row.kind}: {row.truth}", row.noise, row.design, statement,
                    nominal_text(row, statement)]  # fmt: skip
            for result in results:
                line += _cells(result.get(statement))
            lines.append(line)
    return tables.table(head, lines)


def nominal_text(row: Row, statement: str) -> str:
    """Says what share is promised: a level, or a bound on false claims and on power."""
    if statement.startswith("false claim"):
        return "at most .05"
    if statement == "exponent shift claimed" and "E -" in row.truth:
        return "at most .05"
    if statement.startswith("power"):
        return "at least .95" if row.noise == "0.2 %" else ""
    if row.kind == "beyond a break":
        return "none"
    if statement in ("no difference said", "exponent shift claimed", "changes with scale"):
        return ""
    return f"{row.nominal:.2f}"


def _cells(result: dict | None) -> list[str]:
    if result is None:
        return [""] * 4
    share = "" if result["share"] is None else f"{result['share']:.2f} ± {result['se']:.2f}"
    bias, width = (
        "" if result[k] is None else f"{100 * result[k]:{sign}.3g} %"
        for k, sign in (("bias", "+"), ("width", ""))
    )
    return [share, bias, width, f"{result['stated']:.2f}"]


def main() -> None:
    if BEFORE.value and AFTER.value:
        columns = {
            title: json.loads(Path(path).read_text())
            for title, path in (("before", BEFORE.value), ("after", AFTER.value))
        }
        print(table_text(columns))
        return
    count = COUNT.value or DRAWS[LENGTH.value]
    path = Path(OUT.value) if OUT.value else None
    results = json.loads(path.read_text()) if path and path.exists() else {}
    wanted = [
        (i, count)
        for i, row in enumerate(all_rows())
        if (not ONLY.value or row.kind in ONLY.value) and not _is_measured(results, row, count)
    ]
    with multiprocessing.get_context("spawn").Pool(WORKERS.value) as pool:
        for name, result in pool.imap(_measured, wanted):
            print(name, {k: v["share"] for k, v in result.items()}, flush=True)
            results[name] = result
            if path:
                path.write_text(json.dumps(results, indent=1) + "\n")
    print(table_text({"now": results}))


if __name__ == "__main__":
    cli.run_command(main)
