"""What a table of times must say about where it was made; how results are written."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from lmscale_jax.files import atomic_write
from lmscale_jax.train import run_dir

TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "interpreter that has PyTorch")
LIMIT = flags.DEFINE_float(
    "limit", 7200.0, "seconds after which a shape begins no more rounds, or no more runs begin"
)
OTHERS = flags.DEFINE_float(
    "others", 0.2, "cores that other processes may use in a turn that counts"
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


def accelerated() -> bool:
    """Whether JAX has an accelerator here. Asks no device: a process that did would hold it."""
    from lmscale_jax.ladders import machine

    return not machine.runs_on_cpu()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cores_for(batch: int) -> int:
    """The most cores that a batch divides over."""
    return max(n for n in range(1, cores() + 1) if batch % n == 0)


def facts(torch: str | None, asked: dict) -> dict:
    """Processor, versions, commit, date and what was asked for."""
    provenance = run_dir.provenance()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": cores(),
        "system": platform.system(),
        "versions": provenance["versions"] | {"torch": torch},
        "code": provenance["code"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "asked": asked,
    }


def resolved(config) -> tuple[str, object]:
    """(name of --config's file, the config as it would be used). Tokens are random here, so no
    tokenizer is asked how many it has."""
    from ml_collections import config_flags

    from lmscale_jax.config.resolve import resolve

    path = config_flags.get_config_filename(flags.FLAGS["config"])
    rows = config.model.vocab_size or config.data.vocab_size
    return Path(path.partition(":")[0]).stem, resolve(config, rows)


def asked(*names: str) -> dict:
    """The values of some flags."""
    return {name: flags.FLAGS[name].value for name in names}


def _cpu() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {"name": platform.processor() or platform.machine(), "instructions": []}
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    has = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name", platform.machine()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "instructions": [name for name in _NOTABLE if name in has],
    }


def save(name: str, result: dict, directory: Path | None = None) -> None:
    """Writes NAME.json into `directory`, or --results."""
    path = (directory or Path(OUT.value)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lists of numbers on one line each.
    text = re.sub(
        r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(result, indent=1)
    )
    atomic_write(path, text + "\n")
