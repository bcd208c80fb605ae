"""A laboratory for language-model scaling experiments in JAX.

Its functions for programs and notebooks are those of `lmscale_jax.from_python`:

    import lmscale_jax as lm

    lm.train(lm.load_config("configs/quickstart.py"), workdir="runs/first")
"""

import importlib
import sys
import types

__version__ = "0.1.0"

# Name of the package -> module that has it, imported at the first use: JAX takes seconds.
EXPORTS = dict.fromkeys(
    ("load_config", "train", "ladder", "load", "evaluate", "report", "results", "metrics",
     "coord_check", "explain"),
    "from_python",
) | {"InputError": "errors", "RunFailed": "errors"}  # fmt: skip


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])


class _CallableModule(types.ModuleType):
    """A module that is also called, as the function of its name in EXPORTS."""

    def __call__(self, *args, **kwargs):
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(types.ModuleType):
    """Keeps `lm.train` a function where the import system sets it to the module of that name."""

    def __setattr__(self, name, value):
        if name in EXPORTS and isinstance(value, types.ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
