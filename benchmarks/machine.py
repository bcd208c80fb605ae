"""What a table of times must say about where it was made; how tables and results are written."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from lmscale_jax.run import record

TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "interpreter that has PyTorch")
LIMIT = flags.DEFINE_float(
    "limit", 7200.0, "seconds after which a shape begins no more rounds, or no more runs begin"
)
OUT = flags.DEFINE_string(
    "results", str(Path(__file__).parent / "results"), "directory the results are written to"
)

# Instructions that decide how fast a small product is.
_NOTABLE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


def torch_version(python: str) -> str | None:
    """PyTorch's version under an interpreter, or None, said in one line."""
    code = "import torch; print(torch.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    except OSError:
        pass
    print(f"no PyTorch under --torch_python={python}: our own times only", flush=True)
    return None


def facts(torch: str | None, asked: dict) -> dict:
    """Processor, versions, commit, date and what was asked for."""
    provenance = record.provenance()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.system(),
        "versions": provenance["versions"] | {"torch": torch},
        "code": provenance["code"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "asked": asked,
    }


def asked(*names: str) -> dict:
    """The values of some flags."""
    return {name: flags.FLAGS[name].value for name in names}


def _cpu() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {"name": platform.processor() or platform.machine(), "instructions": []}
    said = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    has = (said.get("flags") or said.get("Features") or "").split()
    return {
        "name": said.get("model name", platform.machine()),
        "family": said.get("cpu family"),
        "model": said.get("model"),
        "instructions": [name for name in _NOTABLE if name in has],
    }


def headline(facts: dict) -> str:
    """One line above a table."""
    cpu, versions = facts["cpu"], facts["versions"]
    numbers = f" (family {cpu['family']}, model {cpu['model']})" if cpu.get("family") else ""
    return (
        f"{cpu['name']}{numbers}, {facts['cores']} cores, {' '.join(cpu['instructions'])}; "
        f"Python {versions['python']}, jax {versions['jax']}, torch {versions['torch']}; "
        f"{facts['date']}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column being text and the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(name: str, result: dict, directory: Path | None = None) -> None:
    """Writes NAME.json into `directory`, or --results."""
    path = (directory or Path(OUT.value)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lists of numbers on one line each.
    text = re.sub(
        r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(result, indent=1)
    )
    path.write_text(text + "\n")
