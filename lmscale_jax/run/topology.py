"""Chips that are not here: what --topology names, and a mesh of them."""

import importlib.util
import math
import os
import re
import types
from typing import NamedTuple

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.model import chips

WORKS = "--topology=v5e:4x4 or --topology=H100:64 would work"


class Topology(NamedTuple):
    """Attributes:
    name: as given.
    chip: one of `chips.CHIPS`.
    count: of chips.
    shape: of the torus, as "4x4"; empty where only their number is known.
    """

    name: str
    chip: chips.Chip
    count: int
    shape: str = ""

    def devices(self) -> list:
        """Descriptions of the chips, which JAX can lay out and compile for, without any of them.

        Raises InputError where libtpu is missing or does not know the topology.
        """
        need_libtpu(self.name)
        # libtpu would else ask the metadata server of a cloud machine, for minutes, and let only
        # one process load it, as if a description were a chip.
        for flag in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(flag, "1")
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{self.shape}"
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--topology={self.name}: libtpu does not describe it ({reason}); {WORKS}"
            ) from None
        return list(found.devices)


class Mesh(NamedTuple):
    """A mesh as far as arithmetic goes, in place of `jax.sharding.Mesh`: the sizes of its axes and
    the chip that stands at each place."""

    shape: dict[str, int]
    chip: chips.Chip

    @property
    def size(self) -> int:
        return math.prod(self.shape.values())

    @property
    def devices(self) -> np.ndarray:
        """One stands for all: `devices.flat[0]` has the attributes of a device."""
        one = types.SimpleNamespace(platform=self.chip.platform, device_kind=self.chip.kind)
        return np.array([one], dtype=object)


def find(name: str) -> Topology:
    """What a --topology names: CHIP:COUNT, or for TPUs CHIP:AxB or AxBxC."""
    known = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+){0,2})", name)
    if not known or known[1].lower() not in (low := {c.lower(): c for c in chips.CHIPS}):
        raise InputError(
            f"--topology={name}: CHIP:COUNT or CHIP:SHAPE of {', '.join(chips.CHIPS)}; {WORKS}"
        )
    chip, shape = chips.CHIPS[low[known[1].lower()]], known[2]
    count = math.prod(int(side) for side in shape.split("x"))
    if not count:
        raise InputError(f"--topology={name}: no chips; {WORKS}")
    if "x" in shape and chip.platform != "tpu":
        raise InputError(
            f"--topology={name}: {chip.name} has no torus; {chip.name}:{count} would work"
        )
    return Topology(name, chip, count, shape if "x" in shape else "")


def need_libtpu(name: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} is compiled for by libtpu, which is missing; "
            f"pip install 'lmscale_jax[tpu]' brings it"
        )
