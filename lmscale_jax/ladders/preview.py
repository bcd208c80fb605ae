"""Prints a ladder's cells as a table, with their cost, before anything is trained."""

import math
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.ladders import machine, results
from lmscale_jax.ladders.grid import ANCHOR, HELD_OUT, Cell, short_count
from lmscale_jax.ladders.plan import LadderPlan, describe_dtype
from lmscale_jax.model import flops
from lmscale_jax.model.build import build_model
from lmscale_jax.scaling import design, pairs
from lmscale_jax.train import aot, explain

# Fewest degrees of freedom within cells for a scatter of this ladder's own.
MIN_SPARE = 3
# Keys of `flops.BF16_PEAKS`.
ACCELERATORS = ("H100", "A100", "TPU v5e", "L4")


def preview_table(plan: LadderPlan, cells: list[Cell], workdir: Path, slots: int) -> str:
    """Makes the table, a row for each arm, role, size and budget, and the totals below it."""
    rate, basis = process_speed(plan, workdir)
    manifest = prepare.find_manifest(ConfigDict(plan.ladder["run"]["data"]))
    head = ("arm", "role", "size", "layers x width (heads, d_ff)", "total", "non-emb.", "tokens",
            "epochs", "FLOPs", "runs", "time each", "memory")  # fmt: skip
    rows, kinds = [head], {}
    for cell in cells:
        kinds.setdefault((cell.arm, cell.role, cell.size, cell.budget), []).append(cell)
    for kind in kinds.values():
        cell, shape = kind[0], kind[0].shape
        rows.append(
            (
                cell.arm, cell.role, short_count(cell.size),
                f"{shape['n_layers']} x {shape['d_model']} ({shape['n_heads']}, {shape['d_ff']})",
                f"{cell.counts['total']:,}", f"{cell.counts['non_embedding']:,}",
                f"{cell.tokens:,}", _epochs(plan, cell, manifest), f"{cell.flops:.3g}",
                str(count_runs(kind)), explain.readable_seconds(cell.flops / rate),
                process_memory(plan, cell),
            )
        )  # fmt: skip
    lines = [plan.ladder["question"] or "(no question)", "", *explain.aligned_rows(rows), ""]
    anchors = sum(c.flops for c in cells if c.role != HELD_OUT)
    held_out = _held_out_flops(cells)
    lines.append(
        f"{sum(c.role != HELD_OUT for c in cells)} runs before the forecast, {anchors:.3g} FLOPs; "
        f"{count_runs([c for c in cells if c.role == HELD_OUT])} held out, {held_out:.3g} FLOPs"
    )
    lines += precision_lines(plan, workdir)
    lines.append(describe_dtype(plan))
    duration = explain.readable_seconds((anchors + held_out) / rate / slots)
    lines.append(f"here: about {duration} in {slots} process(es), at {basis}")
    for name in ACCELERATORS:
        peak = flops.peak_flops(name, "bfloat16") * explain.EFFICIENCY
        lines.append(
            f"one {name}: about {explain.readable_seconds((anchors + held_out) / peak)}, at "
            f"{explain.EFFICIENCY:.0%} of its bfloat16 peak, which small models do not reach"
        )
    return "\n".join(lines)


def precision_lines(plan: LadderPlan, workdir: Path) -> list[str]:
    """Says what the ladder will be able to tell, and what one more seed or small size would add.

    The noise of seeds is that of the finished runs, or assumed where there are too few.
    """
    first = next(iter(plan.ladder["arms"]))
    anchors = [c for c in plan.cells if c.role == ANCHOR and c.arm == first]
    targets = [c.flops for c in plan.cells if c.role == HELD_OUT]
    log_c = np.unique([round(math.log(c.flops), 6) for c in anchors])
    if len(log_c) < 2 or not targets:
        return []
    seeds, target = len({c.seed for c in anchors}), math.log(max(targets))
    noise, basis = _noise_of_seeds(plan, workdir)
    smaller = np.append(log_c[0] - np.diff(log_c).mean(), log_c)
    designs = {
        "as planned": (log_c, seeds),
        "one more seed": (log_c, seeds + 1),
        "one smaller size": (smaller, seeds),
    }
    results_by_design = {
        name: design.predict_precision(
            x, n, target, noise.scatter, correlation=max(noise.correlation or 0.0, 0.0)
        )
        for name, (x, n) in designs.items()
    }
    planned = results_by_design["as planned"].flops
    rows = [
        ("it can tell", "forecast +-", "offset of compute", "shift of exponent", "anchors' cost")
    ]
    for name, told in results_by_design.items():
        shown = [f"{v:.2g} %" if v is not None else "no test" for v in (
            100 * told.width / 2 if told.width else None,
            100 * told.offset if told.offset else None,
            100 * told.shift if told.shift else None,
        )]  # fmt: skip
        rows.append((name, *shown, f"{told.flops / planned:.2f}"))
    note = (
        f"(smallest effects found with 90 % power at 5 %, if seeds scatter by "
        f"{100 * noise.scatter:.2g} % and correlate by {noise.correlation or 0:.2g} between the "
        f"arms {basis} and the loss falls by {design.USUAL_SLOPE:g} % per % of compute)"
    )
    return ["", *explain.aligned_rows(rows), note, ""]


