"""How deep our own code is from the command to the first matrix product of a training step."""

import json
import os
import subprocess
import sys

from conftest import ROOT, flags

MOST = 16

# Runs the command up to the first product and prints (file, function) of our frames there.
PROGRAM = """
import json, os, runpy, sys, traceback
import jax

def first(*operands, **settings):
    stack = [(f.filename, f.name) for f in traceback.extract_stack()[:-1]]
    ours = [(f.partition("lmscale_jax/")[2], name) for f, name in stack if f.startswith(ROOT)]
    print(json.dumps(ours), flush=True)
    os._exit(0)

ROOT = os.path.join(os.getcwd(), "lmscale_jax") + os.sep
jax.lax.dot_general = first
runpy.run_module("lmscale_jax.main", run_name="__main__", alter_sys=True)
"""


def test_few_frames_from_the_command_to_the_first_product(settings, tmp_path):
    # The command does not start anew if the allocator is set up already.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    arguments = [
        "--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *flags(settings)
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    frames = json.loads(done.stdout.splitlines()[-1])
    print(*(f"{number} {file} {name}" for number, (file, name) in enumerate(frames, 1)), sep="\n")
    names = [name for _, name in frames]
    # It is the first product of attention, and nothing of the stack is left out.
    assert frames[0][0] == "main.py" and {"main", "train", "train_step", "attend"} <= set(names)
    assert frames[-1][0] == "model/primitives.py"
    assert len(frames) <= MOST
