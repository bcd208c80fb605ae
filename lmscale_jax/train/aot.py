"""Chips that this machine lacks: what --topology names, and a mesh of them.

Compiles the training step ahead of time, with nothing allocated, and counts its memory.

Bytes, messages and time of a config over a mesh, as sections of the page of --explain.
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
from lmscale_jax.data.batches import Batch
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, costs, flops, memory
from lmscale_jax.model import mesh as meshes
from lmscale_jax.model.sharding import BATCH
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import update_rules
from lmscale_jax.train import step

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
    chip: flops.Chip
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
            f"--topology={name} is not CHIP:COUNT or CHIP:SHAPE of {', '.join(flops.CHIPS)}; {USE}"
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


def lower_step(config, model: build.Model, mesh):
    """Lowers the training step for abstract shapes.

    `mesh` may be of chips that are only described, as by `Topology.devices`.
    """
    platform = mesh.devices.flat[0].platform
    transform = optim.build_optimizer(config, model.rows, mesh, platform)
    shardings = step.train_state_shardings(config, model, transform, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: step.initial_state(config, model, transform, 0)),
        shardings,
    )
    tokens = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.data.seq_len),
        np.int32,
        sharding=jax.sharding.NamedSharding(mesh, BATCH),
    )
    return step.TrainStep(config, model, mesh, shardings).lower(state, Batch(tokens, tokens))


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


def memory_rows(config, model: build.Model, mesh) -> list[tuple[str, str]]:
    """Compiles the training step and formats its `compiled_memory` as (name, MiB) rows."""
    sizes = compiled_memory(lower_step(config, model, mesh).compile())
    if sizes is None:
        return [("not known", "this platform's compiler does not count memory")]
    return [(name, f"{size / 2**20:,.1f} MiB") for name, size in sizes.items()]


def optimizer_moments(config, model: build.Model) -> dict[str, int]:
    """{path: arrays of its size that the optimizer keeps}."""
    mean = 1 if config.optim.ema_decay else 0
    rules = update_rules(model.rows, config)
    return {path: OPTIMIZERS[rule.optimizer].moments + mean for path, rule in rules.items()}


def memory_sizes(
    config, model: build.Model, axes: Mapping[str, int], platform: str
) -> dict[str, int]:
    """`memory.chip_memory` of a model as it was built, by the sizes of the mesh axes."""
    return memory.chip_memory(
        config,
        model.specs,
        axes,
        platform=platform,
        kernel=model.choices["attention"].split(":")[0],
        stack=model.choices["blocks"],
        moments=optimizer_moments(config, model),
    )


def forecast_step(config, model: build.Model, mesh) -> list[tuple[str, list[tuple]]]:
    """Sections on a mesh of described chips: whether it fits, messages, roofline, checkpoint."""
    chip = mesh.chip
    total = memory_sizes(config, model, mesh.shape, chip.platform)["total"]
    held = optimizer_moments(config, model)
    sections = [
        (
            "fit",
            [(f"{total / chip.memory:.0%} of the {chip.memory / 1e9:.4g} GB of one {chip.name}",)],
        ),
    ]
    if flops.peak(chip.kind, config.model.dtype) is None:
        why = f"{chip.name} has no sure peak in {config.model.dtype}; bfloat16 has one"
        sections.append(("time per step (forecast)", [(why,)]))
    else:
        step = costs.step_cost(config, model.specs, mesh.shape, chip, held)
        sections.append(("communication per step and chip", _messages(step)))
        sections.append(("time per step (forecast)", _roofline(config, step, mesh)))
    size, seconds = costs.checkpoint(model.specs, mesh.size, chip, held)
    hosts = -(-mesh.size // chip.host)
    each = f"{costs.WRITE_PER_HOST / 1e9:g} GB/s from each of {hosts} host(s)"
    sections.append(("checkpoint", [(f"{size / 1e9:.3g} GB in {seconds:.2g} seconds, at {each}",)]))
    return sections


def _messages(step: costs.StepCost) -> list[tuple]:
    if not step.messages:
        return [("none",)]
    rows = [("kind", "over", "fast links", "network", "messages", "seconds", "of compute", "")]
    for message in step.messages:
        rows.append(
            (
                message.kind,
                " ".join(message.axes),
                f"{message.fast / 1e9:.3g} GB",
                f"{message.network / 1e9:.3g} GB",
                f"{message.count:,.0f}",
                f"{message.seconds:.3g}",
                f"{message.seconds / step.compute:.0%}",
                "beside products" if message.hidden else "waited for",
            )
        )
    return rows


def _roofline(config, step: costs.StepCost, mesh) -> list[tuple]:
    tokens, chip = tokens_per_step(config), mesh.chip
    return [
        ("FLOPs per chip", f"{step.chip_flops:.4g}", f"{step.model_flops:.4g} without recomputing"),
        ("bytes moved per chip", f"{step.moved:.4g}", "to and from memory, products' own left out"),
        (
            "compute",
            f"{step.compute:.3g} s",
            f"products at {costs.PRODUCT_SHARE:.0%} of {chip.peak / 1e12:,.4g} TFLOP/s, then bytes "
            f"at {costs.BANDWIDTH_SHARE:.0%} of {chip.bandwidth / 1e12:.3g} TB/s (shares assumed)",
        ),
        ("messages beside it", f"{step.hidden:.3g} s", "the step takes the longer of the two"),
        ("messages waited for", f"{step.exposed:.3g} s", "and these"),
        ("step", f"{step.seconds:.3g} s", f"{tokens / step.seconds:,.0f} tokens/s"),
        ("MFU", f"{step.mfu:.1%}", "FLOPs without recomputing / (step x dense bfloat16 peak)"),
        ("whole run", f"{step.seconds * config.train.steps / 3600:.3g} h", "the steps alone"),
    ]
