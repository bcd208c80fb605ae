"""Results as Markdown tables. Made of what JSON holds alone: old results are shown as well as new.

No flags are defined here and nothing of JAX is needed, so any table can be made anywhere.
"""

import statistics

NONE = "no clean chunk"
# What the ratios of train_step.json are to: columns, and the rows of which one fills each.
BASES = {
    "/ torch float32, or autocast": ("torch float32", "torch bfloat16 autocast"),
    "/ the same compiled": ("torch float32 compiled", "torch bfloat16 autocast compiled"),
    "/ torch pure bfloat16": ("torch bfloat16 pure",),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column being text and the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(quantity: dict | None, digits: int) -> str:
    """Median and quartiles."""
    if not quantity or not quantity["n"]:
        return NONE
    low, high = quantity["quartiles"]
    return f"{quantity['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def headline(facts: dict) -> str:
    """One line above a table: where and when it was made."""
    cpu, versions = facts["cpu"], facts["versions"]
    numbers = f" (family {cpu['family']}, model {cpu['model']})" if cpu.get("family") else ""
    return (
        f"{cpu['name']}{numbers}, {facts['cores']} cores, {' '.join(cpu['instructions'])}; "
        f"Python {versions['python']}, jax {versions['jax']}, torch {versions['torch']}; "
        f"{facts['date']}"
    )


def _filled(head: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that no row fills; what a result does not hold is not shown."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def train_step(result: dict) -> str:
    """The table of one shape of train_step.json."""
    head = ["", "ms a step", "clean rounds", "tokens/s", "GFLOP/s", "of a bare product", *BASES]
    rows = []
    for label, row in result["rows"].items():
        if "error" in row:
            rows.append([label, "failed"] + [""] * (len(head) - 2))
            continue
        speed = [f"{row[name]:,.0f}" if row.get(name) else "" for name in ("tokens_s", "gflops")]
        share = f"{row['of_product']:.0%}" if row.get("of_product") else ""
        ratios = [
            next((cell(row["ratio_to"][b], 2) for b in some if b in row["ratio_to"]), "")
            for some in BASES.values()
        ]
        clean = f"{row['ms']['n']} of {row['rounds']}"
        rows.append([label, cell(row["ms"], 1), clean, *speed, share, *ratios])
    text = _filled(head, rows)
    if result.get("products"):
        rates = [
            f"{label} {product['gflops']:,.0f}" for label, product in result["products"].items()
            if product["gflops"]
        ]  # fmt: skip
        text += f"\n\nBare products, GFLOP/s: {'; '.join(rates)}."
    return text


def ratios_in_short(result: dict) -> str:
    """Only our rows of all shapes of train_step.json, and only what they are divided by."""
    head = ["ours", *BASES]
    rows = []
    for number, shape in result["shapes"].items():
        for label, row in shape["rows"].items():
            if label.startswith("ours") and "error" not in row:
                ratios = [
                    next((_short(row["ratio_to"][b]) for b in some if b in row["ratio_to"]), "")
                    for some in BASES.values()
                ]
                rows.append([f"{number}, {label.removeprefix('ours ')}", *ratios])
    return _filled(head, rows)


def _short(quantity: dict) -> str:
    if not quantity["n"]:
        return NONE
    low, high = quantity["quartiles"]
    return f"{quantity['median']:.2f} [{low:.2f}, {high:.2f}] n={quantity['n']}"


def pieces(times: dict, shape: str, precision: str, layers: int) -> str:
    """Parts of pieces.json times how often they occur, and their sum."""
    sides = [side for side in ("torch", "ours") if side in times[precision]]
    rows, totals = [], dict.fromkeys(sides, 0.0)
    for part in times[precision]["ours"][shape]:
        n = {"norm": 2 * layers + 1, "readout and loss": 1, "clip and AdamW": 1}.get(part, layers)
        cells = []
        for side in sides:
            ms = n * statistics.median(times[precision][side][shape][part])
            totals[side] += ms
            cells.append(ms)
        rows.append([part, str(n), *(f"{ms:.2f}" for ms in cells), f"{cells[-1] / cells[0]:.2f}"])
    sums = [totals[side] for side in sides]
    rows.append(["sum", "", *(f"{ms:.1f}" for ms in sums), f"{sums[-1] / sums[0]:.2f}"])
    return table(["", "times a step", *(f"{s}, ms a step" for s in sides), "ours / torch"], rows)


def cores(result: dict) -> str:
    """cores.json: a process on each core beside one process on all."""
    head = ["shape, type", "", "ms over all steps", "steps/s / one process", "steps/s / torch",
            "clean rounds"]  # fmt: skip
    rows = []
    for number, shape in result["shapes"].items():
        for dtype, some in shape["rows"].items():
            for label, row in some.items():
                ratios = [cell(row[k], 2) if row[k] else "" for k in ("gain", "over_torch")]
                clean = f"{row['ms']['n']} of {row['rounds']}"
                rows.append([f"{number}, {dtype}", label, cell(row["ms"], 1), *ratios, clean])
    return table(head, rows)


def breakdown(result: dict) -> str:
    """breakdown.json: a line for each shape and type."""
    parts = list(next(iter(result["rows"].values()))["parts"])
    head = ["shape, type, devices", *(f"{part}, ms" for part in parts)]
    rows = [
        [f"{label}, {row['device']['count']}", *(cell(row["parts"][p], 2) for p in parts)]
        for label, row in result["rows"].items()
    ]
    return table(head, rows)


def start(result: dict) -> str:
    """start.json: seconds from the process's start to the end of its first step, by part."""
    parts = list(next(iter(result["rows"].values()))["parts"])
    head = ["config, compile cache", *parts]
    rows = [
        [label, *(cell(row["parts"][part], 2) for part in parts)]
        for label, row in result["rows"].items()
    ]
    return table(head, rows)


def overheads(result: dict) -> str:
    """overheads.json: steps with one thing changed over the plain step."""
    head = ["changed", "/ the plain step", "plain, ms", "ms", "clean rounds", "temporaries / plain"]
    rows = []
    for label, row in result["rows"].items():
        if "error" in row:
            rows.append([label, row["error"], "", "", "", ""])
            continue
        clean = f"{row['ratio']['n']} of {row['rounds']}"
        memory = f"{row['bytes_ratio']:.2f}" if row["bytes_ratio"] else ""
        plain, changed = cell(row["plain_ms"], 1), cell(row["ms"], 1)
        rows.append([label, cell(row["ratio"], 3), plain, changed, clean, memory])
    return table(head, rows)


def mur(result: dict) -> str:
    """The rows of one shape of mur_*.json."""
    head = ["", "ms a step", "/ off", "/ off, all rounds", "clean rounds", "FLOPs / off",
            "memory / off"]  # fmt: skip
    rows = [
        [
            label, cell(row["ms"], 1), cell(row["ratio"], 3), cell(row["ratio_of_all_rounds"], 3),
            f"{row['ms']['n']} of {row['rounds']}", f"{row['flops_ratio']:.3f}",
            f"{row['bytes_ratio']:.2f}",
        ]
        for label, row in result.items()
    ]  # fmt: skip
    return table(head, rows)


def optimizers(results: dict[str, dict]) -> str:
    """One table over all sizes of optimizers.json."""
    head = ["", "tokens a step", "side", "ms a step", "/ adamw", "/ stacked", "T m / B", "share"]
    rows = []
    for size, result in results.items():
        tokens = result["shape"]["B"] * result["shape"]["T"]
        for label, row in result["rows"].items():
            versus = "" if label == "adamw" else cell(row["ratio_to_adamw"], 2)
            stacked = cell(row["ratio_to_stacked"], 2) if "muon" in label else ""
            expected = [
                f"1 + {result[k]:.2f}" if label == "muon" else "" for k in ("rule", "share")
            ]
            rows.append(
                [size, f"{tokens:,}", label, cell(row["ms"], 1), versus, stacked, *expected]
            )
    return table(head, rows)


def population(result: dict) -> str:
    """population.json: tokens a second of all members over those of one run."""
    counts = [name for name in result["sizes"][0]["ratios"] if name != "alone"]
    head = ["width", "alone, tokens/s", *(f"K = {name}" for name in counts)]
    rows = [
        [str(size["width"]), f"{size['alone']:,.0f}", *(f"{size['ratios'][n]:.2f}" for n in counts)]
        for size in result["sizes"]
    ]
    return table(head, rows)


def config_memory(result: dict) -> str:
    """config_memory.json: GiB of a micro-batch, and the estimated MFU of a step."""
    head = ["config", "micro-batch", "accum", "remat", "blocks", "attention", "GiB",
            "of", "our account", "MFU, est."]  # fmt: skip
    rows = [
        [
            f"`{row['case']}`",
            f"{row['rows']} x {row['length']:,}",
            str(row["accum"]),
            row["remat"],
            row["blocks"],
            row["attention"],
            f"{row['peak']:.1f}",
            f"{row['limit']:.1f}",
            f"{row['account']:.1f}",
            f"{row['mfu']:.0%}",
        ]
        for row in result["rows"]
    ]
    return table(head, rows)


def packs_compiled(result: dict) -> str:
    """packs_compiled.json: estimated microseconds alone, and the gain of a pack."""
    counts = result["asked"]["counts"]
    head = ["ladder, parameters", "type", "GFLOPs a step", "alone, μs a step", "kernels"]
    head += [f"K = {n}" for n in counts]
    rows = [
        [
            f"{row['ladder']}, {row['size']:,.0f}",
            row["dtype"],
            f"{row['flops'] / 1e9:,.2f}",
            f"{row['alone_us']:,.0f}",
            f"{row['kernels']:,}",
            *(f"{row['faster'][n]:.1f}" for n in counts),
        ]
        for row in result["rows"]
    ]
    return table(head, rows)


def attention(*results: dict, digits: int = 1) -> str:
    """attention_*.json of one or several types, side by side; times in ms with so many digits."""
    head, rows = ["length", "kernel"], {}
    for result in results:
        head += [f"{result['asked']['dtype']}: ms", "over xla", "temporaries, MiB"]
    for number, result in enumerate(results):
        for row in result["rows"]:
            key = (row["length"], row["kernel"])
            cells = rows.setdefault(key, [""] * 3 * len(results))
            memory = row["temporary_bytes"] / 2**20
            cells[3 * number : 3 * number + 3] = [
                f"{row['ms']:.{digits}f}", f"{row['over_xla']:.2f}", f"{memory:.0f}"
            ]  # fmt: skip
    return table(head, [[str(a), b, *rows[a, b]] for a, b in sorted(rows)])


def prepare(result: dict) -> str:
    """prepare.json."""
    rounds = result["rounds"]
    rows = []
    for label, name, count in (
        ("ours: train the BPE, drop duplicates, split, encode, write, hash", "ours_s", "tokens"),
        ("`datasets.map`, a process a core, the tokenizer given, one array", "plain_s",
         "plain_tokens"),
    ):  # fmt: skip
        times = [r[name] for r in rounds]
        middle = statistics.median(times)
        span = f"{middle:.1f} ({min(times):.1f} to {max(times):.1f})"
        rows.append([label, span, f"{rounds[0][count] / middle:,.0f}"])
    return table(["", "seconds", "tokens a second"], rows)


def fits(result: dict) -> str:
    """fits.json."""
    ours, other = result["ours"], result["peer"]
    scale = result["asked"]["starts"] / other["starts"]
    note = "" if scale == 1 else f" (extrapolated from {other['starts']})"
    agree, near = 100 * ours["agree"] / ours["starts"], 100 * other["within_0.1%"]
    rows = [
        ["full point fit, s", f"{ours['fit_s']:.4f}", f"{other['fit_s'] * scale:.1f}{note}"],
        ["the same with the other widths and all checks, s", f"{ours['fit_and_checks_s']:.4f}", ""],
        ["starts", str(ours["starts"]), str(result["asked"]["starts"])],
        ["objective", f"{ours['objective']:.10e}", f"{other['objective']:.10e}"],
        ["starts that end within 0.1 % of the best", f"{agree:.0f} %", f"{near:.1f} %"],
        ["starts that end more than 10 % worse", "", f"{100 * other['over_10%']:.1f} %"],
    ]
    if other["draws"]:
        factor = ours["draws"] / other["draws"]
        note = "" if factor == 1 else f" (extrapolated from {other['draws']})"
        seconds = f"{other['draws_s'] * factor:.1f}{note}"
        rows.append([f"{ours['draws']} bootstrap draws, s", f"{ours['draws_s']:.2f}", seconds])
    if "worse_draws" in ours:
        worse = [f"{100 * side['worse_draws']:.1f} %" for side in (ours, other)]
        rows.append(["draws ending more than 1e-6 worse than the other's", *worse])
    return table(["", "ours", "L-BFGS-B, finite differences"], rows)


def whole_runs(runs: list[dict]) -> str:
    """nanogpt_char.json: means over seeds, and the standard deviation of the loss between them."""
    head = ["", "seeds", "whole process, s", "steps/s in the loop", "validation loss", "by seed"]
    rows = []
    for precision in dict.fromkeys(r["precision"] for r in runs):
        for side in dict.fromkeys(r["side"] for r in runs):
            some = [r for r in runs if (r["side"], r["precision"]) == (side, precision)]
            if not some:
                continue
            losses = [r["val_loss"] for r in some]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            rows.append([
                f"{side} {precision}", str(len(some)), _spans([r["seconds"] for r in some]),
                _spans([r["steps_per_second"] for r in some]),
                f"{statistics.fmean(losses):.4f}{spread}",
                ", ".join(f"{loss:.4f}" for loss in losses),
            ])  # fmt: skip
    return table(head, rows)


def _spans(values: list[float]) -> str:
    """Mean and range."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else mean
