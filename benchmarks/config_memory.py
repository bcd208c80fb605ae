"""Named configs compiled for an H100 that is not here: what a micro-batch holds, and its roofline.

    python -m benchmarks.config_memory [--cases=llama_300m:80gb,speedrun_record26]

Needs jax[cuda13] and no GPU; a minute a config. docs/performance.md has the table.
"""

import importlib
import time

from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError

WANTED = flags.DEFINE_list("cases", [], "some of the configs; all by default")

# Share of a device's memory that JAX allocates by default.
SHARE = 0.75
BYTES = {"80gb": 80e9, "16gb": 16e9}
FAMILIES = [f"{f}_{n}m" for f in ("gpt2", "llama", "transformer_pp") for n in (50, 100, 300)]
# {name: (module of configs/, its argument, the memory that it is for)}.
CASES = {
    **{f"{name}:{memory}": (name, memory, memory) for name in FAMILIES for memory in BYTES},
    **{
        f"mur {f}_50m loss {memory}": ("mur", f"{f}_50m,loss,{memory}", memory)
        for f in ("gpt2", "llama")
        for memory in BYTES
    },
    "speedrun_simple": ("speedrun_simple", "", "80gb"),
    "speedrun_gate": ("speedrun_gate", "elementwise", "80gb"),
    "speedrun_record26": ("speedrun_record26", "", "80gb"),
}


def config_of(case: str):
    """The resolved config of a case."""
    from lmscale_jax.config.resolve import resolve

    name, argument, _ = CASES[case]
    get_config = importlib.import_module(f"lmscale_jax.configs.{name}").get_config
    config = get_config(argument) if argument else get_config()
    return resolve(config, config.model.vocab_size or config.data.vocab_size)


def limit_gib(case: str) -> float:
    return SHARE * BYTES[CASES[case][2]] / 2**30


def account_gib(config, model) -> float:
    """GiB of a step on an H100 by the account of --explain."""
    from lmscale_jax.model import flops
    from lmscale_jax.train import aot

    kind = flops.CHIPS["H100"].kind
    return aot.memory_sizes(config, model, {}, "gpu", kind)["total"] / 2**30


def compiled_row(case: str) -> dict:
    """Compiles the step of a case for an H100. The plugin must not look for a GPU before it."""
    import jax

    from lmscale_jax.config.durations import tokens_per_step
    from lmscale_jax.model import flops, mesh
    from lmscale_jax.train import aot, gpu_descriptions, gpu_report, hlo_text
    from lmscale_jax.train.setup import build_setup

    jax.config.update("jax_platforms", "cpu")
    begin, config, chip = time.perf_counter(), config_of(case), flops.CHIPS["H100"]
    devices = gpu_descriptions.described_gpus(chip, 1, "H100:1")
    setup = build_setup(config, 0, mesh.make_mesh(config, devices))
    model, compiled = setup.model, setup.lower_step().compile(gpu_report.COMPILER_OPTIONS)
    kernels = gpu_report.estimate_step(hlo_text.parse_program(compiled.as_text()), chip)
    seconds, tokens = sum(k.seconds for k in kernels), tokens_per_step(config)
    per_token = flops.flops_per_token(config, model.specs)["model"]
    return {
        "case": case,
        "rows": config.train.batch_size // config.train.accum,
        "length": config.data.seq_len,
        "accum": config.train.accum,
        "remat": config.model.remat,
        "blocks": model.choices["blocks"].split(":")[0],
        "attention": model.choices["attention"].split(":")[0],
        "account": round(account_gib(config, model), 2),
        "peak": round(aot.compiled_memory(compiled)["peak"] / 2**30, 2),
        "limit": round(limit_gib(case), 1),
        "step_s": round(seconds, 4),
        "mfu": round(per_token * tokens / seconds / chip.peak, 4),
        "compile": round(time.perf_counter() - begin),
    }


def main() -> None:
    from lmscale_jax.train import gpu_descriptions

    names = WANTED.value or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise InputError(f"--cases={unknown[0]}: one of {','.join(CASES)} would work")
    if not gpu_descriptions.gpu_compiler_installed():
        raise InputError("--cases needs jax[cuda13]; pip install 'lmscale_jax[cuda13]' would work")
    result = machine.facts(None, machine.asked("cases")) | {"rows": []}
    for name in names:
        result["rows"].append(compiled_row(name))
        print(result["rows"][-1], flush=True)
        machine.save("config_memory", result)
    print(f"\n{tables.headline(result)}\n\n{tables.config_memory(result)}")


if __name__ == "__main__":
    cli.run_command(main)
