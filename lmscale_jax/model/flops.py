"""Parameters, floating-point operations and bytes of a model, from its annotations alone."""

import math
import re

from lmscale_jax.model import wiring
from lmscale_jax.model.loss import chunk_length
from lmscale_jax.model.param import Spec, named
from lmscale_jax.model.placement import ROWS

# Backward over forward: one product for the inputs' gradient, one for the weights'.
FORWARD_AND_BACKWARD = 3


def counts(specs: dict) -> dict[str, int]:
    """Parameters: {"total", "non_embedding", "embedding"}.

    "embedding" is every table over the vocabulary or the positions, an untied readout included:
    Kaplan et al. 2020 (arXiv 2001.08361, table 1) leave both ends out of their N. So non_embedding
    depends neither on the tokenizer nor on the window nor on tying. Hoffmann et al. 2022 count the
    total.
    """
    sizes = {path: spec.size for path, spec in named(specs).items()}
    embedding = sum(sizes[path] for path, spec in named(specs).items() if _is_table(spec))
    total = sum(sizes.values())
    return {"total": total, "non_embedding": total - embedding, "embedding": embedding}


def _is_table(spec: Spec) -> bool:
    return not {"vocab", "position"}.isdisjoint(spec.axes)


def forward_flops(config, specs: dict) -> dict[str, float]:
    """FLOPs of one forward pass over one token, by part; a multiplication and addition are two.

    "dense": the products inside the blocks. "readout": the product with the vocabulary.
    "attention": q·k and the weighted sum of values, of the
    keys that the mask and the window leave. Lookups, norms and
    activations are not counted; they grow with the width only, not with its square.
    """
    model = config.model
    hidden = [spec for spec in named(specs["blocks"]).values() if spec.n_in]
    return {
        "dense": 2.0 * sum(spec.size for spec in hidden),
        "readout": 2.0 * model.d_model * model.vocab_size,
        # Two products of 2 H d for each key that is seen.
        "attention": model.n_layers
        * 4.0
        * wiring.mean_visible(config, config.data.seq_len)
        * model.n_heads
        * model.head_dim,
    }


def flops_per_token(config, specs: dict) -> dict[str, float]:
    """FLOPs of training on one token, forward and backward, by named convention.

    "6n": 6 times all parameters (Hoffmann et al. 2022). "6n_non_embedding": 6 times those outside
    the tables (Kaplan et al. 2020). "model": the matrix products that the model needs, readout and
    the causal half of attention included; this is run.json's flops_per_token, and what MFU divides
    by the chip's peak. Recomputation (model.remat, the chunks of the loss) is in none of them.
    """
    n = counts(specs)
    return {
        "6n": 6.0 * n["total"],
        "6n_non_embedding": 6.0 * n["non_embedding"],
        "model": FORWARD_AND_BACKWARD * sum(forward_flops(config, specs).values()),
    }


def memory(
    config,
    specs: dict,
    mesh_sizes: dict[str, int],
    parts: dict[str, int] | None = None,
    moments: dict[str, int] | None = None,
) -> dict[str, int]:
    """Bytes on one device at the worst moment of a step: an estimate, good to a factor of two.

    Args:
        config: a resolved config.
        specs: the model's annotations.
        mesh_sizes: devices along each axis of the mesh.
        parts: {path: over how many devices that parameter is split}; None: none is.
        moments: {path: arrays of its size that the optimizer keeps}; None: AdamW's two.

    Returns:
        {"parameters", "optimizer", "gradients", "activations", "logits", "total"}. The first three
        are float32; accumulation holds two gradients at a time.
    """
    parts, moments = parts or {}, moments or {}
    each = {path: 4 * spec.size / parts.get(path, 1) for path, spec in named(specs).items()}
    local = sum(each.values())
    shards = math.prod(mesh_sizes[name] for name in ROWS)
    rows = max(1, config.train.batch_size // config.train.accum // shards)
    tokens = rows * config.data.seq_len // mesh_sizes["sequence"]
    sizes = {
        "parameters": local,
        "optimizer": sum(size * moments.get(path, 2) for path, size in each.items()),
        "gradients": local * (2 if config.train.accum > 1 else 1),
        "activations": tokens * _activation_bytes(config.model, config.data.seq_len, mesh_sizes),
        "logits": _logit_bytes(config, rows, mesh_sizes["tensor"]),
    }
    sizes = {name: int(size) for name, size in sizes.items()}
    return sizes | {"total": sum(sizes.values())}


def _activation_bytes(model, seq_len: int, mesh_sizes: dict[str, int]) -> float:
    """What the backward pass keeps of one token, bytes.

    Per block: the residual stream twice (float32); two normed inputs; queries, keys, values and the
    attention's output; the probabilities, which every kernel but XLA's on an accelerator may keep;
    and the MLP's hidden values before and after the activation, of the gate too.
    """
    size = 2 if model.dtype == "bfloat16" else 4
    tensor = mesh_sizes["tensor"]
    stream = 2 * 4 * model.d_model
    heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim / tensor
    products = size * (heads + (2 if _gated(model) else 1) * model.d_ff / tensor)
    products += size * 2 * model.d_model
    pointwise = size * (2 * model.d_model + (2 if _gated(model) else 1) * model.d_ff / tensor)
    probabilities = size * model.n_heads * seq_len / tensor
    whole = stream + products + pointwise + probabilities
    kept = {"none": whole, "dots": products, "block": stream / 2}[model.remat]
    # With recomputation one block at a time is whole.
    return kept * model.n_layers + (0 if model.remat == "none" else whole)


def _gated(model) -> bool:
    return model.mlp in ("swiglu", "geglu")


def _logit_bytes(config, rows: int, tensor: int) -> float:
    """Logits of one chunk of the loss and their gradient, both float32."""
    vocab_size = config.model.vocab_size // tensor
    length = chunk_length(config.model, (rows, config.data.seq_len), vocab_size)
    return 2 * 4 * rows * length * vocab_size


# Dense (not sparse) bfloat16 FLOP/s of one device as JAX counts devices, from the vendors' data
# sheets; the first pattern found in `device_kind` wins. A TPU v2 or v3 device is half a chip.
BF16_PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b|\bH200\b", 989.4e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b|\bH800\b", 989.4e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 4090\b(?! D)", 165.2e12),
    (r"\bRTX 3090\b(?! Ti)", 71e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI250X\b", 191.5e12),
    (r"\bTPU v6( lite|e)\b", 918e12),
    (r"\bTPU v5( lite|e)\b", 197e12),
    (r"\bTPU v5p?\b", 459e12),
    (r"\bTPU v4\b(?! lite)", 275e12),
    (r"\bTPU v3\b", 61.5e12),
    (r"\bTPU v2\b", 22.5e12),
)


def peak(device_kind: str, dtype: str) -> float | None:
    """Dense FLOP/s of one device for products in `dtype`; None where there is no sure figure.

    Only bfloat16 has one: the rate of float32 products depends on whether the compiler may round
    them (TF32, bfloat16 passes). CPUs have none, and neither have slices or chips not listed.
    """
    if dtype != "bfloat16" or "MIG" in device_kind:  # MIG: a slice of the chip
        return None
    for pattern, flops in BF16_PEAKS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return flops
    return None
