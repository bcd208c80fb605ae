# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # lmscale_jax: from one small run to a verdict
#
# Run the cells from top to bottom, on a free Colab machine or on a laptop. A GPU or TPU is used
# where there is one and is not needed. You will train a small language model, check that a larger
# one can be trained with the same settings, ask which of two kinds of model is better, and see
# which parts of the small model do the work.
#
# Every step is a command of the package in a process of its own, printed above its output, so you
# can type the same in a terminal. The notebook itself never starts JAX, which leaves an accelerator
# free for the commands. The stop button stops the command too, and a cell of training or a ladder
# that is run again goes on from where it was.
#
# The times below are processor time, measured on two cores (AMD Zen 4, jax 0.10.2) while other
# work ran on them, some 15 minutes in all. Two cores of your own share most of it between them;
# that was not timed.

# %% [markdown]
# ## Install
#
# This cell installs the package where it is missing, with those of its requirements that are
# missing. It leaves a JAX that is installed as it is, because on Colab that is the one that fits
# the machine; where its version is not one that the package asks for, one line says so.

# %%
import email
import html
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from IPython.display import HTML, Image, display
from packaging.requirements import Requirement

REPOSITORY = "https://github.com/lmscale/lmscale_jax"


def version(name):
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements():
    """What lmscale_jax needs on this Python, without its extras."""
    required = map(Requirement, metadata.requires("lmscale_jax") or [])
    return [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def install():
    source = f"git+{REPOSITORY}"
    if version("jax") is None:
        pip(source)
        return
    pip("--no-deps", source)
    missing = [str(r) for r in requirements() if r.name != "jax" and version(r.name) is None]
    if missing:
        # What is missing may itself ask for another JAX, and pip would replace the one there.
        held = [f"{name}=={version(name)}" for name in ("jax", "jaxlib") if version(name)]
        constraints = Path(tempfile.mkdtemp()) / "held.txt"
        constraints.write_text("\n".join(held))
        pip("--constraint", str(constraints), *missing)


# A folder of this name without an __init__.py, such as a clone, also has a spec, but no origin.
spec = importlib.util.find_spec("lmscale_jax")
if spec is None or spec.origin is None:
    install()
    importlib.invalidate_caches()
if version("lmscale_jax") is None:
    print(f"lmscale_jax comes from {spec.origin}, not installed: no versions were compared")
else:
    for r in requirements():
        have = version(r.name)
        if have is None or not r.specifier.contains(have, prereleases=True):
            print(f"lmscale_jax asks for {r}; {have or 'none'} is installed and was left as it is")

# %% [markdown]
# ## Helpers and the settings
#
# `lmscale` runs one command, prints its lines as they come, and raises an error where the command
# ends with another status than expected; `show` and `show_page` put figures and pages here.

# %%
# Lines as they come, and ± in them whatever the machine's locale is.
PYTHON = [sys.executable, "-u", "-X", "utf8"]


def lmscale(command, *arguments, expected=0):
    """Runs python -m lmscale_jax.COMMAND; raises RuntimeError if its status is not `expected`."""
    print(f"python -m lmscale_jax.{command} {shlex.join(arguments)}\n")
    with subprocess.Popen(
        [*PYTHON, "-m", f"lmscale_jax.{command}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="")
        except KeyboardInterrupt:
            # Jupyter interrupts the command too, which saves, says so and leaves.
            print(process.stdout.read(), end="")
            raise
    if process.returncode != expected:
        raise RuntimeError(f"{command} ended with status {process.returncode}, not {expected}")


def show(*paths):
    for path in paths:
        display(Image(filename=str(path)))


def show_page(path):
    """A page in a frame of its own, so that its styles do not reach the notebook's."""
    page = html.escape(path.read_text(encoding="utf-8"))
    display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="800"></iframe></div>'))


# %% [markdown]
# `CHANGES` says in what the commands below differ from the configs that come with the package, so
# that all of it takes minutes. Tests set `LMSCALE_NOTEBOOK=small` to run the same cells in less
# time still, with numbers that mean nothing.

# %%
SMALL = os.environ.get("LMSCALE_NOTEBOOK") == "small"
RUNS = Path("runs_small" if SMALL else "runs")
CONFIGS = Path(importlib.util.find_spec("lmscale_jax.configs").origin).parent

CHANGES = {
    "train": [
        "--config.train.steps=500",
        "--config.train.batch_size=16",
        # About 1 / sqrt(width); with GPT-2's 0.02 the first steps are spent on growing matrices.
        "--config.parametrization.init_std=0.08",
        "--config.eval.tokens=100_000",
    ],
    "coordinates": ["--widths=64,128,256,512,1024"],
    "control": ["--widths=64,128,256,512"],
    "ladder": [
        "--config.rungs.sizes=(25e3,50e3,100e3)",
        "--config.rungs.held_out=200e3",
        "--config.tokens.amounts=(4.0,)",
    ],
    "evaluate": ["--tokens=20000"],
}
if SMALL:
    text = {
        "data.source": "text",
        "data.path": f"{Path(email.__file__).parent}/*.py",
        "data.val_fraction": 0.2,
    }
    tiny = {
        "model.n_layers": 2,
        "model.d_model": 32,
        "train.steps": 20,
        "train.batch_size": 8,
        "eval.tokens": 5000,
        "eval.sample": 20,
    }
    data = [f"--config.{key}={value}" for key, value in text.items()]
    check = [*data, "--widths=64,256,1024", "--steps=2", "--config.model.n_layers=1"]
    CHANGES = {
        "train": [f"--config.{key}={value}" for key, value in (text | tiny).items()],
        "coordinates": check,
        "control": check,
        "ladder": [
            *(f"--config.run.{key}={value}" for key, value in text.items()),
            "--config.run.eval.tokens=5000",
            "--config.rungs.sizes=(6e3,12e3,24e3)",
            "--config.rungs.held_out=48e3",
            "--config.tokens.amounts=(1.0,)",
            "--config.seeds=1",
        ],
        "evaluate": ["--tokens=2000"],
    }

# %% [markdown]
# ## 1. Train a small model
#
# The text is the source code of Python's standard library, which is on every machine. The model
# reads pieces of it and learns to say which piece comes next; the loss says how badly it does, in
# nats for each piece. Beside it stand two models that only count: how often each piece occurs
# (unigram), and how often it follows the one before (bigram).
#
# 3 minutes of processor time. The loss came to 3.58, beside 3.99 of the bigram model.

# %%
lmscale(
    "main",
    f"--config={CONFIGS}/quickstart.py",
    f"--workdir={RUNS}/quickstart",
    *CHANGES["train"],
)

# %%
show(RUNS / "quickstart/plots/loss.png")

# %% [markdown]
# ## 2. Check that settings found on a small model serve a larger one
#
# Under the parametrization μP every number inside the model keeps its size as the model grows
# wider, and so the best learning rate keeps its value. The coordinate check trains several widths
# for ten steps and draws the sizes of those numbers over the width: flat lines pass, and a line
# that rises or falls is out of bounds.
#
# 1.6 minutes of processor time, most of it for compiling five models.

# %%
lmscale(
    "coord_check",
    f"--config={CONFIGS}/coord_check.py",
    f"--workdir={RUNS}/coordinates",
    *CHANGES["coordinates"],
)
show(RUNS / "coordinates/coord_check.png")

# %% [markdown]
# A check that cannot fail says nothing. The control trains the same widths under the standard
# parametrization, where the numbers grow with the width: it must be out of bounds, end with an
# error and status 1, and the cell stops if it does not.
#
# 1.4 minutes of processor time.

# %%
lmscale(
    "coord_check",
    f"--config={CONFIGS}/coord_check.py",
    f"--workdir={RUNS}/coordinates_control",
    "--control=sp",
    *CHANGES["control"],
    expected=1,
)
show(RUNS / "coordinates_control/coord_check.png")

# %% [markdown]
# ## 3. Ask a question of several sizes
#
# Is SwiGLU better than GeLU at the same number of parameters, and does it stay so as models grow? A
# ladder trains both kinds at three sizes, writes down what it expects of a fourth, then trains the
# fourth and compares. The first lines are the plan with its cost.
#
# 9 minutes of processor time, for 16 runs, two at a time on two cores.

# %%
ladder = [
    f"--config={CONFIGS}/ladders/quickstart.py",
    f"--workdir={RUNS}/ladder",
    *CHANGES["ladder"],
]
lmscale("ladder", *ladder, "--dry_run")
lmscale("ladder", *ladder)

# %% [markdown]
# The answer stands at the top of the page. It was "no detectable difference", and both forecasts
# held. Where runs are too few to say, the page says so, and what to run to find out.

# %%
show_page(RUNS / "ladder/report/index.html")

# %% [markdown]
# ## 4. See which blocks do the work
#
# The model of the first section is a stack of blocks. Block Influence is how much a block turns
# what passes through it; layer drop is how much the loss rises when the block is left out; marginal
# utility is how much a small step in the block's own direction would lower the loss. A utility near
# zero says that the block is trained, not that it is useless.
#
# 25 seconds of processor time.

# %%
workdir = f"--workdir={RUNS}/quickstart"
lmscale("evaluate", workdir, "--suites=redundancy,mur", *CHANGES["evaluate"])
lmscale("report", workdir)

# %%
report = RUNS / "quickstart/report"
show(report / "bi_curve.png", report / "layer_drop.png", report / "mur_mean.png")

# %% [markdown]
# ## 5. Where to go next
#
# - Train on [your own text](https://github.com/lmscale/lmscale_jax/blob/main/docs/data.md), or
#   another [architecture](https://github.com/lmscale/lmscale_jax/blob/main/docs/variants.md): any
#   key of `configs/base.py` can be set as in `--config.optim.lr=3e-3`.
# - [Ladders](https://github.com/lmscale/lmscale_jax/blob/main/docs/ladders.md): how to ask a
#   question of your own.
# - [Parametrizations](https://github.com/lmscale/lmscale_jax/blob/main/docs/mup.md) and
#   [marginal utility](https://github.com/lmscale/lmscale_jax/blob/main/docs/mur.md): what was
#   measured in sections 2 and 4.
# - [Scaling laws](https://github.com/lmscale/lmscale_jax/blob/main/docs/fits.md) of tables of runs.
#
# Before a long run, `--explain` says what it would do and how long it would take here, and leaves.
# Here for a model of 50 million parameters, which takes seconds.

# %%
lmscale("main", f"--config={CONFIGS}/llama_50m.py:embedded,16gb", "--explain")