def _noise_of_seeds(plan: LadderPlan, workdir: Path) -> tuple[design.SeedNoise, str]:
    """Returns the noise of ln L between seeds, and where it comes from."""
    finished = [
        row
        for row in results.result_rows(plan, workdir)
        if row["val_loss"] and row["role"] == ANCHOR
    ]
    if finished:
        noise = design.seed_noise(
            np.log([row["val_loss"] for row in finished]),
            [row["variant"] for row in finished],
            [f"{r['size']} {r['budget']} {sorted(r['tune'].items())}" for r in finished],
            [row["seed"] for row in finished],
        )
        if noise.degrees >= MIN_SPARE:
            return noise, f"as the {len(finished)} finished runs here do"
    return design.SeedNoise(design.USUAL_SCATTER, 0, pairs.USUAL_CORRELATION), "(assumed)"


def check_hours(plan: LadderPlan, cells: list[Cell], workdir: Path, slots: int) -> None:
    """Raises InputError where the remaining runs would take longer than config.max_hours."""
    cap = plan.ladder["max_hours"]
    if not cap:
        return
    remaining = [
        c for c in cells if results.cell_status(workdir, c) not in ("finished", "diverged")
    ]
    anchors = sum(c.flops for c in remaining if c.role != HELD_OUT)
    hours = (anchors + _held_out_flops(remaining)) / process_speed(plan, workdir)[0] / slots / 3600
    if hours > cap:
        raise InputError(
            f"config.max_hours={cap:g} is less than the {hours:.3g} hours estimated for the "
            f"remaining runs; use {hours * 1.2:.2g}, or smaller config.rungs.sizes"
        )


def count_runs(cells: list[Cell]) -> int:
    """Counts the runs of cells; at the held-out rung only one of the tuned values is trained."""
    return len({(c.arm, c.seed, c.size, c.budget, c.role, () if c.role == HELD_OUT else c.id)
                for c in cells})  # fmt: skip


def _held_out_flops(cells: list[Cell]) -> float:
    return sum({(c.arm, c.seed): c.flops for c in cells if c.role == HELD_OUT}.values())


def process_speed(plan: LadderPlan, workdir: Path) -> tuple[float, str]:
    """Estimates one process's FLOP/s: from finished runs if there are any, else by a probe.

    Returns (FLOP/s, the basis of the estimate in words).
    """
    rates = []
    for cell in plan.cells:
        record = results.cell_record(workdir, cell) or {}
        if record.get("status") == "finished" and record.get("wall_seconds"):
            rates.append(cell.flops / record["wall_seconds"])
    if rates:
        best = sorted(rates)[-max(1, len(rates) // 2)]
        return best, f"{best / 1e9:.3g} GFLOP/s, the speed of the finished runs here"
    dtype, on_cpu = plan.ladder["run"]["model"]["dtype"], machine.runs_on_cpu()
    rate = explain.probe_flops(dtype, 1024 if on_cpu else 4096)
    share = explain.CPU_EFFICIENCY[dtype] if on_cpu else explain.EFFICIENCY
    cores = plan.ladder["executor"]["cpus"] / max(1, machine.available_cores()) if on_cpu else 1.0
    return rate * share * cores, f"{share:.0%} of a {dtype} product measured now"


def _epochs(plan: LadderPlan, cell: Cell, manifest: dict | None) -> str:
    if manifest is None:
        return "?"
    windows = (manifest["splits"]["train"]["tokens"] - 1) // plan.ladder["run"]["data"]["seq_len"]
    each = cell.tokens / plan.ladder["run"]["data"]["seq_len"] / max(1, windows)
    return f"{each:.3g}"


def process_memory(plan: LadderPlan, cell: Cell) -> str:
    """Formats the peak memory of a training step in one process with one device, in MiB."""
    config = resolve(plan.config(cell, Path()), plan.vocab_size)
    platform = "cpu" if machine.runs_on_cpu() else "gpu"
    boundary = prepare.find_token_ids(config.data).boundary
    model = build_model(config, platform=platform, bos_id=boundary)
    size = aot.memory_sizes(config, model, {}, platform)["total"]
    return f"{size / 2**20:,.0f} MiB"
