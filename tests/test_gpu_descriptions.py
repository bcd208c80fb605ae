"""GPUs that are not here: their descriptions, and --explain compiled for them."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, flags, run

from lmscale_jax.model import flops
from lmscale_jax.train import gpu_descriptions

GPUS = [chip for chip in flops.CHIPS.values() if chip.platform == "gpu"]


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_descriptions_agree_with_the_data_sheets(chip):
    target = gpu_descriptions.gpu_target(chip)
    assert f'device_description_str: "{chip.kind}"' in target
    bandwidth = gpu_descriptions.target_number(target, "memory_bandwidth")
    assert bandwidth == pytest.approx(chip.bandwidth, rel=0.01)
    memory = gpu_descriptions.target_number(target, "device_memory_size")
    assert memory == pytest.approx(chip.memory, rel=0.08)


# float32 outside the tensor cores, of the data sheets of the SXM forms, TFLOP/s.
@pytest.mark.parametrize(("name", "scalar"), [("A100", 19.5), ("H100", 67), ("H200", 67)])
def test_lanes_and_clocks_make_the_float32_rate(name, scalar):
    target = gpu_descriptions.gpu_target(flops.CHIPS[name])
    cores, lanes, clock = (
        gpu_descriptions.target_number(target, number)
        for number in ("core_count", "fpus_per_core", "clock_rate_ghz")
    )
    assert 2 * cores * lanes * clock / 1e3 == pytest.approx(scalar, rel=0.01)


needs_plugin = pytest.mark.skipif(
    not gpu_descriptions.gpu_compiler_installed(),
    reason="needs jax[cuda13], which compiles for GPUs without one",
)


# The plugin must not look for a GPU, so JAX has to be told before it starts.
COMPILE_PRODUCTS = """
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from lmscale_jax.model import flops
from lmscale_jax.train import gpu_descriptions, gpu_report, hlo_text
for chip in flops.CHIPS.values():
    if chip.platform == "gpu":
        device = gpu_descriptions.described_gpus(chip, 16, chip.name)[9]
        # A node of eight is a host.
        assert (device.platform, device.device_kind, device.process_index) == ("gpu", chip.kind, 1)
        on_device = jax.sharding.SingleDeviceSharding(device)
        x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=on_device)
        lowered = jax.jit(lambda x: x @ x).lower(x)
        compiled = lowered.compile(compiler_options=gpu_report.COMPILER_OPTIONS)
        (kernel,) = gpu_report.estimate_step(hlo_text.parse_program(compiled.as_text()), chip)
        assert kernel.flops == {"bf16": 2 * 1024**3}
        assert 2 * 1024**3 / chip.peak < kernel.seconds < 1e-4
        print(chip.name)
"""


@needs_plugin
@pytest.mark.slow
def test_every_description_is_compiled_for():
    command = [sys.executable, "-c", COMPILE_PRODUCTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == ([chip.name for chip in GPUS], 0), done.stderr


@needs_plugin
@pytest.mark.slow
def test_a_step_is_compiled_for_a_gpu_that_is_not_here(settings):
    changes = {"model.dtype": "bfloat16", "data.seq_len": 128, "model.d_model": 128}
    arguments = flags(settings | changes)
    status, out, err = run(
        "main", "--config=configs/base.py", "--explain", "--topology=H100:1", *arguments
    )
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert float(lines["peak"][1].replace(",", "")) > 1
    # Two blocks.
    assert "  attention forward   cuDNN   2" in out
    assert "  attention backward  cuDNN   2" in out
    assert re.search(r"product bf16 +Triton +\d+", out)
    assert re.search(r"\n  dense +\d+\.\d\d ms", out)
    assert float(lines["step"][1]) > 0 and lines["step"][2] == "ms"
    assert 0 < float(lines["MFU"][1].rstrip("%")) < 100
    assert "shares assumed" not in out
