"""Every named config fits the accelerator that it is for, by our account and by the compiler's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.config_memory import CASES, FAMILIES, account_gib, config_of, limit_gib
from lmscale_jax.config.recipes import MEMORIES
from lmscale_jax.model.build import build_model
from lmscale_jax.train import gpu_descriptions

ROOT = Path(__file__).parents[1]
# Models for a CPU, and modules of keys.
OTHERS = {"quickstart", "muon_small", "mur_small", "nanogpt_char", "coord_check", "lr_transfer",
          "__init__", "base", "laddering"}  # fmt: skip


def test_every_config_is_here():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert names == {case[0] for case in CASES.values()} | OTHERS


@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_fits_by_account(case):
    config = config_of(case)
    model = build_model(config, platform="gpu", bos_id=0)
    assert 1 < account_gib(config, model) < limit_gib(case)


def test_forms_differ_in_micro_batches_alone():
    for name in FAMILIES:
        forms = [config_of(f"{name}:{memory}") for memory in MEMORIES]
        assert forms[0].train.accum < forms[1].train.accum
        for config in forms:
            assert config.train.batch_size % config.train.accum == 0
            config.unlock()
            config.train.accum, config.model.remat, config.model.stack = 1, "none", "auto"
        assert forms[0] == forms[1], name


# LMSCALE_COMPILE_ALL=1 takes all, half an hour.
COMPILED = CASES if os.environ.get("LMSCALE_COMPILE_ALL") else ["llama_300m:16gb"]


@pytest.mark.slow
@pytest.mark.skipif(
    not gpu_descriptions.gpu_compiler_installed(), reason="needs jax[cuda13], not a GPU"
)
@pytest.mark.parametrize("case", COMPILED)
def test_a_micro_batch_fits_as_compiled(case, tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.config_memory",
        f"--cases={case}".replace(",", ","),
    ]
    done = subprocess.run(
        [*command, f"--results={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "config_memory.json").read_text())["rows"]
    assert row["peak"] < limit_gib(case)


def test_the_committed_table_is_of_these_configs():
    """A config whose micro-batch changes is compiled anew: python -m benchmarks.config_memory."""
    rows = json.loads((ROOT / "benchmarks/results/config_memory.json").read_text())["rows"]
    for row in rows:
        config = config_of(row["case"])
        sizes = (config.train.batch_size // row["accum"], config.train.accum, config.model.remat)
        assert sizes == (row["rows"], row["accum"], row["remat"]), row["case"]
        assert row["peak"] < limit_gib(row["case"]), row["case"]
    assert {case for case in CASES if not case.startswith("mur ")} <= {row["case"] for row in rows}
