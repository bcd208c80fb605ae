"""Runs a coordinate check: how the size of each activation grows with the size of the model.

Every size trains on one batch, as one compiled program: a vmap over seeds of a scan over steps.
Protocol: Yang et al. 2022 (arXiv 2203.03466, appendix D.1) and nanoGPT-mup.
"""

import json
import statistics
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
from lmscale_jax.model.param import named
from lmscale_jax.model.parametrization import CONTROLS, scheme_of
from lmscale_jax.model.sizes import at_size, with_mistake
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
        if "blocks/" not in name:
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
    """Measures the mean |x| of every activation and of its change since step 1.

    Step t is measured with the parameters of t - 1 updates, without dropout; nan after a step whose
    loss or gradient was not finite.

    Args:
      setup: on one device.
      batch: the `Batch` that every step repeats.
      seeds: of the initial parameters.
      steps: to take; 0: those of the config.

    Returns {tensor: [steps, seeds]}, named as in `Model.taps` with block l as "blocks/l/name", and
    "loss".
    """
    run = jax.jit(jax.vmap(lambda seed: _trajectory(setup, batch, seed, steps), out_axes=1))
    return {name: np.asarray(x, np.float64) for name, x in run(np.asarray(seeds)).items()}


def _trajectory(setup: Setup, batch, seed, steps: int) -> dict[str, jax.Array]:
    """Trains one seed and returns {tensor: [steps]}."""
    start, train_step = setup.initial(seed), setup.train_step()

    def taps(state):
        keep = lambda _, x: x.astype(jnp.float32)  # noqa: E731
        return setup.model.taps(state.params, batch.tokens_BxT, keep, state.step)

    first = taps(start)

    def step(state, _):
        current = taps(state)
        changes = _mean_sizes(jax.tree.map(jnp.subtract, current, first))
        sizes = _mean_sizes(current) | {CHANGE + name: x for name, x in changes.items()}
        sizes = {name: jnp.where(state.skipped > 0, jnp.nan, x) for name, x in sizes.items()}
        state, metrics = train_step(state, batch, {"seed": seed})
        return state, sizes | {"loss": metrics["train_loss"]}

    return jax.lax.scan(step, start, length=steps or setup.config.train.steps)[1]


def _mean_sizes(taps: dict) -> dict[str, jax.Array]:
    """Computes the mean |x| of every tap, for each block separately."""
    sizes = {}
    for name, x in named(taps).items():
        group, _, tensor = name.partition("/")
        if group == "blocks":
            size_L = jnp.abs(x).reshape(x.shape[0], -1).mean(axis=1)
            sizes |= {f"blocks/{layer}/{tensor}": size for layer, size in enumerate(size_L)}
        else:
            sizes[name] = jnp.abs(x).mean()
    return sizes


def coordinate_summary(result: dict) -> str:
    """Formats the slopes as a table, and the verdict."""
    steps = list(next(iter(result["slopes"].values())))
    shown = [s for s in ("1", "2", "5", steps[-1]) if s in steps]
    shown = list(dict.fromkeys(shown))
    lines = [f"{'slope of mean |x| at step':<28}" + "".join(f"{s:>16}" for s in shown)]
    for name, by_step in result["slopes"].items():
        lines.append(f"{name:<28}" + "".join(f"{_slope_text(by_step[s]):>16}" for s in shown))
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


# Bounds on |slope| in log-log. "change" is x_t - x_1. It also detects a model that learns too
# little, whose activations stay flat because nothing changes.
THRESHOLDS = {
    "hidden": 0.10,
    "logits": 0.15,
    "change": 0.15,
    "first_step_of_hidden": 2,
    "first_step_of_logits": 5,
    "first_step_of_change": 5,
    "logits_at_step_1": [-0.6, -0.35],
    "scores_over_head_dim": [-0.35, 0.15],
    # Probability that a model whose slopes are all within the bounds fails.
    "level": 0.05,
}
CHANGE = "change/"

# Where each deliberate mistake must show from step 2 on: {ending of a tensor's name: least slope}.
PREDICTED = {
    "sp": {"attention": 0.4, "mlp": 0.4, "logits": 0.4},
} | {name: control.slopes for name, control in CONTROLS.items() if control.slopes}


def coordinate_slopes(sizes, values_WxTxS: np.ndarray) -> list[dict]:
    """Fits {"slope", "se"} of log2(value) against log2(size) at each step; None where a value is 0.

    Args:
      sizes: [W].
      values_WxTxS: by size, step and seed. Seeds are averaged in logs.

    The standard error is the larger of two: that of the line through the W means, so that curvature
    counts as noise, and that of the seeds' spread of the slope.
    """
    n_sizes, _, n_seeds = values_WxTxS.shape
    is_complete_T = (np.isfinite(values_WxTxS) & (values_WxTxS > 0)).all(axis=(0, 2))
    x_W = np.log2(np.asarray(sizes, float))
    dx_W = x_W - x_W.mean()
    y_WxTxS = np.log2(np.where(is_complete_T[:, None], values_WxTxS, 1.0))
    slope_TxS = np.einsum("w,wts->ts", dx_W, y_WxTxS) / (dx_W @ dx_W)
    slope_T, mean_WxT = slope_TxS.mean(axis=1), y_WxTxS.mean(axis=2)
    residual_WxT = mean_WxT - mean_WxT.mean(axis=0) - dx_W[:, None] * slope_T
    variance_T = np.square(residual_WxT).sum(axis=0) / max(1, n_sizes - 2) / (dx_W @ dx_W)
    if n_seeds > 1:
        variance_T = np.maximum(variance_T, slope_TxS.var(axis=1, ddof=1) / n_seeds)
    return [
        {"slope": float(slope), "se": float(np.sqrt(variance))}
        if is_complete
        else {"slope": None, "se": None}
        for slope, variance, is_complete in zip(slope_T, variance_T, is_complete_T, strict=True)
    ]


