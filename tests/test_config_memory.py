"""Every named config fits the accelerator that it is for, by our account and by the compiler's."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale_jax.config.recipes import MEMORIES
from lmscale_jax.config.resolve import resolve
from lmscale_jax.model.build import build_model
from lmscale_jax.train import aot, gpu_descriptions

ROOT = Path(__file__).parents[1]
# Share of a device's memory that JAX allocates by default.
SHARE = 0.75
BYTES = {"80gb": 80e9, "16gb": 16e9}
FAMILIES = [f"{f}_{n}m" for f in ("gpt2", "llama", "transformer_pp") for n in (50, 100, 300)]
# (module, argument), and the memory that it is for.
CASES = {
    **{f"{name}:{memory}": (name, memory, memory) for name in FAMILIES for memory in MEMORIES},
    **{
        f"mur:{f}_50m,loss,{memory}": ("mur", f"{f}_50m,loss,{memory}", memory)
        for f in ("gpt2", "llama")
        for memory in MEMORIES
    },
    "speedrun_simple": ("speedrun_simple", "", "80gb"),
    "speedrun_gate": ("speedrun_gate", "elementwise", "80gb"),
    "speedrun_record26": ("speedrun_record26", "", "80gb"),
}
SMALL = ("quickstart", "muon_small", "mur_small", "nanogpt_char", "coord_check", "lr_transfer")


def config_of(name: str, argument: str):
    get_config = importlib.import_module(f"lmscale_jax.configs.{name}").get_config
    config = get_config(argument) if argument else get_config()
    return resolve(config, config.model.vocab_size or config.data.vocab_size)


def test_every_config_is_here():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert names == {case[0] for case in CASES.values()} | set(SMALL) | {
        "__init__", "base", "laddering",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_fits_by_account(case):
    name, argument, memory = CASES[case]
    config = config_of(name, argument)
    model = build_model(config, platform="gpu", bos_id=0)
    if model.choices["attention"].startswith("xla"):
        pytest.skip("this attention needs a kernel that is not installed")
    sizes = aot.memory_sizes(config, model, {}, "gpu")
    limit = SHARE * BYTES[memory]
    assert sizes["total"] < limit, f"{sizes['total'] / 2**30:.1f} GiB of {limit / 2**30:.1f}"


def test_forms_differ_in_micro_batches_alone():
    for name in FAMILIES:
        forms = [config_of(name, memory) for memory in MEMORIES]
        for config in forms:
            assert config.train.batch_size % config.train.accum == 0
            config.unlock()
            config.train.accum, config.model.remat = 1, "none"
        assert forms[0] == forms[1], name


def compiled_step(name: str, argument: str):
    """(the step compiled for an H100 that is not here, its model, config); in a process of its own,
    as the plugin must not look for a GPU."""
    import jax

    from lmscale_jax.model import flops, mesh
    from lmscale_jax.train import gpu_report

    jax.config.update("jax_platforms", "cpu")
    config = config_of(name, argument)
    devices = gpu_descriptions.described_gpus(flops.CHIPS["H100"], 1, "H100:1")
    grid = mesh.make_mesh(config, devices)
    model = build_model(config, platform="gpu", mesh=grid, bos_id=0)
    program = aot.lower_step(config, model, grid).compile(gpu_report.COMPILER_OPTIONS)
    return program, model, config


def compiled_bytes(name: str, argument: str) -> int:
    return aot.compiled_memory(compiled_step(name, argument)[0])["peak"]


# Those that come closest to the limit; LMSCALE_COMPILE_ALL=1 takes all, which takes an hour.
COMPILED = list(CASES) if os.environ.get("LMSCALE_COMPILE_ALL") else ["llama_300m:16gb"]


@pytest.mark.slow
@pytest.mark.skipif(
    not gpu_descriptions.gpu_compiler_installed(), reason="needs jax[cuda13], not a GPU"
)
@pytest.mark.parametrize("case", COMPILED)
def test_a_micro_batch_fits_as_compiled(case):
    """As JAX compiles it for an H100."""
    name, argument, memory = CASES[case]
    code = f"import test_config_memory as t; print(t.compiled_bytes({name!r}, {argument!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    assert peak < SHARE * BYTES[memory], f"{peak / 2**30:.1f} GiB"
