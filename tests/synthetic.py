"""Simulates tables from known laws, and locates published reference data."""

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# Hoffmann et al. (2022) as refitted by Besiroglu et al. (2024).
CHINCHILLA = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def surface(n, d, E, A, B, alpha, beta):
    return E + A * np.asarray(n, float) ** -alpha + B * np.asarray(d, float) ** -beta


def grid(sizes, tokens, noise=0.0, seed=0, **params) -> dict:
    """Simulates a table over all pairs of sizes and tokens, with noise in ln loss."""
    n, d = (x.ravel() for x in np.meshgrid(sizes, tokens, indexing="ij"))
    error = noise * np.random.default_rng(seed).standard_normal(len(n))
    return {"n": n, "d": d, "loss": surface(n, d, **(CHINCHILLA | params)) * np.exp(error)}


def two_arms(
    s, tau=0.0, sizes=6, seeds=1, span=300.0, noise=0.004, seed=0, E=1.7, b=0.15, c0=1e17
) -> dict:
    """Simulates two arms: L_A = E + a (C/c0)^-b, L_B(C) = L_A(k C), ln k = tau + s ln(C/C0)."""
    rng = np.random.default_rng(seed)
    columns: dict = {k: [] for k in ("n", "d", "c", "loss", "variant", "seed", "run_id")}
    c = np.geomspace(c0, c0 * span, sizes)
    middle = np.sqrt(c[0] * c[-1])
    for variant, shifted in (("A", 0.0), ("B", 1.0)):
        k = np.exp(shifted * (tau + s * np.log(c / middle)))
        loss = E + 2.0 * (c * k / c0) ** -b
        for run_seed in range(seeds):
            for ci, value in zip(c, loss, strict=True):
                n = np.sqrt(ci / 120)
                row = {"n": n, "d": 20 * n, "c": ci, "variant": variant, "seed": run_seed,
                       "loss": value * np.exp(noise * rng.standard_normal()),
                       "run_id": f"{variant}-{ci:.3g}-{run_seed}"}  # fmt: skip
                for name, x in row.items():
                    columns[name].append(x)
    return columns


def reference(*parts) -> Path:
    """Returns a file of the reference data, or skips the test if it is missing.

    LMSCALE_FITS_DATA is the directory; the default is ../shared/data/fits next to the repository.
    """
    folder = Path(os.environ.get("LMSCALE_FITS_DATA", ROOT.parent / "shared/data/fits"))
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is missing; set LMSCALE_FITS_DATA=DIR")
    return path
