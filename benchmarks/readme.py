"""The tables of benchmarks/README.md, made of the results:

<!-- table: NAME -->
...
<!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import tables
from benchmarks.shapes import GPT2_WITHOUT_READOUT, SHAPES, said

README = Path(__file__).parent / "README.md"
MARKED = re.compile(r"<!-- table: (?P<name>[\w ]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def _train_step(found: dict) -> str:
    parts = [
        f"Shape {label} ({said(one['shape'])})\n\n{tables.train_step(one)}"
        for label, one in found["shapes"].items()
    ]
    return "\n\n".join(parts)


def _mur(found: dict) -> str:
    parts = [
        f"Shape {label} ({said(one['shape'])})\n\n{tables.mur(one['rows'])}"
        for label, one in found["shapes"].items()
    ]
    return "\n\n".join(parts)


def _pieces(found: dict) -> str:
    parts = [
        f"Shape {n}, {precision}\n\n{tables.pieces(found['ms'], str(n), precision, SHAPES[n]['L'])}"
        for n in GPT2_WITHOUT_READOUT
        for precision in found["ms"]
    ]
    return "\n\n".join(parts)


def _overheads(found: dict) -> str:
    return f"{found['what']} ({said(found['shape'])}), {found['dtype']}\n\n" + tables.overheads(
        found
    )


# Name: the results it is made of, and how. The names stand in the README.
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "in_short": (("train_step",), tables.ratios_in_short),
    "in_short_jax012": (("train_step_jax012",), tables.ratios_in_short),
    "train_step": (("train_step",), _train_step),
    "train_step_jax012": (("train_step_jax012",), _train_step),
    "pieces": (("pieces",), _pieces),
    "cores": (("cores",), tables.cores),
    "breakdown": (("breakdown",), tables.breakdown),
    "start": (("start",), tables.start),
    "overheads": (("overheads",), _overheads),
    "mur": (("mur_unroll_none_float32",), _mur),
    "optimizers": (("optimizers",), lambda found: tables.optimizers(found["sizes"])),
    "nanogpt_char": (("nanogpt_char",), lambda found: tables.whole_runs(found["runs"])),
    "population": (("population",), tables.population),
    "attention": (("attention_cpu_float32", "attention_cpu_bfloat16"), tables.attention),
    "fits": (("fits",), tables.fits),
    "prepare": (("prepare",), tables.prepare),
}


def made(name: str, results: Path) -> str:
    """A table, with the machine it was made on above it."""
    names, show = TABLES[name]
    paths = [results / f"{n}.json" for n in names]
    if not all(path.is_file() for path in paths):
        return "Not measured yet."
    found = [json.loads(path.read_text()) for path in paths]
    facts = found[0].get("machine", found[0])
    files = ", ".join(f"`results/{path.name}`" for path in paths)
    return f"{files}: {tables.headline(facts)}\n\n{show(*found)}"


def rewrite(text: str, results: Path) -> tuple[str, list[str]]:
    """(the document with its tables made anew, the names of those that changed)."""
    changed = []

    def one(match: re.Match) -> str:
        name = match["name"]
        new = f"<!-- table: {name} -->\n{made(name, results)}\n<!-- end -->"
        if new != match[0]:
            changed.append(name)
        return new

    return MARKED.sub(one, text), changed


def rewrite_file(path: Path, results: Path) -> list[str]:
    """The names of the tables that changed."""
    text, changed = rewrite(path.read_text(), results)
    if changed:
        path.write_text(text)
    return changed
