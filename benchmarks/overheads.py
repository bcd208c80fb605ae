"""Steps with one thing changed over the plain step:

    python -m benchmarks.overheads --shape=4

Each change is compared with the plain step in turns within one process, a pair at a time, so that
no more than two states are held; the programs are compiled ahead. "temporaries" are those that the
compiler counts for one device, over those of the plain step. What cannot run here is said.
"""

import gc

from absl import flags

from benchmarks import inside, interleave, machine, tables
from benchmarks.shapes import SHAPES, config_of, shape_of, shape_text
from lmscale_jax import cli
from lmscale_jax.errors import InputError, RunFailed

SHAPE = flags.DEFINE_integer("shape", 4, "number of the shape")
CONFIG = cli.config_flag(required=False)
BATCH = flags.DEFINE_integer("batch", 8, "with --config: sequences a step", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "model.dtype")
ROUNDS = flags.DEFINE_integer("rounds", 12, "turns of each step", lower_bound=1)
CHUNK = flags.DEFINE_float("chunk_ms", 400.0, "milliseconds of one turn; 2 steps at the least")
WANTED = flags.DEFINE_list("changes", [], "some of the changes by name; all by default")

A_CORE = "one device a core"
_ACTING = {"mur.tau": 0.1, "mur.warmup": "0"}
# Label: what is set, and what is measured in every step. WINDOW stands for a quarter of a window.
WINDOW = object()
CHANGES = {
    "gate of each head": ({"model.attn_gate": "headwise"}, ()),
    "gate of each channel": ({"model.attn_gate": "elementwise"}, ()),
    "windows of T / 4": ({"model.window_layers": "all", "model.window": WINDOW}, ()),
    "document mask": ({"model.mask": "document"}, ()),
    "qk_norm": ({"model.qk_norm": "rmsnorm"}, ()),
    "Muon": ({"optim.name": "muon"}, ()),
    "NorMuon": ({"optim.name": "normuon"}, ()),
    "mur diagnose, a step that reports": ({"mur.mode": "diagnose"}, ("mur",)),
    "mur update": ({"mur.mode": "update"} | _ACTING, ()),
    "mur loss": ({"mur.mode": "loss", "mur.ramp": "0"} | _ACTING, ()),
    "fp8": ({"model.matmul": "fp8"}, ()),
    "remat block": ({"model.remat": "block"}, ()),
    "remat dots": ({"model.remat": "dots"}, ()),
    "stack scan": ({"model.stack": "scan"}, ()),
    "stack unroll": ({"model.stack": "unroll"}, ()),
    "norms by layer, a step that writes a line": ({}, ("norms",)),
    A_CORE: ({}, ()),
}


def config_with(shape: dict, dtype: str, changes: dict):
    from lmscale_jax.config.resolve import resolve

    window = max(1, shape["T"] // 4)
    changes = {k: window if v is WINDOW else v for k, v in changes.items()}
    cores = 0 if machine.accelerated() else machine.cores_for(shape["B"])
    config = config_of(shape, dtype, cores, changes)
    return resolve(config, shape["V"])


def unable(label: str, config, devices: list) -> str | None:
    """Why a change cannot be measured here."""
    from lmscale_jax.model import fp8

    if label == "fp8":
        matmul = fp8.choose_fp8(config.model, devices[0].platform, devices[0])
        if matmul.product is None:
            return f"not here: {matmul.description}"
    if label == A_CORE and (machine.accelerated() or len(devices) == 1):
        return "not here: there is one core that the batch divides over, or an accelerator"
    return None


def default(devices: list) -> list:
    """What a run takes of them where it is not asked for more."""
    return devices if machine.accelerated() else devices[:1]


def compare(plain, label: str, shape: dict, dtype: str, devices: list) -> dict:
    """One change beside the plain step."""
    changes, measure = CHANGES[label]
    config = config_with(shape, dtype, changes)
    if reason := unable(label, config, devices):
        return {"error": reason}
    some = devices if label == A_CORE else default(devices)
    changed = inside.Steps(label, inside.program(config, some), measure)
    rounds, chunk_ms, limit = ROUNDS.value, CHUNK.value, machine.LIMIT.value
    chunks, losses = interleave.measure([plain, changed], rounds, chunk_ms, limit)
    ours, base = chunks[label], chunks["plain"]
    return {
        "ratio": interleave.ratio(ours, base),
        "plain_ms": interleave.ms(base),
        "ms": interleave.ms(ours),
        "rounds": len(ours),
        "bytes": changed.bytes,
        "bytes_ratio": changed.bytes / plain.bytes if changed.bytes and plain.bytes else None,
        "last_loss": losses[label],
        "ms_by_round": [round(c.ms, 3) for c in ours],
        "clean_by_round": [c.clean for c in ours],
    }


def plan() -> tuple[str, str, dict, str]:
    """(name of the result, what the step is of, shape, type)."""
    if unknown := set(WANTED.value) - set(CHANGES):
        raise InputError(f"--changes={unknown.pop()}: no such change; one of {list(CHANGES)} would")
    if CONFIG.value is not None:
        name, resolved = machine.resolved(CONFIG.value)
        shape = shape_of(resolved, BATCH.value)
        return f"overheads_{name}", f"{name} B={BATCH.value}", shape, resolved.model.dtype
    if SHAPE.value not in SHAPES:
        raise InputError(f"--shape={SHAPE.value}: no such shape; --shape=4 would work")
    # float32 is the result's plain name.
    end = "" if DTYPE.value == "float32" else f"_{DTYPE.value}"
    return f"overheads{end}", f"shape {SHAPE.value}", SHAPES[SHAPE.value], DTYPE.value


def main() -> None:
    import jax

    from lmscale_jax.model import mesh

    name, what, shape, dtype = plan()
    config = config_with(shape, dtype, {})
    mesh.start_jax(config)
    devices = jax.devices()
    of = inside.program(config, default(devices))
    plain = inside.Steps("plain", of)
    asked = machine.asked("shape", "dtype", "rounds", "chunk_ms", "limit")
    result = {"machine": machine.facts(None, asked), "device": of.device(), "what": what}
    result |= {"shape": shape, "dtype": dtype, "rows": {}}
    print(
        f"{tables.headline(result['machine'])}\n{what} ({shape_text(shape)}), {dtype}", flush=True
    )
    failed = []
    for label in WANTED.value or CHANGES:
        try:
            result["rows"][label] = compare(plain, label, shape, dtype, devices)
        except Exception as error:
            # One that does not fit, or does not compile, must not cost the others.
            result["rows"][label] = {"error": f"failed: {' '.join(str(error).split())[:200]}"}
            failed.append(label)
        gc.collect()
        print(f"{label} done", flush=True)
        machine.save(name, result)
    print(f"\n{tables.overheads(result)}")
    if failed:
        raise RunFailed(f"{len(failed)} change(s) failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run_command(main)
