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
# Every step is a function of the package, which the command line has too: `lm.train` is
# `lmscale train`. JAX runs in the notebook; on a CPU the runs of a ladder are processes beside it.
# The stop button saves a run or a ladder, and its cell, run again, goes on from where it was.
#
# The times below are processor time of the same commands, measured on two cores (AMD Zen 4, jax
# 0.10.2) while other work ran on them, some 15 minutes in all. Two cores of your own share most of
# it between them; that was not timed. Commands restart themselves with huge pages, which a notebook
# cannot: steps on a CPU may take a quarter longer here.

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
# `show` and `show_page` put figures and pages here.

# %%
import lmscale_jax as lm


def show(*paths):
    for path in paths:
        display(Image(filename=str(path)))


def show_page(path):
    """A page in a frame of its own, so that its styles do not reach the notebook's."""
    page = html.escape(path.read_text(encoding="utf-8"))
    display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="800"></iframe></div>'))


# %% [markdown]
# `CHANGES` says in what the configs below differ from those that come with the package, so that all
# of it takes minutes. Tests set `LMSCALE_NOTEBOOK=small` to run the same cells in less time still,
# with numbers that mean nothing.

# %%
SMALL = os.environ.get("LMSCALE_NOTEBOOK") == "small"
RUNS = Path("runs_small" if SMALL else "runs")

CHANGES = {
    "train": {
        "train.steps": 500,
        "train.batch_size": 16,
        # About 1 / sqrt(width); with GPT-2's 0.02 the first steps are spent on growing matrices.
        "parametrization.init_std": 0.08,
        "eval.tokens": 100_000,
    },
    "coordinates": {},
    "ladder": {
        "rungs.sizes": (25e3, 50e3, 100e3),
        "rungs.held_out": 200e3,
        "tokens.amounts": (4.0,),
    },
}
WIDTHS, CONTROL_WIDTHS, TOKENS = (64, 128, 256, 512, 1024), (64, 128, 256, 512), 20_000
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
    CHANGES = {
        "train": text | tiny,
        "coordinates": text | {"train.steps": 2, "model.n_layers": 1},
        "ladder": {
            **{f"run.{key}": value for key, value in text.items()},
            "run.eval.tokens": 5000,
            "rungs.sizes": (6e3, 12e3),
            "rungs.held_out": 24e3,
            "tokens.amounts": (1.0,),
            "seeds": 1,
            "executor.name": "here",
            "guards.mode": "never",
        },
    }
    WIDTHS, CONTROL_WIDTHS, TOKENS = (64, 128, 256), (64, 128, 256), 2000

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
config = lm.load_config("configs/quickstart.py", CHANGES["train"])
record = lm.train(config, RUNS / "quickstart")

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
config = lm.load_config("configs/coord_check.py", CHANGES["coordinates"])
check = lm.coord_check(config, RUNS / "coordinates", WIDTHS)
assert check["verdict"] != "failed"
show(RUNS / "coordinates/coord_check.png")

# %% [markdown]
# A check that cannot fail says nothing. The control trains the same widths under the standard
# parametrization, where the numbers grow with the width: it must be out of bounds, and the cell
# stops if it is not.
#
# 1.4 minutes of processor time.

# %%
config = lm.load_config("configs/coord_check.py", CHANGES["coordinates"])
check = lm.coord_check(config, RUNS / "coordinates_control", CONTROL_WIDTHS, control="sp")
assert check["verdict"] == "failed"
show(RUNS / "coordinates_control/coord_check.png")

# %% [markdown]
# ## 3. Ask a question of several sizes
#
# Is SwiGLU better than GeLU at the same number of parameters, and does it stay so as models grow? A
# ladder trains both kinds at three sizes, writes down what it expects of a fourth, then trains the
# fourth and compares.
#
# 9 minutes of processor time, for 16 runs, two at a time on two cores.

# %%
config = lm.load_config("configs/ladders/quickstart.py", CHANGES["ladder"])
verdict = lm.ladder(config, RUNS / "ladder")

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
scores = lm.evaluate(RUNS / "quickstart", tokens=TOKENS)
report = lm.report(RUNS / "quickstart").parent
show(report / "bi_curve.png", report / "layer_drop.png", report / "mur_mean.png")

# %% [markdown]
# The scores are a dict, the runs of a ladder rows, and the curve of a run columns, for figures of
# your own. The model is there too.

# %%
run = lm.load(RUNS / "quickstart")
print(run.generate("def main(", tokens=40))
ids = run.tokenizer.encode_batch(["import os"])
print("logits", run.apply(ids).shape)
for row in lm.results(RUNS / "ladder")[:3]:
    print(row["variant"], row["n_non_embedding"], row["val_loss"])
print("layer drop, nats", [round(x, 3) for x in scores["layer_drop"]])

# %% [markdown]
# ## 5. Where to go next
#
# - Train on [your own text](https://github.com/lmscale/lmscale_jax/blob/main/docs/data.md), or
#   another [architecture](https://github.com/lmscale/lmscale_jax/blob/main/docs/variants.md): any
#   key can be set as in `lm.load_config(file, {"optim.lr": 3e-3})`; `!lmscale help optim.lr` says
#   what it is.
# - [Ladders](https://github.com/lmscale/lmscale_jax/blob/main/docs/ladders.md): how to ask a
#   question of your own.
# - [Parametrizations](https://github.com/lmscale/lmscale_jax/blob/main/docs/mup.md) and
#   [marginal utility](https://github.com/lmscale/lmscale_jax/blob/main/docs/mur.md): what was
#   measured in sections 2 and 4.
# - [Scaling laws](https://github.com/lmscale/lmscale_jax/blob/main/docs/fits.md) of tables of runs.
#
# Before a long run, `lm.explain` says what it would do and how long it would take here, and leaves.
# Here for a model of 50 million parameters, which takes seconds.

# %%
lm.explain(lm.load_config("configs/llama_50m.py:embedded,16gb"))
