"""The training step compiled ahead of time, with nothing allocated, and the bytes it will take."""

import jax
import numpy as np

from lmscale_jax.data.pipeline import Batch
from lmscale_jax.model import build
from lmscale_jax.model.placement import BATCH
from lmscale_jax.optim import build as optim
from lmscale_jax.run import step


def lowered(config, model: build.Model, mesh):
    """The step that training will call, lowered for shapes alone; `mesh` may be of chips that are
    only described."""
    platform = mesh.devices.flat[0].platform
    transform = optim.build(config, model.rows, mesh, platform)
    placed = step.shardings(config, model, transform, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: step.initial(config, model, transform, 0)),
        placed,
    )
    rows = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.data.seq_len),
        np.int32,
        sharding=jax.sharding.NamedSharding(mesh, BATCH),
    )
    return step.Step(config, model, mesh, placed).lower(state, Batch(rows, rows))


def memory(compiled) -> dict[str, int] | None:
    """Bytes on one device by the compiler's own account; None where it keeps none.

    "peak" is arguments + outputs - what shares their place + temporaries.
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
    """`memory` of the training step for people to read; it takes as long as compiling does."""
    found = memory(lowered(config, model, mesh).compile())
    if found is None:
        return [("not known", "this platform's compiler keeps no account")]
    return [(name, f"{size / 2**20:,.1f} MiB") for name, size in found.items()]
