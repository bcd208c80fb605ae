"""Writes the tables of docs/scale.md between their markers: docs/scale/plan.py [FILE]

The figures are those of --explain --topology, from the same functions; no chip is asked.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs.base import get_config
from lmscale_jax.files import atomic_write
from lmscale_jax.model import build, costs, flops

ROOT = Path(__file__).parents[2]
VOCABULARY = 32_000


class Size(NamedTuple):
    """A Llama-shaped model and the batch it is trained with, in tokens."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    seq_len: int
    batch: int


SIZES = {
    "0.3B": Size(20, 1024, 16, 16, 2816, 1024, 2**19),
    "1B": Size(22, 2048, 32, 4, 5632, 2048, 2**20),
    "7B": Size(32, 4096, 32, 32, 11008, 4096, 2**22),
    "70B": Size(80, 8192, 64, 8, 28672, 4096, 2**23),
}
COUNTS = (8, 64, 512, 4096)
KINDS = ("H100", "v5p")


def config_of(size: Size):
    """The resolved config of a size, with the recipe of lmscale_jax/config/recipes.py."""
    config = get_config()
    model = config.model
    model.n_layers, model.d_model, model.d_ff = size.n_layers, size.d_model, size.d_ff
    model.n_heads, model.n_kv_heads = size.n_heads, size.n_kv_heads
    model.norm, model.mlp, model.positions, model.head = "rmsnorm", "swiglu", "rope", "untied"
    model.dtype = "bfloat16"
    config.parametrization.residual_init = "plain"
    config.data.seq_len, config.data.vocab_size = size.seq_len, VOCABULARY
    config.train.batch_size = size.batch // size.seq_len
    return resolve(config, VOCABULARY)


def shapes() -> list[str]:
    rows = [["size", "parameters", "blocks", "width", "heads (kv)", "MLP", "length", "batch"]]
    for name, size in SIZES.items():
        n = flops.parameter_counts(build.build_model(config_of(size), platform="tpu").specs)[
            "total"
        ]
        heads = f"{size.n_heads} ({size.n_kv_heads})"
        row = [name, f"{n / 1e9:.3g}e9", size.n_layers, size.d_model, heads, size.d_ff]
        rows.append([str(cell) for cell in (*row, size.seq_len, f"{size.batch / 2**20:g} x 2^20")])
    return table(rows)


def sheets() -> list[str]:
    rows = [["chip", "bfloat16 TFLOP/s", "HBM", "HBM TB/s", "links GB/s", "domain", "network GB/s"]]
    for chip in flops.CHIPS.values():
        figures = (chip.peak / 1e12, chip.memory / 1e9, chip.bandwidth / 1e12, chip.link / 1e9)
        peak, memory, bandwidth, link = (f"{figure:.4g}" for figure in figures)
        network = f"{chip.network / 1e9:.4g}"
        rows.append([chip.name, peak, f"{memory} GB", bandwidth, link, str(chip.domain), network])
    return table(rows)


def plans(kind: str) -> tuple[list[str], list[str]]:
    """Two tables of a kind of chip: what is chosen and held, and what a step costs."""
    chip = flops.CHIPS[kind]
    held = [["model", "chips", "mesh", "accum", "remat", "GB a chip", "of it", "checkpoint"]]
    spent = [
        [
            "model",
            "chips",
            "FLOPs",
            "bytes",
            "compute s",
            *SHORT.values(),
            "step s",
            "MFU",
            "tokens/s",
        ]
    ]
    for name, size in SIZES.items():
        config = config_of(size)
        specs = build.build_model(config, platform=chip.platform).specs
        for count in COUNTS:
            layout = costs.best_layout(config, specs, chip, count)
            if isinstance(layout, str):
                held.append([name, str(count), layout, *[""] * (len(held[0]) - 3)])
                continue
            held.append([name, str(count), *_held(layout, specs, chip, count)])
            spent.append([name, str(count), *_spent(layout.step, size)])
    return table(held), table(spent)


def _held(layout: costs.Layout, specs: dict, chip, count: int) -> list[str]:
    mesh = " ".join(f"{axis}={n}" for axis, n in layout.sizes.items() if n > 1)
    total, (written, seconds) = layout.bytes["total"], costs.checkpoint_cost(specs, count, chip)
    fills, saved = f"{total / chip.memory:.0%}", f"{written / 1e9:,.3g} GB, {seconds:.3g} s"
    return [mesh, str(layout.accum), layout.remat, f"{total / 1e9:.3g}", fills, saved]


# Columns of messages, by what they are called in `costs.Message`.
SHORT = {
    "gather weights": "gather weights",
    "scatter gradients": "scatter gradients",
    "sum gradients": "sum gradients",
    "sum activations": "sum activations",
}


def _spent(step: costs.StepCost, size: Size) -> list[str]:
    cells = []
    for kind in SHORT:
        messages = [message for message in step.messages if message.kind == kind]
        gigabytes = sum(message.fast + message.network for message in messages) / 1e9
        share = sum(message.seconds for message in messages) / step.compute
        cells.append(f"{gigabytes:.3g} GB, {share:.0%}" if messages else "-")
    return [
        f"{step.chip_flops:.2e}", f"{step.moved:.2e}", f"{step.compute:.3g}", *cells,
        f"{step.seconds:.3g}", f"{step.mfu:.0%}", f"{size.batch / step.seconds:,.0f}",
    ]  # fmt: skip


def accuracy() -> list[str]:
    """The rows of benchmarks/results/memory.json."""
    rows = [["config", "on", "changed", "estimate MiB", "compiled MiB", "ratio", "measured MiB"]]
    results = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["rows"]
    for key, row in results.items():
        name, where, changes = [*key.split(" ", 2), ""][:3]
        ours, theirs = row["estimate"]["total"], row["compiled"]["peak"]
        seen = f"{row['measured'] / 2**20:,.0f}" if "measured" in row else ""
        megabytes = (f"{size / 2**20:,.0f}" for size in (ours, theirs))
        rows.append([name, where, changes, *megabytes, f"{ours / theirs:.2f}", seen])
    return table(rows)


def table(rows: list[list[str]]) -> list[str]:
    head, *rest = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest)]


def written(text: str) -> str:
    """The document with its tables made anew."""
    tables = {"shapes": shapes(), "chips": sheets(), "accuracy": accuracy()}
    for kind in KINDS:
        tables[f"{kind} held"], tables[f"{kind} spent"] = plans(kind)
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        inside = re.escape(begin) + ".*?" + re.escape(end)
        whole = "\n".join([begin, "", *lines, "", end])
        text, times = re.subn(inside, lambda _, whole=whole: whole, text, flags=re.DOTALL)
        if times != 1:
            raise ValueError(f"docs/scale.md has {times} places for the table {name!r}, not one")
    return text


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/scale.md"
    atomic_write(path, written(path.read_text()))
