"""Fits the slopes of a coordinate check over size, and judges them."""

import statistics

import numpy as np

from lmscale_jax.model.parametrization import CONTROLS

# Bounds on |slope| in log-log. "change" is x_t - x_1. It also detects a model that learns too
# little, whose activations stay flat because nothing changes. "update" is over the learning rate;
# later, when the batch is learnt by heart, what is left of gradients is noise.
THRESHOLDS = {
    "hidden": 0.10,
    "logits": 0.15,
    "change": 0.15,
    "update": 0.15,
    "first_step_of_hidden": 2,
    "first_step_of_logits": 5,
    "first_step_of_change": 5,
    "last_step_of_update": 5,
    "logits_at_step_1": [-0.6, -0.35],
    "scores_over_head_dim": [-0.35, 0.15],
    # Probability that a model whose slopes are all within the bounds fails.
    "level": 0.05,
}
CHANGE, UPDATE = "change/", "update/"

# Where each deliberate mistake must show from step 2 on: {ending of a tensor's name: slope beyond
# which one is}, on that side of 0.
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
    if tensor.startswith(UPDATE):
        judged = step <= THRESHOLDS["last_step_of_update"]
        return (-THRESHOLDS["update"], THRESHOLDS["update"]) if judged else None
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
    the noisiest activation, or of the noisiest update, over its steps: a few seeds and sizes tell
    little of each tensor's own.
    """
    failures, squared_errors = [], {True: {}, False: {}}
    for tensor, steps in slopes.items():
        for step, entry in steps.items():
            interval = slope_bound(tensor, int(step), sweep)
            if interval is None or (entry["slope"] is None and step == "1"):
                continue
            slope = entry["slope"]
            squares = squared_errors[tensor.startswith(UPDATE)].setdefault(tensor, [])
            squares.append((entry["se"] or 0.0) ** 2)
            excess = np.inf if slope is None else max(interval[0] - slope, slope - interval[1])
            if excess > 0:
                failures.append({
                    "tensor": tensor, "step": int(step), "slope": slope, "bounds": list(interval),
                    "se": entry["se"], "excess": None if slope is None else excess,
                })  # fmt: skip
    n_judged = max(
        1, sum(len(squares) for of in squared_errors.values() for squares in of.values())
    )
    errors_allowed = statistics.NormalDist().inv_cdf(1 - THRESHOLDS["level"] / n_judged)
    margins = {
        kind: errors_allowed * max(map(np.mean, of.values()), default=0.0) ** 0.5
        for kind, of in squared_errors.items()
    }
    for failure in failures:
        excess, margin = failure.pop("excess"), margins[failure["tensor"].startswith(UPDATE)]
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
        side = np.sign(beyond)
        steepest = max((v for v in values if v is not None), key=lambda v: side * v, default=None)
        shown = has_diverged or (steepest is not None and side * steepest > side * beyond)
        checks[kind] = {"slope": steepest, "beyond": beyond, "shown": bool(shown)}
    return checks
