"""Chips that this machine lacks: what --topology names, and a mesh of them."""

import importlib.util
import math
import os
import re
import types
from typing import NamedTuple

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.model import chips

USE = "use --topology=v5e:4x4 or --topology=H100:64"


class Topology(NamedTuple):
    """Chips as --topology names them.

    Attributes:
      name: the text of the flag.
      chip: one of `CHIPS`.
      count: number of chips.
      shape: of the torus, as "4x4"; empty where only the number of chips is known.
    """

    name: str
    chip: chips.Chip
    count: int
    shape: str = ""

    def devices(self) -> list:
        """Returns descriptions of the chips, for which JAX can compile without having any.

        Raises InputError where libtpu is missing or does not know the topology.
        """
        need_libtpu(self.name)
        # Without these libtpu asks the metadata server of a cloud machine, for minutes, and lets
        # only one process load it, as if it used real chips.
        for flag in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(flag, "1")
        from jax.experimental import topologies

        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{self.shape}"
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--topology={self.name}: libtpu does not describe it ({reason}); {USE}"
            ) from None
        return list(description.devices)


class Mesh(NamedTuple):
    """The sizes of a mesh's axes and its kind of chip, in place of `jax.sharding.Mesh`.

    It is enough for forecasts; nothing can be placed on it.
    """

    shape: dict[str, int]
    chip: chips.Chip

    @property
    def size(self) -> int:
        return math.prod(self.shape.values())

    @property
    def devices(self) -> np.ndarray:
        """An array of one entry: `devices.flat[0]` has the attributes of every device."""
        device = types.SimpleNamespace(platform=self.chip.platform, device_kind=self.chip.kind)
        return np.array([device], dtype=object)


def find(name: str) -> Topology:
    """Parses a --topology: CHIP:COUNT, or for TPUs CHIP:AxB or AxBxC.

    Raises InputError where it is malformed or names no chip.
    """
    match = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+){0,2})", name)
    chips_by_name = {chip.lower(): spec for chip, spec in chips.CHIPS.items()}
    if not match or match[1].lower() not in chips_by_name:
        raise InputError(
            f"--topology={name} is not CHIP:COUNT or CHIP:SHAPE of {', '.join(chips.CHIPS)}; {USE}"
        )
    chip, shape = chips_by_name[match[1].lower()], match[2]
    count = math.prod(int(side) for side in shape.split("x"))
    if not count:
        raise InputError(f"--topology={name} has no chips; {USE}")
    if "x" in shape and chip.platform != "tpu":
        raise InputError(
            f"--topology={name}: {chip.name} has no torus; use --topology={chip.name}:{count}"
        )
    return Topology(name, chip, count, shape if "x" in shape else "")


def need_libtpu(name: str) -> None:
    """Raises InputError where libtpu, which compiles for TPUs, is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} needs libtpu, which is not installed; "
            f"use pip install 'lmscale_jax[tpu]'"
        )
