"""Prints a ladder's cells as a table, with their cost, before anything is trained."""

from pathlib import Path

from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve
from lmscale_jax.data import prepared
from lmscale_jax.errors import InputError
from lmscale_jax.fleet import executors
from lmscale_jax.model import flops
from lmscale_jax.model.build import build
from lmscale_jax.run import budget, explain
from lmscale_jax.study import records
from lmscale_jax.study.cells import HELD_OUT, Cell, short
from lmscale_jax.study.plan import Plan

# Keys of `flops.BF16_PEAKS`.
ACCELERATORS = ("H100", "A100", "TPU v5e", "L4")


def text(plan: Plan, cells: list[Cell], workdir: Path, slots: int) -> str:
    """Makes the table, a row for each arm, role, size and budget, and the totals below it."""
    rate, basis = speed(plan, workdir)
    manifest = prepared.find_manifest(ConfigDict(plan.ladder["run"]["data"]))
    head = ("arm", "role", "size", "layers x width (heads, d_ff)", "total", "non-emb.", "tokens",
            "epochs", "FLOPs", "runs", "time each", "memory")  # fmt: skip
    rows, kinds = [head], {}
    for cell in cells:
        kinds.setdefault((cell.arm, cell.role, cell.size, cell.budget), []).append(cell)
    for kind in kinds.values():
        cell, shape = kind[0], kind[0].shape
        rows.append(
            (
                cell.arm, cell.role, short(cell.size),
                f"{shape['n_layers']} x {shape['d_model']} ({shape['n_heads']}, {shape['d_ff']})",
                f"{cell.counts['total']:,}", f"{cell.counts['non_embedding']:,}",
                f"{cell.tokens:,}", _epochs(plan, cell, manifest), f"{cell.flops:.3g}",
                str(runs_of(kind)), explain.readable(cell.flops / rate),
                memory(plan, cell),
            )
        )  # fmt: skip
    lines = [plan.ladder["question"] or "(no question)", "", *explain.aligned(rows), ""]
    anchors = sum(c.flops for c in cells if c.role != HELD_OUT)
    held_out = _held_out_flops(cells)
    lines.append(
        f"{sum(c.role != HELD_OUT for c in cells)} runs before the forecast, {anchors:.3g} FLOPs; "
        f"{runs_of([c for c in cells if c.role == HELD_OUT])} held out, {held_out:.3g} FLOPs"
    )
    duration = explain.readable((anchors + held_out) / rate / slots)
    lines.append(f"here: about {duration} in {slots} process(es), at {basis}")
    for name in ACCELERATORS:
        peak = flops.peak(name, "bfloat16") * explain.EFFICIENCY
        lines.append(
            f"one {name}: about {explain.readable((anchors + held_out) / peak)}, at "
            f"{explain.EFFICIENCY:.0%} of its bfloat16 peak, which small models do not reach"
        )
    return "\n".join(lines)


def check_cap(plan: Plan, cells: list[Cell], workdir: Path, slots: int) -> None:
    """Raises InputError where the remaining runs would take longer than config.max_hours."""
    cap = plan.ladder["max_hours"]
    if not cap:
        return
    remaining = [c for c in cells if records.status(workdir, c) not in ("finished", "diverged")]
    anchors = sum(c.flops for c in remaining if c.role != HELD_OUT)
    hours = (anchors + _held_out_flops(remaining)) / speed(plan, workdir)[0] / slots / 3600
    if hours > cap:
        raise InputError(
            f"config.max_hours={cap:g} is less than the {hours:.3g} hours estimated for the "
            f"remaining runs; use {hours * 1.2:.2g}, or smaller config.rungs.sizes"
        )


def runs_of(cells: list[Cell]) -> int:
    """Counts the runs of cells; at the held-out rung only one of the tuned values is trained."""
    return len({(c.arm, c.seed, c.size, c.budget, c.role, () if c.role == HELD_OUT else c.id)
                for c in cells})  # fmt: skip


def _held_out_flops(cells: list[Cell]) -> float:
    return sum({(c.arm, c.seed): c.flops for c in cells if c.role == HELD_OUT}.values())


def speed(plan: Plan, workdir: Path) -> tuple[float, str]:
    """Estimates one process's FLOP/s: from finished runs if there are any, else by a probe.

    Returns (FLOP/s, the basis of the estimate in words).
    """
    rates = []
    for cell in plan.cells:
        record = records.record_of(workdir, cell) or {}
        if record.get("status") == "finished" and record.get("wall_seconds"):
            rates.append(cell.flops / record["wall_seconds"])
    if rates:
        best = sorted(rates)[-max(1, len(rates) // 2)]
        return best, f"{best / 1e9:.3g} GFLOP/s, the speed of the finished runs here"
    dtype, on_cpu = plan.ladder["run"]["model"]["dtype"], executors.on_cpu()
    rate = explain.probe(dtype, 1024 if on_cpu else 4096)
    share = explain.CPU_EFFICIENCY[dtype] if on_cpu else explain.EFFICIENCY
    cores = plan.ladder["executor"]["cpus"] / max(1, executors.cores()) if on_cpu else 1.0
    return rate * share * cores, f"{share:.0%} of a {dtype} product measured now"


def _epochs(plan: Plan, cell: Cell, manifest: dict | None) -> str:
    if manifest is None:
        return "?"
    windows = (manifest["splits"]["train"]["tokens"] - 1) // plan.ladder["run"]["data"]["seq_len"]
    each = cell.tokens / plan.ladder["run"]["data"]["seq_len"] / max(1, windows)
    return f"{each:.3g}"


def memory(plan: Plan, cell: Cell) -> str:
    """Formats the peak memory of a training step in one process with one device, in MiB."""
    config = resolve(plan.config(cell, Path()), plan.vocab_size)
    platform = "cpu" if executors.on_cpu() else "gpu"
    model = build(config, platform=platform)
    size = budget.sizes(config, model, {}, platform)["total"]
    return f"{size / 2**20:,.0f} MiB"
