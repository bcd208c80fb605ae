"""Runs a coordinate check: how activations and updates grow with the size of the model.

Every size trains on one batch, as one compiled program: a vmap over seeds of a scan over steps.
Protocol: Yang et al. 2022 (arXiv 2203.03466, appendix D.1) and nanoGPT-mup.
"""

import functools
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
from lmscale_jax.data import batches, prepare
from lmscale_jax.errors import InputError
from lmscale_jax.files import plain_values, write_json
from lmscale_jax.model.mesh import one_device_mesh
from lmscale_jax.model.param import named, row_layers
from lmscale_jax.model.parametrization import scheme_of
from lmscale_jax.model.sizes import at_size, with_mistake
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import update_rules
from lmscale_jax.sweeps.slopes import (
    CHANGE,
    THRESHOLDS,
    UPDATE,
    compare_with_prediction,
    coordinate_verdict,
    slope_failures,
    slope_table,
)
from lmscale_jax.train import run_dir
from lmscale_jax.train.setup import Setup, build_setup


class SizeSweep(NamedTuple):
    """A model at several sizes.

    Attributes:
      sweep: the dimension that grows: "width", "head_dim" or "depth".
      sizes: its values, rising.
      configs: one for each size, not yet resolved.
      control: the deliberate mistake in them, or "none".
    """

    sweep: str
    sizes: list[int]
    configs: list[ConfigDict]
    control: str


def plan_sizes(
    config: ConfigDict, sweep: str, sizes: list[int], control: str = "none"
) -> SizeSweep:
    """Makes the configs of a sweep. Raises InputError where a size is impossible."""
    validate(config)
    if sweep == "depth" and scheme_of(config).has_base and not scheme_of(config).follows_depth:
        raise InputError(
            f"config.parametrization.name={config.parametrization.name!r} does not scale with "
            "depth; use --config.parametrization.name=completep with base_depth=2"
        )
    if sweep == "depth" and config.model.attention_skip:
        raise InputError(
            f"config.model.attention_skip={config.model.attention_skip!r} does not support a sweep "
            f"over depth, whose blocks are alike; use ''"
        )
    configs = [at_size(config, sweep, size) for size in sizes]
    for size_config in configs:
        with_mistake(size_config.parametrization, control)
        validate(size_config)
    return SizeSweep(sweep, sizes, configs, control)


def check_coordinates(
    plan: SizeSweep, n_seeds: int, workdir: Path, say: Callable[[str], None]
) -> dict:
    """Measures every size, judges the slopes and writes coord_check.json.

    Raises InputError where `workdir` holds another check.
    """
    question = {
        "sweep": plan.sweep,
        "sizes": plan.sizes,
        "control": plan.control,
        "seeds": n_seeds,
        "config": plan.configs[0].to_dict(),
    }
    _refuse_another(workdir, question)
    first = plan.configs[0]
    data = prepare.prepare_data(first.data, first.model.vocab_size, say)
    tensors: dict[str, list] = {}
    for size, config in zip(plan.sizes, plan.configs, strict=True):
        begin = time.perf_counter()
        config = resolve(config, data.vocab_size)
        setup = build_setup(config, data.boundary, one_device_mesh())
        batch = batches.TrainBatches(
            data, config.data.seq_len, config.train.batch_size, config.data.seed
        ).at(0)
        sizes = measure_coordinates(setup, batch, list(range(n_seeds)))
        if plan.sweep == "depth":
            sizes = _stack_ends(sizes, config.model.n_layers)
        for name, values in sizes.items():
            tensors.setdefault(name, []).append(values)
        say(f"{plan.sweep} {size}: {time.perf_counter() - begin:.1f} s")
    shared = {name: np.stack(v) for name, v in tensors.items()}
    losses = shared.pop("loss")
    slopes = slope_table(plan.sizes, shared)
    failures = slope_failures(slopes, plan.sweep)
    verdict = coordinate_verdict(failures)
    result = question | {
        "verdict": verdict,
        "passed": verdict == "passed",
        "thresholds": THRESHOLDS,
        "failures": failures,
        "slopes": slopes,
        "values": {name: values.mean(axis=2).tolist() for name, values in shared.items()},
        "losses": losses.mean(axis=2).tolist(),
        "versions": run_dir.provenance()["versions"],
    }
    if plan.control != "none":
        result["predicted"] = compare_with_prediction(slopes, plan.control)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "coord_check.json", result)
    say(coordinate_summary(result))
    return result