def slope_table(sizes, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, dict]]:
    """Fits {tensor: {step: {"slope", "se"}}}, steps from "1"; `tensors` has [W, T, S] arrays."""
    return {
        name: {str(t): slope for t, slope in enumerate(coordinate_slopes(sizes, values), 1)}
        for name, values in tensors.items()
    }


def slope_bound(tensor: str, step: int, sweep: str) -> tuple[float, float] | None:
    """Returns the interval of a correct slope; None where theory does not predict it.

    At step 1 the logits of a nonzero readout fall as width^-1/2. For some steps, until the learned
    part dominates, their slope is between that and 0, and is not judged. The same holds for
    attention scores where heads grow, while queries and keys are little aligned; a scale of
    1 / sqrt(head_dim) in place of 1 / head_dim exceeds the interval.
    """
    kind = tensor.removeprefix(CHANGE)
    if sweep == "head_dim" and kind.endswith("scores"):
        if step == 1:
            return tuple(THRESHOLDS["logits_at_step_1"]) if tensor == kind else None
        judged = tensor == kind or step >= THRESHOLDS["first_step_of_change"]
        return tuple(THRESHOLDS["scores_over_head_dim"]) if judged else None
    if tensor.startswith(CHANGE):
        bound, first = THRESHOLDS["change"], THRESHOLDS["first_step_of_change"]
    else:
        large = kind == "logits" or kind.endswith("scores")
        bound = THRESHOLDS["logits" if large else "hidden"]
        first = THRESHOLDS[f"first_step_of_{'logits' if kind == 'logits' else 'hidden'}"]
    if step == 1 and kind == "logits" and tensor == kind and sweep == "width":
        return tuple(THRESHOLDS["logits_at_step_1"])
    return None if step < first else (-bound, bound)


def slope_failures(slopes: dict[str, dict[str, dict]], sweep: str = "width") -> list[dict]:
    """Lists every slope out of its interval or missing, steepest first.

    At step 1 a slope may be missing, because a readout that begins at zero has no size there. A
    slope is "certain" to be out where it is missing, or out by so many errors that one of all the
    judged slopes is at probability THRESHOLDS["level"] at most (Bonferroni). The error is that of
    the noisiest tensor, over its steps: a few seeds and sizes tell little of each tensor's own.
    """
    failures, squared_errors = [], {}
    for tensor, steps in slopes.items():
        for step, entry in steps.items():
            interval = slope_bound(tensor, int(step), sweep)
            if interval is None or (entry["slope"] is None and step == "1"):
                continue
            slope = entry["slope"]
            squared_errors.setdefault(tensor, []).append((entry["se"] or 0.0) ** 2)
            excess = np.inf if slope is None else max(interval[0] - slope, slope - interval[1])
            if excess > 0:
                failures.append({
                    "tensor": tensor, "step": int(step), "slope": slope, "bounds": list(interval),
                    "se": entry["se"], "excess": None if slope is None else excess,
                })  # fmt: skip
    error = (
        max((float(np.mean(squares)) for squares in squared_errors.values()), default=0.0) ** 0.5
    )
    n_judged = max(1, sum(map(len, squared_errors.values())))
    margin = error * statistics.NormalDist().inv_cdf(1 - THRESHOLDS["level"] / n_judged)
    for failure in failures:
        excess = failure.pop("excess")
        failure["certain"] = bool(excess is None or excess > margin)
    return sorted(failures, key=lambda f: -np.inf if f["slope"] is None else -abs(f["slope"]))


def coordinate_verdict(failures: list[dict]) -> str:
    """Judges a check by `slope_failures`: "passed", "failed" or "undetermined".

    It is undetermined where slopes are out of their intervals by less than their errors.
    """
    if any(failure["certain"] for failure in failures):
        return "failed"
    return "undetermined" if failures else "passed"


def compare_with_prediction(slopes: dict[str, dict[str, dict]], control: str) -> dict[str, dict]:
    """Finds the steepest slope of each kind from step 2 on: {kind: {"slope", "beyond", "shown"}}.

    All steps count, because growth saturates once the repeated batch is memorized.
    """
    checks = {}
    for kind, beyond in PREDICTED[control].items():
        values = [
            entry["slope"]
            for tensor, steps in slopes.items()
            for step, entry in steps.items()
            if tensor.endswith(kind) and not tensor.startswith(CHANGE) and int(step) >= 2
        ]
        has_diverged = any(v is None for v in values)
        steepest = max((v for v in values if v is not None), default=None)
        shown = has_diverged or (steepest is not None and steepest > beyond)
        checks[kind] = {"slope": steepest, "beyond": beyond, "shown": bool(shown)}
    return checks
