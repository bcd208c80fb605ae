"""The tables of accelerator.json. No flags, nothing of JAX: any table can be made anywhere."""

from benchmarks import tables
from benchmarks.tables import headline, table

SHOWN_KERNELS = 25


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def losses(result: dict) -> str:
    """The largest difference between the losses of two platforms."""
    head = ["losses in nats", "steps", "first", "last", "largest difference", "may be", "equal"]
    rows = [
        [
            name,
            str(row["steps"]),
            f"{row['first']:.4f}",
            f"{row['last']:.4f}",
            f"{row['largest']:.2e}",
            f"{row['allowed']:.0e}",
            "yes" if row["equal"] else "NO",
        ]
        for name, row in result["rows"].items()
    ]
    return f"{result['here']} beside {result['there']}\n\n{table(head, rows)}"


def steps(result: dict) -> str:
    """Training steps of one model, ours and the peer's, one line for each number of sequences."""
    head = ["sequences x tokens", "side", "ms a step", "estimate, ms", "tokens/s", "MFU",
            "peak GiB", "by the compiler", "compiling, s", "ms / torch"]  # fmt: skip
    rows = []
    for entry in result["batches"]:
        label = f"{entry['rows']} x {entry['length']}"
        for side, row in entry["sides"].items():
            if "error" in row:
                rows.append([label, side, "failed", *[""] * (len(head) - 3)])
                continue
            rows.append(
                [
                    label,
                    side,
                    f"{row['ms']['median']:.2f}" if row["ms"]["n"] else "no clean turn",
                    _number(row["estimate_ms"], ".2f"),
                    _number(row["tokens_s"], ",.0f"),
                    _number(row["mfu"], ".1%"),
                    _number(row["peak_gib"], ".2f"),
                    _number(row["compiled_gib"], ".2f"),
                    _number(row["compile_s"], ".0f"),
                    _number((row["over_torch"] or {}).get("median"), ".2f"),
                ]
            )
    errors = [
        f"{side}: {row['error']}"
        for entry in result["batches"]
        for side, row in entry["sides"].items()
        if "error" in row
    ]
    remark = [result["remark"]] if result.get("remark") else []
    return "\n\n".join([table(head, rows), *remark, *errors])


def categories(rows: list[dict]) -> str:
    """Profiled and estimated milliseconds by category."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        total = sums.setdefault(row["category"] or "not in the estimate", [0.0, 0.0])
        total[0] += row["ms"]
        total[1] += row["estimate"] or 0.0
    lines = [
        [
            name,
            f"{measured:.3f}",
            f"{expected:.3f}",
            f"{measured / expected:.2f}" if expected else "",
        ]
        for name, (measured, expected) in sorted(sums.items(), key=lambda x: -x[1][0])
    ]
    return table(["category", "measured, ms", "estimate, ms", "ratio"], lines)


def profile(result: dict) -> str:
    """The kernels of the slowest step beside their estimates."""
    rows = result["kernels"]
    lines = [
        [
            f"`{row['name']}`",
            row["category"],
            f"{row['times']:g}",
            f"{row['ms']:.3f}",
            _number(row["estimate"], ".3f"),
        ]
        for row in rows[:SHOWN_KERNELS]
    ]
    head = ["kernel", "category", "times a step", "measured, ms", "estimate, ms"]
    busy = sum(row["ms"] for row in rows)
    title = (
        f"{result['model']}, {result['rows']} sequences: kernels of a step take {busy:.2f} ms of "
        f"{result['ms']:.2f}"
    )
    return f"{title}\n\n{categories(rows)}\n\n{table(head, lines)}"


def ratios(result: dict) -> str:
    """Changes of a step over the plain step."""
    head = ["change", "ms a step", "/ plain", "estimate of that", "peak GiB"]
    rows = [
        [
            name,
            f"{row['ms']['median']:.2f}" if row["ms"]["n"] else "no clean turn",
            _number(row["over_plain"]["median"], ".3f"),
            _number(row["estimated_over_plain"], ".3f"),
            _number(row["peak_gib"], ".2f"),
        ]
        for name, row in result["rows"].items()
        if "error" not in row
    ]
    errors = [f"{n}: {row['error']}" for n, row in result["rows"].items() if "error" in row]
    return "\n\n".join([f"{result['model']}", table(head, rows), *errors])


def attention(result: dict) -> str:
    """Attention kernels by length; they take less than on a CPU, so times have more digits."""
    return tables.attention(result, digits=2)


def packs(result: dict) -> str:
    """Members of one program over one run."""
    return tables.population(result)


# Name in the result of a part: what makes its text.
SHOW = {
    "losses": losses, "steps": steps, "profile": profile, "ratios": ratios, "attention": attention,
    "packs": packs,
}  # fmt: skip


def page(result: dict) -> str:
    """Everything so far, in the order in which it ran."""
    facts = result["machine"]
    lines = [f"# {result['device'] or 'no device so far'}", headline(facts)]
    commit = (facts["code"] or {}).get("commit", "")[:12]
    lines.append(
        f"{result['seconds']:.0f} of {60 * result['minutes']:.0f} seconds; commit {commit}"
    )
    for name, part in result["parts"].items():
        lines.append(f"## {name}")
        if "result" in part:
            lines.append(SHOW[part["show"]](part["result"]))
        if reason := part.get("error") or part.get("skipped"):
            lines.append(f"{'failed' if 'error' in part else 'skipped'}: {reason}")
        if "seconds" in part:
            lines.append(f"({part['seconds']:.0f} s)")
    return "\n\n".join(lines) + "\n"
