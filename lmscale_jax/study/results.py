"""results.csv: one row a run, from the records alone; and the rows that arms are judged by."""

import csv
import io
import os
from pathlib import Path

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.modes import Modes
from lmscale_jax.study import records
from lmscale_jax.study.cells import ANCHOR, HELD_OUT, TRUNK
from lmscale_jax.study.plan import Plan

FINAL = ("val_loss", "val_loss_sem", "val_tokens", "bits_per_byte")
COLUMNS = (
    "run_id", "variant", "role", "size", "budget", "seed", "status", "n_total", "n_non_embedding",
    "n_layers", "d_model", "n_heads", "d_ff", "tokens", "epochs", "flops", "flops_per_token",
    *FINAL, "train_seconds", "tokens_per_second",
    "val_fingerprint",
)  # fmt: skip


def rows(plan: Plan, workdir: Path) -> list[dict]:
    """A row for each cell; what is not known yet is None. `tune` holds the tuned keys."""
    found = []
    for cell in plan.cells:
        record = records.record_of(workdir, cell) or {}
        final, data = record.get("final") or {}, record.get("data") or {}
        found.append(
            {
                "run_id": cell.id,
                "variant": cell.arm,
                "role": cell.role,
                "size": cell.size,
                "budget": cell.budget,
                "seed": cell.seed,
                "status": record.get("status", "planned"),
                "n_total": cell.counts["total"],
                "n_non_embedding": cell.counts["non_embedding"],
                **{name: cell.shape[name] for name in ("n_layers", "d_model", "n_heads", "d_ff")},
                "tokens": cell.tokens,
                "epochs": record.get("epochs"),
                "flops": cell.flops,
                "flops_per_token": cell.flops_per_token,
                **{k: final.get(k) for k in FINAL},
                "train_seconds": record.get("wall_seconds"),
                "tokens_per_second": (record.get("throughput") or {}).get("tokens_per_second"),
                "val_fingerprint": data.get("val_fingerprint"),
                "tune": cell.tune,
            }
        )
    _check_one_text(found)
    return found


def _check_one_text(found: list[dict]) -> None:
    """Losses on different held-out tokens must not be compared."""
    texts = {(row["val_fingerprint"], row["val_tokens"]) for row in found if row["val_loss"]}
    if len(texts) > 1:
        raise InputError(
            f"the runs were evaluated on {len(texts)} different sets of held-out tokens "
            f"({', '.join(sorted(str(t[0]) for t in texts))}); a new --workdir would work"
        )


def write(found: list[dict], path: Path) -> None:
    """results.csv; a tuned key has a column of its name."""
    tuned = sorted({key for row in found for key in row["tune"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *tuned], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row["tune"] for row in found if row["role"] != TRUNK)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


def finished(found: list[dict], *roles: str) -> list[dict]:
    """Finished rows of the roles, all but trunks by default."""
    roles = roles or (ANCHOR, HELD_OUT)
    return [r for r in found if r["role"] in roles and r["status"] == "finished"]


def chosen(found: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows, warnings): for each arm, size and budget the tuned values with the least mean loss.

    Values that not every seed finished with are not chosen where others are complete. A best value
    at the edge of its grid is a warning: the arm is not tuned there.
    """
    kept, warnings = [], []
    for place in dict.fromkeys(_place(row) for row in found):
        here = [row for row in found if _place(row) == place]
        by_tune: dict[tuple, list[dict]] = {}
        for row in here:
            by_tune.setdefault(tuple(sorted(row["tune"].items())), []).append(row)
        most = max(len(several) for several in by_tune.values())
        full = {tune: several for tune, several in by_tune.items() if len(several) == most}
        best = min(full, key=lambda tune: np.mean([row["val_loss"] for row in full[tune]]))
        kept += full[best]
        for key, value in best:
            tried = sorted({dict(tune)[key] for tune in by_tune})
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                grid = ", ".join(f"{v:g}" for v in tried)
                message = (
                    f"{place[0]} at {place[1]:g}: the best {key} is {value:g}, at the edge of "
                    f"{grid}; widen config.tune.{key}"
                )
                warnings.append({"code": "edge_of_grid", "message": message})
    return kept, warnings


def _place(row: dict) -> tuple:
    return row["variant"], row["size"], row["budget"]


# Column of results.csv that is the laws' N.
N_COLUMNS = Modes("fit.n", {"non_embedding": "n_non_embedding", "total": "n_total"})


def table(found: list[dict], n: str) -> dict[str, list]:
    """Columns for `lmscale_jax.science`; `n` is "non_embedding" or "total"."""
    return {
        "n": [row[N_COLUMNS[n]] for row in found],
        "d": [row["tokens"] for row in found],
        "c": [row["flops"] for row in found],
        "loss": [row["val_loss"] for row in found],
        "run_id": [row["run_id"] for row in found],
        "variant": [row["variant"] for row in found],
        "seed": [str(row["seed"]) for row in found],
    }
