"""Counts parameters and FLOPs of a model from its annotations; figures of chips by name.

The figures are from the vendors' data sheets; no device is queried.
"""

import re
from typing import NamedTuple

from lmscale_jax.model import visible_keys
from lmscale_jax.model.param import Spec, named
from lmscale_jax.model.transformer import block_flops

# For each forward product the backward pass has two: for the gradients of inputs and of weights.
FORWARD_AND_BACKWARD = 3


def parameter_counts(specs: dict) -> dict[str, int]:
    """Counts parameters: {"total", "non_embedding", "embedding"}.

    "embedding" is every table over the vocabulary or the positions, an untied readout included:
    the N of Kaplan et al. 2020 (arXiv 2001.08361, table 1) excludes both ends. So non_embedding
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
    """Counts the FLOPs of a forward pass over one token, by part; multiply and add count as two.

    "dense": the products inside the blocks. "readout": the product with the vocabulary.
    "attention": q·k and the weighted sum of values, for the keys within mask and window
    (`visible_keys.mean_visible`), and what a user's modules declare by `flops`. Lookups, norms and
    activations are not counted: they grow with the width, not with its square.
    """
    model = config.model
    hidden = [spec for spec in named(specs["blocks"]).values() if spec.n_in]
    return {
        "dense": 2.0 * sum(spec.size for spec in hidden),
        "readout": 2.0 * model.d_model * model.vocab_size,
        "attention": block_flops(config, visible_keys.mean_visible(config)),
    }


def flops_per_token(config, specs: dict) -> dict[str, float]:
    """Counts the FLOPs of training on one token, forward and backward, by convention.

    "6n": 6 times all parameters (Hoffmann et al. 2022). "6n_non_embedding": 6 times those outside
    the tables (Kaplan et al. 2020). "model": all matrix products of the model, including the
    readout and the visible keys of attention; run.json's flops_per_token and MFU use it. None
    counts recomputation (model.remat, the chunks of the loss).
    """
    n = parameter_counts(specs)
    return {
        "6n": 6.0 * n["total"],
        "6n_non_embedding": 6.0 * n["non_embedding"],
        "model": FORWARD_AND_BACKWARD * sum(forward_flops(config, specs).values()),
    }


# Dense (not sparse) bfloat16 FLOP/s of one JAX device, from the vendors' data sheets; the first
# pattern that matches `device_kind` counts. A TPU v2 or v3 device is half a chip.
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


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the dense FLOP/s of one device for products in `dtype`; None if it is unknown.

    Only bfloat16 has a figure: the rate of float32 products depends on whether the compiler may
    round them (TF32, bfloat16 passes). CPUs, slices of a chip and unlisted chips have none.
    """
    if dtype != "bfloat16" or "MIG" in device_kind:  # MIG: a slice of the chip
        return None
    for pattern, flops in BF16_PEAKS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return flops
    return None


GB, TB, GIB = 1e9, 1e12, 2**30


class Chip(NamedTuple):
    """One chip, which is one device to JAX.

    Attributes:
      name: its name in `--topology`.
      kind: its `device_kind`.
      pattern: regular expression that matches its device kinds.
      platform: JAX's name of its platform.
      memory: bytes of HBM.
      bandwidth: bytes a second of HBM.
      link: bytes a second that one chip sends to its neighbours over NVLink or the inter-chip
        interconnect, in one direction, all links together.
      domain: chips that such links connect: a node of GPUs, a pod of TPUs.
      network: bytes a second and chip between domains, in one direction.
      host: chips per host.
      capability: CUDA compute capability, as JAX's devices report it; "0" for other chips.
    """

    name: str
    kind: str
    pattern: str
    platform: str
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float
    host: int
    capability: str = "0"

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return peak_flops(self.kind, "bfloat16")


# GPUs: NVIDIA's data sheets of the chip (memory, its bandwidth; NVLink, which they give for both
# directions together, so halved here) and of the DGX with eight of them (one network port of
# ConnectX for each GPU, in bits). TPUs: the page of each version in Google's Cloud TPU
# documentation ("System architecture"); its inter-chip bandwidth is for both directions. Compute
# capability: NVIDIA's list of "CUDA GPUs".
CHIPS = {
    chip.name: chip
    for chip in (
        # H100 data sheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s. DGX H100: 400 Gb/s a GPU.
        Chip("H100", "NVIDIA H100 80GB HBM3", r"H100 80GB HBM3", "gpu",
             80 * GB, 3.35 * TB, 450 * GB, 8, 50 * GB, 8, "9.0"),
        # H200 data sheet, SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200: 400 Gb/s a GPU.
        Chip("H200", "NVIDIA H200", r"\bH200\b", "gpu",
             141 * GB, 4.8 * TB, 450 * GB, 8, 50 * GB, 8, "9.0"),
        # DGX B200 data sheet: 1,440 GB and 64 TB/s for eight, NVLink 14.4 TB/s for eight, 400 Gb/s.
        Chip("B200", "NVIDIA B200", r"\bB200\b", "gpu",
             180 * GB, 8 * TB, 900 * GB, 8, 50 * GB, 8, "10.0"),
        # A100 80GB data sheet, SXM: 2,039 GB/s, NVLink 600 GB/s. DGX A100: 200 Gb/s.
        Chip("A100", "NVIDIA A100-SXM4-80GB", r"A100-SXM4-80GB", "gpu",
             80 * GB, 2.039 * TB, 300 * GB, 8, 25 * GB, 8, "8.0"),
        # "TPU v5e": 16 GB, 819 GB/s, links 400 GB/s, pods of 256 with 6.4 Tb/s outwards.
        Chip("v5e", "TPU v5 lite", r"TPU v5( lite|e)", "tpu",
             16 * GIB, 819 * GB, 200 * GB, 256, 6400 / 256 / 8 * GB, 8),
        # "TPU v5p": 95 GiB, 2,765 GB/s, links 1,200 GB/s, pods of 8,960, 50 Gb/s a chip outwards.
        Chip("v5p", "TPU v5", r"TPU v5p?$", "tpu",
             95 * GIB, 2.765 * TB, 600 * GB, 8960, 6.25 * GB, 4),
        # "TPU v6e": 32 GB, 1,600 GB/s, links 3,200 Gb/s (the same table gives v5e 1,600: one
        # direction), pods of 256 with 25.6 Tb/s outwards.
        Chip("v6e", "TPU v6 lite", r"TPU v6( lite|e)", "tpu",
             32 * GIB, 1.6 * TB, 400 * GB, 256, 25600 / 256 / 8 * GB, 8),
    )
}  # fmt: skip
# Of chips that are not listed; the least that anyone trains on.
UNKNOWN_MEMORY = 16 * GB


def device_memory(device_kind: str) -> float:
    """Returns the bytes of memory of one device, UNKNOWN_MEMORY where its kind is not listed."""
    chips = (chip for chip in CHIPS.values() if re.search(chip.pattern, device_kind))
    return next((chip.memory for chip in chips), UNKNOWN_MEMORY)