def _stack_ends(tensors: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Selects the tensors that every depth has; the last block's are named "blocks/last/name".

    The other blocks are at another fraction of the depth in every model.
    """
    last, common = f"blocks/{n_layers - 1}/", {}
    for name, values in tensors.items():
        if "blocks/" not in name or name.startswith(UPDATE):
            common[name] = values
        elif last in name:
            common[name.replace(last, "blocks/last/")] = values
    return common


def _refuse_another(workdir: Path, question: dict) -> None:
    path = workdir / "coord_check.json"
    if not path.exists():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name, value in plain_values(question).items():
        if earlier.get(name) != value:
            raise InputError(
                f"--workdir={workdir} holds a check of another {name}; use a new --workdir"
            )


def measure_coordinates(
    setup: Setup, batch, seeds: list[int], steps: int = 0
) -> dict[str, np.ndarray]:
    """Measures activations, their changes since step 1, and updates.

    Of activations and changes it is the mean |x|, of updates the root mean square over the
    parameter's learning-rate factor. Step t is measured with the parameters of t - 1 updates,
    without dropout; nan after a step whose loss or gradient was not finite. Updates are those of
    parameters whose optimizer has an epsilon, which must follow their gradients' size; numbers for
    each block, as the weights of skips, are left out.

    Args:
      setup: on one device.
      batch: the `Batch` that every step repeats.
      seeds: of the initial parameters.
      steps: to take; 0: those of the config.

    Returns {tensor: [steps, seeds]}, named as in `Model.taps` with block l as "blocks/l/name", as
    "change/" and that, as "update/" and the parameter's path; and "loss".
    """
    run = jax.jit(jax.vmap(lambda seed: _trajectory(setup, batch, seed, steps), out_axes=1))
    return {name: np.asarray(x, np.float64) for name, x in run(np.asarray(seeds)).items()}


# Without rotation softmax does not depend on it: its gradients are what rounding leaves.
ROUNDING = "blocks/attention/key/bias"


def _trajectory(setup: Setup, batch, seed, steps: int) -> dict[str, jax.Array]:
    """Trains one seed and returns {tensor: [steps]}."""
    start, train_step = setup.initial(seed), setup.train_step()
    lr_factors = {
        path: rule.lr_factor
        for path, rule in update_rules(setup.model.param_rules, setup.config).items()
        if OPTIMIZERS[rule.optimizer].divides_by_eps
        and rule.spec.role != "scalar"
        and path != ROUNDING
    }

    def taps(state):
        keep = lambda _, x: x.astype(jnp.float32)  # noqa: E731
        return setup.model.taps(state.params, batch.tokens_BxT, keep, state.step)

    mean_sizes = functools.partial(_mean_sizes, setup.model.specs["blocks"])
    first = taps(start)

    def step(state, _):
        current = taps(state)
        changes = mean_sizes(jax.tree.map(jnp.subtract, current, first))
        sizes = mean_sizes(current) | {CHANGE + name: x for name, x in changes.items()}
        new_state, metrics = train_step(state, batch, {"seed": seed})
        old, new = named(state.params), named(new_state.params)
        for path, lr_factor in lr_factors.items():
            rms = jnp.sqrt(jnp.square(new[path] - old[path]).mean())
            sizes[UPDATE + path] = rms / lr_factor
        sizes = {name: jnp.where(state.skipped > 0, jnp.nan, x) for name, x in sizes.items()}
        return new_state, sizes | {"loss": metrics["train_loss"]}

    return jax.lax.scan(step, start, length=steps or setup.config.train.steps)[1]


def _mean_sizes(specs_blocks: dict, taps: dict) -> dict[str, jax.Array]:
    """Computes the mean |x| of every tap, for each block separately."""
    sizes = {}
    for name, x in named(taps).items():
        group, _, tensor = name.partition("/")
        if group == "blocks":
            layers = row_layers(specs_blocks, len(x))
            size_R = jnp.abs(x).reshape(len(x), -1).mean(axis=1)
            sizes |= {f"blocks/{n}/{tensor}": size for n, size in zip(layers, size_R, strict=True)}
        else:
            sizes[name] = jnp.abs(x).mean()
    return sizes


def coordinate_summary(result: dict) -> str:
    """Formats the slopes as a table, and the verdict."""
    steps = list(next(iter(result["slopes"].values())))
    shown = [s for s in ("1", "2", "5", steps[-1]) if s in steps]
    shown = list(dict.fromkeys(shown))
    lines = [f"{'slope of mean |x| at step':<36}" + "".join(f"{s:>16}" for s in shown)]
    for name, by_step in result["slopes"].items():
        lines.append(f"{name:<36}" + "".join(f"{_slope_text(by_step[s]):>16}" for s in shown))
    out, beyond = len(result["failures"]), sum(f["certain"] for f in result["failures"])
    lines.append({
        "passed": "passed",
        "failed": f"failed: {out} out of bounds, {beyond} of them beyond their error",
        "undetermined": f"undetermined: {out} out of bounds, none of them beyond its error; use "
        f"--seeds={4 * result['seeds']}, or larger and more sizes",
    }[result["verdict"]])  # fmt: skip
    for kind, check in result.get("predicted", {}).items():
        verdict = "shown, as predicted" if check["shown"] else "NOT shown"
        slope = "none" if check["slope"] is None else f"{check['slope']:+.2f}"
        lines.append(f"{kind}: slope {slope}, predicted beyond {check['beyond']:+}: {verdict}")
    return "\n".join(lines)


def _slope_text(entry: dict) -> str:
    if entry["slope"] is None:
        return "-"
    error = "" if entry["se"] is None else f" ± {entry['se']:.2f}"
    return f"{entry['slope']:+.2f}{error}"
