"""Runs a coordinate check: every size of a family on one batch, its activations step by step.

One compiled program for each size: a vmap over seeds of a scan over steps.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve, validate
from lmscale_jax.data import pipeline, prepared
from lmscale_jax.errors import InputError
from lmscale_jax.files import plain_values, write_json
from lmscale_jax.lab.family import deliberately_wrong, resized
from lmscale_jax.model.build import Model, build
from lmscale_jax.model.param import named
from lmscale_jax.optim import build as optim
from lmscale_jax.parametrization import coords
from lmscale_jax.parametrization.schemes import scheme
from lmscale_jax.run import record


class Plan(NamedTuple):
    """Attributes:
    sweep: what grows: "width", "head_dim" or "depth".
    sizes: its values, rising.
    configs: one for each size, not yet resolved.
    control: the deliberate mistake in them, or "none".
    """

    sweep: str
    sizes: list[int]
    configs: list[ConfigDict]
    control: str


def plan(config: ConfigDict, sweep: str, sizes: list[int], control: str = "none") -> Plan:
    """The configs of a sweep. Raises InputError where a size cannot be made."""
    validate(config)
    if sweep == "depth" and scheme(config).has_base and not scheme(config).follows_depth:
        raise InputError(
            f"config.parametrization.name={config.parametrization.name!r} says nothing of depth; "
            "--config.parametrization.name=completep with base_depth=2 would work"
        )
    made = [resized(config, sweep, size) for size in sizes]
    for one in made:
        deliberately_wrong(one.parametrization, control)
        validate(one)
    return Plan(sweep, sizes, made, control)


def check(plan: Plan, n_seeds: int, workdir: Path, say: Callable[[str], None]) -> dict:
    """Measures every size, judges the slopes, and writes coord_check.json and .png.

    Raises InputError where `workdir` holds another check.
    """
    asked = {
        "sweep": plan.sweep,
        "sizes": plan.sizes,
        "control": plan.control,
        "seeds": n_seeds,
        "config": plan.configs[0].to_dict(),
    }
    _refuse_another(workdir, asked)
    data = prepared.prepare(plan.configs[0].data, log=say)
    tensors: dict[str, list] = {}
    for size, config in zip(plan.sizes, plan.configs, strict=True):
        begin = time.perf_counter()
        config = resolve(config, data.vocab_size)
        batch = pipeline.TrainBatches(
            data, config.data.seq_len, config.train.batch_size, config.data.seed
        ).at(0)
        found = measure(config, batch, list(range(n_seeds)))
        if plan.sweep == "depth":
            found = _ends(found, config.model.n_layers)
        for name, values in found.items():
            tensors.setdefault(name, []).append(values)
        say(f"{plan.sweep} {size}: {time.perf_counter() - begin:.1f} s")
    shared = {name: np.stack(v) for name, v in tensors.items()}
    losses = shared.pop("loss")
    slopes = coords.table(plan.sizes, shared)
    failed = coords.failures(slopes, plan.sweep)
    result = asked | {
        "passed": not failed,
        "thresholds": coords.THRESHOLDS,
        "failures": failed,
        "slopes": slopes,
        "values": {name: values.mean(axis=2).tolist() for name, values in shared.items()},
        "losses": losses.mean(axis=2).tolist(),
        "versions": record.provenance()["versions"],
    }
    if plan.control != "none":
        result["predicted"] = coords.as_predicted(slopes, plan.control)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "coord_check.json", result)
    say(summary(result))
    return result


def _ends(tensors: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """What every depth has: the ends of the stack, the last block's own as "blocks/last/name".

    A block in the middle, or the first, is another share of the way through at every depth.
    """
    last, found = f"blocks/{n_layers - 1}/", {}
    for name, values in tensors.items():
        if "blocks/" not in name:
            found[name] = values
        elif last in name:
            found[name.replace(last, "blocks/last/")] = values
    return found


def _refuse_another(workdir: Path, asked: dict) -> None:
    path = workdir / "coord_check.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for name, value in plain_values(asked).items():
        if before.get(name) != value:
            raise InputError(
                f"--workdir={workdir} holds a check of another {name}; name a new --workdir"
            )


def measure(config, batch, seeds: list[int]) -> dict[str, np.ndarray]:
    """The mean |x| of every activation and of its change since step 1, [steps, seeds] by tensor.

    Step t is measured with the parameters of t - 1 updates.

    Args:
      config: resolved.
      batch: the `Batch` that every step repeats.
      seeds: of the initial parameters.

    Tensors are named as in `Model.taps`, those of block l "blocks/l/name"; "loss" is beside them.
    """
    model = build(config, platform=jax.default_backend())
    run = jax.jit(jax.vmap(lambda key: _trajectory(config, model, batch, key), out_axes=1))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return {name: np.asarray(x, np.float64) for name, x in run(keys).items()}


def _trajectory(config, model: Model, batch, key) -> dict[str, jax.Array]:
    """{tensor: [steps]} of one seed."""
    transform = optim.build(config, model.rows, platform=jax.default_backend())
    params = model.init(key)

    def taps(params):
        return model.taps(params, batch.tokens_BxT, lambda _, x: x.astype(jnp.float32))

    def loss_of(params):
        nll_BxT = model.losses(params, batch.tokens_BxT, batch.targets_BxT)
        return nll_BxT.sum() / (batch.targets_BxT >= 0).sum()

    first = taps(params)

    def sizes(params):
        now = taps(params)
        changes = _mean_sizes(jax.tree.map(jnp.subtract, now, first))
        return _mean_sizes(now) | {coords.CHANGE + name: x for name, x in changes.items()}

    def step(carry, t):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = transform.update(grads, state, params, step=t)
        return (optim.apply(params, updates), state), sizes(params) | {"loss": loss}

    start = (params, transform.init(params))
    return jax.lax.scan(step, start, jnp.arange(config.train.steps))[1]


def _mean_sizes(taps: dict) -> dict[str, jax.Array]:
    """The mean |x| of every tap, those of blocks apart for each block."""
    found = {}
    for name, x in named(taps).items():
        where, _, rest = name.partition("/")
        if where == "blocks":
            by_layer = jnp.abs(x).reshape(x.shape[0], -1).mean(axis=1)
            found |= {f"blocks/{layer}/{rest}": one for layer, one in enumerate(by_layer)}
        else:
            found[name] = jnp.abs(x).mean()
    return found


def summary(result: dict) -> str:
    """The slopes as a table, and the verdict."""
    steps = list(next(iter(result["slopes"].values())))
    shown = [s for s in ("1", "2", "5", steps[-1]) if s in steps]
    shown = list(dict.fromkeys(shown))
    lines = [f"{'slope of mean |x| at step':<28}" + "".join(f"{s:>16}" for s in shown)]
    for name, by_step in result["slopes"].items():
        lines.append(f"{name:<28}" + "".join(f"{_cell(by_step[s]):>16}" for s in shown))
    lines.append("passed" if result["passed"] else f"{len(result['failures'])} out of bounds")
    for kind, found in result.get("predicted", {}).items():
        word = "shown, as predicted" if found["shown"] else "NOT shown"
        slope = "none" if found["slope"] is None else f"{found['slope']:+.2f}"
        lines.append(f"{kind}: slope {slope}, predicted beyond {found['beyond']:+}: {word}")
    return "\n".join(lines)


def _cell(entry: dict) -> str:
    if entry["slope"] is None:
        return "-"
    error = "" if entry["se"] is None else f" ± {entry['se']:.2f}"
    return f"{entry['slope']:+.2f}{error}"
