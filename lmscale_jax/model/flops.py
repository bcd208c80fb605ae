"""Parameters and floating-point operations of a model, from its annotations alone."""

import re

from lmscale_jax.model import wiring
from lmscale_jax.model.param import Spec, named

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
