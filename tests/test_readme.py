"""Every command of the README, run as it stands but for sizes, in its order and in one place."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, flags

README = (ROOT / "README.md").read_text()
TABLE = README[README.index("## Questions and commands") : README.index("## More")]
COMMANDS = [shlex.split(text) for text in re.findall(r"`((?:python -m|launch/)[^`]+)`", TABLE)]

RUN = {
    "model.n_layers": 2, "model.d_model": 32, "model.n_heads": 2, "data.seq_len": 32,
    "train.batch_size": 4, "train.steps": 6, "eval.tokens": 500, "eval.every": 0,
    "checkpoint.every": 0, "log.tensorboard": False, "eval.sample": 4,
}  # fmt: skip
CELLS = ["--config.rungs.sizes=(6e3,12e3,24e3)", "--config.rungs.held_out=48e3", "--config.seeds=1",
         "--config.tokens.amounts=(1.0,)", "--config.run.eval.tokens=2000",
         "--config.guards.mode=never"]  # fmt: skip
# What makes a command small, by how it begins; the others run as they stand.
SMALLER = {
    "lmscale_jax.main --config=configs/quickstart.py": flags(RUN),
    "lmscale_jax.main --config=configs/llama_50m.py:embedded,16gb --workdir": flags(
        RUN | {"data.vocab_size": 4096, "train.accum": 1}
    ),
    "lmscale_jax.ladder": CELLS,
    "lmscale_jax.check": [f"--config.guards.{name}=skip" for name in
                          ("gradients", "stack", "accumulation", "devices", "counts", "repeat",
                           "difference", "cost")],
    "lmscale_jax.coord_check": ["--widths=64,256,1024", "--steps=2", "--seeds=1",
                                "--config.model.n_layers=1"],
    "lmscale_jax.lr_transfer": [
        "--widths=16,32", "--log2_lrs=-8,-6,-4", "--seeds=2", "--config.train.steps=10",
        "--config.parametrization.base_width=16", "--config.model.n_layers=1",
    ],
    "launch/local_multiprocess.sh": flags(RUN),
    "benchmarks": ["--only=fits", "--others=99", "--results=runs/benchmarks"],
}  # fmt: skip


def test_the_readme_has_its_commands():
    assert len(COMMANDS) >= 15
    for module in ("main", "check", "evaluate", "ladder", "coord_check", "fit", "report", "prepare",
                   "generate", "convert", "lr_transfer"):  # fmt: skip
        assert any(f"lmscale_jax.{module}" in command for command in COMMANDS), module
    for begins in SMALLER:
        assert any(" ".join(c).removeprefix("python -m ").startswith(begins) for c in COMMANDS)


@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path):
    """From a directory that holds what a checkout does."""
    for name in ("lmscale_jax", "configs", "launch", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    for command in COMMANDS:
        text = " ".join(command).removeprefix("python -m ")
        more = next((m for begins, m in SMALLER.items() if text.startswith(begins)), [])
        if command[0] == "python":
            command = [sys.executable, *command[1:]]
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-2000:])
        assert "Traceback" not in done.stderr, (text, done.stderr[-2000:])
    for path in ("quickstart/run.json", "quickstart/eval.json", "quickstart/report/index.html",
                 "ladder/report/index.html", "coords/coord_check.json", "fit.json",
                 "transfer/lr_transfer.json", "shards/manifest.json", "two/run.json"):  # fmt: skip
        assert (tmp_path / "runs" / path).exists(), path
