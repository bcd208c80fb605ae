"""Judges the committed runs of the quickstart ladder by the present rules, without training.

    python docs/ladders/recompute.py

Writes docs/ladders/verdict.json from results.csv and the forecast that was fixed before the
held-out runs, and prints what would be forecast from the same anchors today.
"""

import csv
import json
import tempfile
from pathlib import Path

from lmscale_jax import cli
from lmscale_jax.configs.ladders import quickstart
from lmscale_jax.ladders import forecasts, grid, verdict
from lmscale_jax.ladders.plan import LadderPlan

FOLDER = Path(__file__).parent
# Not in a results.csv of that day: single runs on a core each.
MACHINE = {"devices": "1 x cpu", "packed": 1}


def read_rows() -> list[dict]:
    """Reads results.csv as `results.result_rows` has it."""
    rows = []
    for row in csv.DictReader((FOLDER / "results.csv").read_text().splitlines()):
        texts = ("run_id", "variant", "role", "status", "val_fingerprint")
        numbers = {k: json.loads(v) if v else None for k, v in row.items() if k not in texts}
        rows.append(row | numbers | MACHINE | {"tune": {}})
    return rows


def judge() -> tuple[dict, dict]:
    """Returns (verdict, the present forecast with its scores)."""
    ladder = quickstart.get_config()
    cells = grid.make_cells(ladder, ladder.run.data.vocab_size)
    plan = LadderPlan(json.loads(ladder.to_json()), cells, ladder.run.data.vocab_size)
    rows = read_rows()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        present = forecasts.make_forecast(plan, workdir, rows)
        present = forecasts.score_forecast(workdir, present, rows)
        fixed = json.loads((FOLDER / "forecast.json").read_text())
        return verdict.judge_ladder(plan, workdir, rows, fixed), present


def main() -> None:
    judgement, present = judge()
    verdict.write_verdict(judgement, FOLDER)
    print(judgement["answer"])
    for arm, law in present["arms"].items():
        score = present["scores"][arm]
        print(
            f"{arm}: {law['loss']:.4f}, {law['low']:.4f} to {law['high']:.4f} ({law['law']}); "
            f"measured {score['loss']:.4f}, {'inside' if score['inside'] else 'outside'}"
        )


if __name__ == "__main__":
    cli.run_command(main)
