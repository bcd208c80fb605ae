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
from benchmarks.shapes import GPT2_WITHOUT_READOUT, SHAPES, shape_text
from lmscale_jax.files import atomic_write

README = Path(__file__).parent / "README.md"
MARKED = re.compile(r"<!-- table: (?P<name>[\w ]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def _train_step(result: dict) -> str:
    parts = [
        f"Shape {label} ({shape_text(entry['shape'])})\n\n{tables.train_step(entry)}"
        for label, entry in result["shapes"].items()
    ]
    return "\n\n".join(parts)


def _mur(result: dict) -> str:
    parts = [
        f"Shape {label} ({shape_text(entry['shape'])})\n\n{tables.mur(entry['rows'])}"
        for label, entry in result["shapes"].items()
    ]
    return "\n\n".join(parts)


def _pieces(result: dict) -> str:
    times = result["ms"]
    parts = [
        f"Shape {n}, {precision}\n\n{tables.pieces(times, str(n), precision, SHAPES[n]['L'])}"
        for n in GPT2_WITHOUT_READOUT
        for precision in times
    ]
    return "\n\n".join(parts)


def _overheads(result: dict) -> str:
    return (
        f"{result['what']} ({shape_text(result['shape'])}), {result['dtype']}\n\n"
        + tables.overheads(result)
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
    "optimizers": (("optimizers",), lambda result: tables.optimizers(result["sizes"])),
    "nanogpt_char": (("nanogpt_char",), lambda result: tables.whole_runs(result["runs"])),
    "population": (("population",), tables.population),
    "packs_compiled": (("packs_compiled",), tables.packs_compiled),
    "attention": (("attention_cpu_float32", "attention_cpu_bfloat16"), tables.attention),
    "fits": (("fits",), tables.fits),
    "prepare": (("prepare",), tables.prepare),
}


def table_text(name: str, results: Path) -> str:
    """A table, with the machine it was made on above it."""
    names, show = TABLES[name]
    paths = [results / f"{n}.json" for n in names]
    if not all(path.is_file() for path in paths):
        return "Not measured yet."
    contents = [json.loads(path.read_text()) for path in paths]
    facts = contents[0].get("machine", contents[0])
    files = ", ".join(f"`results/{path.name}`" for path in paths)
    return f"{files}: {tables.headline(facts)}\n\n{show(*contents)}"


def rewrite(text: str, results: Path) -> tuple[str, list[str]]:
    """(the document with its tables made anew, the names of those that changed)."""
    changed = []

    def replace(match: re.Match) -> str:
        name = match["name"]
        new = f"<!-- table: {name} -->\n{table_text(name, results)}\n<!-- end -->"
        if new != match[0]:
            changed.append(name)
        return new

    return MARKED.sub(replace, text), changed


def rewrite_file(path: Path, results: Path) -> list[str]:
    """The names of the tables that changed."""
    text, changed = rewrite(path.read_text(), results)
    if changed:
        atomic_write(path, text)
    return changed
