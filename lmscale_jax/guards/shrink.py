"""Shrinks the config of a run to a model of seconds, with every choice of the run.

Proportions stay: hidden width to width, windows to the length of a row, durations to the run.
"""

import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.blocks import block_numbers
from lmscale_jax.config.keys import get, is_used, keys
from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.data.batches import Batch
from lmscale_jax.errors import InputError
from lmscale_jax.model.kernels import choose_kernel
from lmscale_jax.model.sharding import AXES, ShardingContext

WIDTH, HEAD_DIM, LENGTH, ROWS, STEPS, VOCAB = 64, 16, 16, 4, 20, 64
BLOCKS, MORE_BLOCKS = 2, 4
# The token that begins a document, and where it is in every row.
MARK, MARKED = 0, (0, 5, 11)
# Keys that treat blocks by their number, with the value at which they do not. They need more of
# them to differ.
_BY_BLOCK = {
    "model.window_layers": "none", "model.skips": "none", "model.value_embeddings": 0,
    "mur.mode": "off", "freeze.mode": "none", "optim.block_lr_decay": 1.0,
}  # fmt: skip
# What rounds, or draws at random in a step: programs that should agree are compared without.
EXACT = {
    "model.dtype": "float32", "model.residual_dtype": "float32", "model.matmul": "dtype",
    "optim.muon_dtype": "auto", "model.dropout": 0.0,
}  # fmt: skip


def blocks_needed(configs: list) -> int:
    """Returns the number of blocks at which all choices of these configs differ."""
    by_block = any(get(c, path) != plain for c in configs for path, plain in _BY_BLOCK.items())
    return MORE_BLOCKS if by_block else BLOCKS


def shrink(config: ConfigDict, n_layers: int, vocab_size: int) -> ConfigDict:
    """Copies an unresolved config at the small size. `vocab_size` is the tokenizer's."""
    full = resolve(config, vocab_size)
    changes = _model_changes(full, n_layers) | _durations(config, full)
    changes |= _block_changes(full, n_layers)
    changes |= {
        "data.seq_len": LENGTH, "train.batch_size": ROWS, "train.accum": 1, "train.steps": STEPS,
        "train.tokens": 0.0, "train.parent": "", "train.parent_step": 0,
        "log.spectral_every": 0, "log.activations_every": 0,
        "eval.redundancy_every": "0", "eval.redundancy_early": "0",
    }  # fmt: skip
    changes |= ONE_DEVICE | {"mesh.cpu_devices": 0}
    if not _runs_here(full):
        changes["model.attention"] = "auto"
    return apply_overrides(config, changes)


ONE_DEVICE = {f"mesh.{axis}": 1 for axis in AXES}


def _runs_here(full) -> bool:
    """Returns whether a CPU has the attention kernel of a resolved config."""
    try:
        choose_kernel(full, "cpu", ShardingContext())
    except InputError:
        return False
    return True


def exact(config: ConfigDict) -> ConfigDict:
    """Copies a config without rounding to fewer bits and without dropout."""
    default = {path: key.default for path, key in keys()}
    return apply_overrides(
        config, {p: v if is_used(config, p) else default[p] for p, v in EXACT.items()}
    )


def _model_changes(full, n_layers: int) -> dict:
    model, base = full.model, full.parametrization
    heads = WIDTH // HEAD_DIM
    grouped = model.n_kv_heads != model.n_heads
    changes = {
        "model.n_layers": n_layers, "model.d_model": WIDTH, "model.n_heads": heads,
        "model.n_kv_heads": heads // 2 if grouped else 0, "model.head_dim": 0,
        "model.d_ff": max(8, 8 * round(WIDTH * model.d_ff / model.d_model / 8)),
        "model.vocab_size": VOCAB, "model.vocab_multiple": 1,
        "model.ids": VOCAB - 4 if model.ids < model.vocab_size else 0,
        "model.max_seq_len": 0, "model.loss_chunk": 0, "model.stack": "unroll",
        "model.remat": "none",
        "model.value_embeddings": min(model.value_embeddings, n_layers // 2),
    }  # fmt: skip
    if is_used(full, "model.window"):
        share = LENGTH / full.data.seq_len
        changes["model.window"] = max(2, round(model.window * share))
        changes["model.window_block"] = max(1, round(model.window_block * share))
    if is_used(full, "parametrization.base_width"):
        changes |= {"parametrization.base_width": WIDTH // 2, "parametrization.base_d_ff": 0}
        changes["parametrization.base_head_dim"] = (
            0 if base.base_head_dim == model.head_dim else HEAD_DIM // 2
        )
    if is_used(full, "parametrization.base_depth"):
        changes["parametrization.base_depth"] = 1
    return changes


def _block_changes(full, n_layers: int) -> dict:
    """Scales the numbers of blocks."""
    freeze, mur, n = full.freeze, full.mur, full.model.n_layers
    changes = {}
    if is_used(full, "freeze.blocks"):
        blocks = {number * n_layers // n for number in block_numbers(freeze.blocks)}
        changes["freeze.blocks"] = ",".join(map(str, sorted(blocks)))
    if is_used(full, "freeze.count"):
        drawable = n_layers
        if is_used(full, "freeze.near_input"):
            drawable = max(1, round(n_layers * freeze.near_input))
        changes["freeze.count"] = min(drawable, max(1, round(freeze.count * n_layers / n)))
    for name in ("first_block", "last_block"):
        if mur[name] >= 0:
            changes[f"mur.{name}"] = min(n_layers - 1, mur[name] * n_layers // n)
    return changes


def _durations(config, full) -> dict:
    """Turns every duration into its share of the run; what lasts at all lasts a step."""
    changes = {}
    for path, key in keys():
        if key.duration and get(config, path) != key.default and is_used(config, path):
            share = min(1.0, get(full, path) / full.train.steps)
            changes[path] = f"{100 * share:.4f}%" if share else "0"
    return changes


def shrunk_batch(config, number: int) -> Batch:
    """Makes batch `number` of a shrunk config: random tokens, with marks of documents."""
    rng = np.random.default_rng(number)
    ids = config.model.ids or VOCAB
    tokens = rng.integers(MARK + 1, ids, (ROWS, LENGTH + 1)).astype(np.int32)
    tokens[:, list(MARKED)] = MARK
    return Batch(tokens[:, :-1], tokens[:, 1:])
