"""Compiles the training step ahead of time, with nothing allocated, and counts its memory."""

import jax
import numpy as np

from lmscale_jax.data.pipeline import Batch
from lmscale_jax.model import build
from lmscale_jax.model.placement import BATCH
from lmscale_jax.optim import build as optim
from lmscale_jax.run import step


def lowered(config, model: build.Model, mesh):
    """Lowers the training step for abstract shapes.

    `mesh` may be of chips that are only described, as by `Topology.devices`.
    """
    platform = mesh.devices.flat[0].platform
    transform = optim.build(config, model.rows, mesh, platform)
    shardings = step.shardings(config, model, transform, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: step.initial(config, model, transform, 0)),
        shardings,
    )
    tokens = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.data.seq_len),
        np.int32,
        sharding=jax.sharding.NamedSharding(mesh, BATCH),
    )
    return step.Step(config, model, mesh, shardings).lower(state, Batch(tokens, tokens))


def memory(compiled) -> dict[str, int] | None:
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


def rows(config, model: build.Model, mesh) -> list[tuple[str, str]]:
    """Compiles the training step and formats its `compiled_memory` as (name, MiB) rows."""
    sizes = memory(lowered(config, model, mesh).compile())
    if sizes is None:
        return [("not known", "this platform's compiler does not count memory")]
    return [(name, f"{size / 2**20:,.1f} MiB") for name, size in sizes.items()]
