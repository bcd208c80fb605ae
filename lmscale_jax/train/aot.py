"""Compiles the training step ahead of time and forecasts its memory, messages and time.

--topology names chips that this machine does not have. Nothing is allocated on any device.
"""

import importlib.util
import math
import os
import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from lmscale_jax.config.durations import tokens_per_step
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, costs, flops, memory
from lmscale_jax.model import mesh as meshes
from lmscale_jax.optim import build as optim
from lmscale_jax.train import gpu_descriptions
from lmscale_jax.train.setup import Setup

TOPOLOGY_REMEDY = "use --topology=v5e:4x4 or --topology=H100:64"


class Topology(NamedTuple):
    """Chips as --topology names them.

    Attributes:
      name: the text of the flag.
      chip: one of `CHIPS`.
      count: number of chips.
      shape: of the torus, as "4x4"; empty where only the number of chips is known.
    """

    name: str
    chip: flops.Chip
    count: int
    shape: str = ""

    @property
    def is_compiled_for(self) -> bool:
        """Whether --explain compiles the step for these chips, besides its arithmetic."""
        on_gpu = self.chip.platform == "gpu"
        return gpu_descriptions.gpu_compiler_installed() if on_gpu else bool(self.shape)

    def devices(self) -> list:
        """Returns descriptions of the chips, for which JAX can compile without having any.

        Raises InputError where libtpu is missing or does not know the topology.
        """
        if self.chip.platform == "gpu":
            return gpu_descriptions.described_gpus(self.chip, self.count, self.name)
        need_libtpu(self.name)
        # Without these libtpu asks the metadata server of a cloud machine, for minutes, and lets
        # only one process load it, as if it used real chips.
        for flag in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(flag, "1")
        from jax.experimental import topologies

        # A host has a square of four chips unless one is all there is.
        host = {"chips_per_host_bounds": (1, 1, 1)} if self.count == 1 else {}
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{self.shape}", **host
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--topology={self.name}: libtpu does not describe it ({reason}); {TOPOLOGY_REMEDY}"
            ) from None
        return list(description.devices)


class MeshSizes(NamedTuple):
    """The sizes of a mesh's axes and its kind of chip, in place of `jax.sharding.Mesh`.

    It is enough for forecasts; nothing can be placed on it.
    """

    shape: dict[str, int]
    chip: flops.Chip

    @property
    def size(self) -> int:
        return math.prod(self.shape.values())

    @property
    def devices(self) -> np.ndarray:
        """An array of one entry: `devices.flat[0]` has the attributes of every device."""
        device = types.SimpleNamespace(
            platform=self.chip.platform,
            device_kind=self.chip.kind,
            compute_capability=self.chip.capability,
        )
        return np.array([device], dtype=object)


def mesh_sizes(config, chips: Topology, devices: list | None) -> MeshSizes:
    """Returns the mesh of a config over chips, of which JAX's `devices` may know more."""
    hosts = meshes.count_hosts(devices) if devices else -(-chips.count // chips.chip.host)
    shape = meshes.mesh_shape(config, chips.count, chips.chip.platform, hosts)
    return MeshSizes(shape, chips.chip)


def parse_topology(name: str) -> Topology:
    """Parses a --topology: CHIP:COUNT, or for TPUs CHIP:AxB or AxBxC.

    Raises InputError where it is malformed or names no chip.
    """
    match = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+){0,2})", name)
    chips_by_name = {chip.lower(): spec for chip, spec in flops.CHIPS.items()}
    if not match or match[1].lower() not in chips_by_name:
        raise InputError(
            f"--topology={name} is not CHIP:COUNT or CHIP:SHAPE of {', '.join(flops.CHIPS)}; "
            f"{TOPOLOGY_REMEDY}"
        )
    chip, shape = chips_by_name[match[1].lower()], match[2]
    count = math.prod(int(side) for side in shape.split("x"))
    if not count:
        raise InputError(f"--topology={name} has no chips; {TOPOLOGY_REMEDY}")
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


def compiled_memory(compiled) -> dict[str, int] | None:
    """Returns the bytes on one device as the compiler counts them; None where it does not.

    "peak" is arguments + outputs - aliased + temporaries.
    """
    used = compiled.memory_analysis()
    if used is None:
        return None
    sizes = {
        "arguments": used.argument_size_in_bytes,
        "outputs": used.output_size_in_bytes,
        "aliased": used.alias_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
    }
    peak = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
    return sizes | {"peak": peak}


def memory_rows(setup: Setup) -> list[tuple[str, str]]:
    """Compiles the training step and returns its `compiled_memory_rows`."""
    return compiled_memory_rows(setup.lower_step().compile())


def compiled_memory_rows(compiled) -> list[tuple[str, str]]:
    """Formats the `compiled_memory` of a program as (name, MiB) rows."""
    sizes = compiled_memory(compiled)
    if sizes is None:
        return [("not known", "this platform's compiler does not count memory")]
    return [(name, f"{size / 2**20:,.1f} MiB") for name, size in sizes.items()]


