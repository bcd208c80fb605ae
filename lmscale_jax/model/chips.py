"""Chips by name: what their vendors' data sheets say of memory and links. No device is asked."""

from typing import NamedTuple

from lmscale_jax.model import flops

GB, TB, GIB = 1e9, 1e12, 2**30


class Chip(NamedTuple):
    """One chip, which is one device to JAX.

    Attributes:
      name: what `--topology` calls it.
      kind: its `device_kind`.
      pattern: finds it in a device kind.
      platform: JAX's name of what runs it.
      memory: bytes of HBM.
      bandwidth: of HBM, bytes a second.
      link: bytes a second that one chip can send to its neighbours over NVLink or the chips' own
        interconnect, in one direction, all links together.
      domain: chips that reach each other over such links: a node of GPUs, a pod of TPUs.
      network: bytes a second and chip between domains, in one direction.
      host: chips that share one host.
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

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return flops.peak(self.kind, "bfloat16")


# GPUs: NVIDIA's data sheets of the chip (memory, its bandwidth; NVLink, which they give for both
# directions together, so halved here) and of the DGX with eight of them (one network port of
# ConnectX for each GPU, in bits). TPUs: the page of each version in Google's Cloud TPU
# documentation ("System architecture"); its inter-chip bandwidth is for both directions.
CHIPS = {
    chip.name: chip
    for chip in (
        # H100 data sheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s. DGX H100: 400 Gb/s a GPU.
        Chip("H100", "NVIDIA H100 80GB HBM3", r"H100 80GB HBM3", "gpu",
             80 * GB, 3.35 * TB, 450 * GB, 8, 50 * GB, 8),
        # H200 data sheet, SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200: 400 Gb/s a GPU.
        Chip("H200", "NVIDIA H200", r"\bH200\b", "gpu",
             141 * GB, 4.8 * TB, 450 * GB, 8, 50 * GB, 8),
        # DGX B200 data sheet: 1,440 GB and 64 TB/s for eight, NVLink 14.4 TB/s for eight, 400 Gb/s.
        Chip("B200", "NVIDIA B200", r"\bB200\b", "gpu",
             180 * GB, 8 * TB, 900 * GB, 8, 50 * GB, 8),
        # A100 80GB data sheet, SXM: 2,039 GB/s, NVLink 600 GB/s. DGX A100: 200 Gb/s.
        Chip("A100", "NVIDIA A100-SXM4-80GB", r"A100-SXM4-80GB", "gpu",
             80 * GB, 2.039 * TB, 300 * GB, 8, 25 * GB, 8),
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