def optimizer_moments(config, model: build.Model) -> dict[str, int]:
    """Returns {path: number of arrays of its shape that the optimizer keeps}."""
    transform = optim.build_optimizer(config, model.param_rules)
    params = jax.eval_shape(model.init, jax.random.key(0))
    counts = dict.fromkeys(model.param_rules, 0)
    for where, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(transform.init, params)):
        path = meshes.path_of_parameter(where, counts)
        if path and leaf.shape == model.param_rules[path].spec.shape:
            counts[path] += 1
    return counts


def memory_sizes(
    config, model: build.Model, axes: Mapping[str, int], platform: str, device_kind: str = ""
) -> dict[str, int]:
    """Computes `memory.chip_memory` of a built model from the sizes of the mesh axes."""
    return memory.chip_memory(
        config,
        model.specs,
        axes,
        platform=platform,
        device_kind=device_kind,
        kernel=model.choices["attention"].split(":")[0],
        stack=model.choices["blocks"],
        moments=optimizer_moments(config, model),
    )


def forecast_step(config, model: build.Model, mesh) -> list[tuple[str, list[tuple]]]:
    """Forecasts memory, messages, time and checkpoints on described chips, as titles and rows."""
    chip = mesh.chip
    total = memory_sizes(config, model, mesh.shape, chip.platform, chip.kind)["total"]
    moments = optimizer_moments(config, model)
    sections = [
        (
            "fit",
            [(f"{total / chip.memory:.0%} of the {chip.memory / 1e9:.4g} GB of one {chip.name}",)],
        ),
    ]
    # The program that is compiled for a GPU says more: gpu_report.gpu_sections.
    if chip.platform != "gpu" or not gpu_descriptions.gpu_compiler_installed():
        sections += _assumed_time(config, model, mesh, moments)
    size, seconds = costs.checkpoint_cost(model.specs, mesh.size, chip, moments)
    hosts = -(-mesh.size // chip.host)
    rate = f"{costs.WRITE_PER_HOST / 1e9:g} GB/s from each of {hosts} host(s)"
    sections.append(("checkpoint", [(f"{size / 1e9:.3g} GB in {seconds:.2g} seconds, at {rate}",)]))
    return sections


def _assumed_time(config, model: build.Model, mesh, moments: dict[str, int]) -> list[tuple]:
    """Sections of messages and time, from data sheets and assumed shares of them."""
    chip = mesh.chip
    if flops.peak_flops(chip.kind, config.model.dtype) is None:
        remark = f"{chip.name} has no known peak in {config.model.dtype}; use bfloat16"
        return [("time per step (forecast)", [(remark,)])]
    cost = costs.step_cost(config, model.specs, mesh.shape, chip, moments)
    rows = _roofline(config, cost, mesh)
    if chip.platform == "gpu":
        remark = "would compile the step for these GPUs here, without one, and read its time off it"
        rows.append(("shares assumed", f"pip install '{gpu_descriptions.EXTRA}'", remark))
    return [
        ("communication per step and chip", _messages(cost)),
        ("time per step (forecast)", rows),
    ]


def _messages(cost: costs.StepCost) -> list[tuple]:
    if not cost.messages:
        return [("none",)]
    rows = [("kind", "over", "fast links", "network", "messages", "seconds", "of compute", "")]
    for message in cost.messages:
        rows.append(
            (
                message.kind,
                " ".join(message.axes),
                f"{message.fast / 1e9:.3g} GB",
                f"{message.network / 1e9:.3g} GB",
                f"{message.count:,.0f}",
                f"{message.seconds:.3g}",
                f"{message.seconds / cost.compute:.0%}",
                "beside products" if message.hidden else "waited for",
            )
        )
    return rows


def _roofline(config, cost: costs.StepCost, mesh) -> list[tuple]:
    tokens, chip = tokens_per_step(config), mesh.chip
    return [
        ("FLOPs per chip", f"{cost.chip_flops:.4g}", f"{cost.model_flops:.4g} without recomputing"),
        ("bytes moved per chip", f"{cost.moved:.4g}", "to and from memory, products' own left out"),
        (
            "compute",
            f"{cost.compute:.3g} s",
            f"products at {costs.PRODUCT_SHARE:.0%} of {chip.peak / 1e12:,.4g} TFLOP/s, then bytes "
            f"at {costs.BANDWIDTH_SHARE:.0%} of {chip.bandwidth / 1e12:.3g} TB/s (shares assumed)",
        ),
        ("messages beside it", f"{cost.hidden:.3g} s", "the step takes the longer of the two"),
        ("messages waited for", f"{cost.exposed:.3g} s", "and these"),
        ("step", f"{cost.seconds:.3g} s", f"{tokens / cost.seconds:,.0f} tokens/s"),
        ("MFU", f"{cost.mfu:.1%}", "FLOPs without recomputing / (step x dense bfloat16 peak)"),
        ("whole run", f"{cost.seconds * config.train.steps / 3600:.3g} h", "the steps alone"),
    ]
