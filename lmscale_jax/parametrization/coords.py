"""The coordinate check: how the size of each activation grows with the size of the model.

Protocol: Yang et al. 2022 (arXiv 2203.03466, appendix D.1) and nanoGPT-mup. Works on recorded
numbers only.
"""

import numpy as np

from lmscale_jax.parametrization.schemes import CONTROLS

# Bounds on |slope| in log-log. "change" is x_t - x_1, which also shows a model that learns too
# little: there activations stay flat because nothing moves.
THRESHOLDS = {
    "hidden": 0.10,
    "logits": 0.15,
    "change": 0.15,
    "first_step_of_hidden": 2,
    "first_step_of_logits": 5,
    "first_step_of_change": 5,
    "logits_at_step_1": [-0.6, -0.35],
    "scores_over_head_dim": [-0.35, 0.15],
}
CHANGE = "change/"

# Where each deliberate mistake must show from step 2 on: {how a tensor's name ends: slope beyond}.
PREDICTED = {
    "sp": {"attention": 0.4, "mlp": 0.4, "logits": 0.4},
} | {name: control.slopes for name, control in CONTROLS.items() if control.slopes}


def slopes(sizes, values_WxTxS: np.ndarray) -> list[dict]:
    """For each step {"slope", "se"} of log2(value) against log2(size); None where a value is 0.

    Args:
      sizes: [W].
      values_WxTxS: by size, step and seed; seeds are averaged in logs, and the standard error is
        that of the line through the W means, so curvature counts as noise.
    """
    x_W = np.log2(np.asarray(sizes, float))
    found = []
    for values_WxS in np.moveaxis(values_WxTxS, 1, 0):
        if not (np.isfinite(values_WxS).all() and (values_WxS > 0).all()):
            found.append({"slope": None, "se": None})
            continue
        y_W = np.log2(values_WxS).mean(axis=1)
        dx_W = x_W - x_W.mean()
        slope = float(dx_W @ y_W / (dx_W @ dx_W))
        rest_W = y_W - y_W.mean() - slope * dx_W
        freedom = len(x_W) - 2
        se = float(np.sqrt(rest_W @ rest_W / freedom / (dx_W @ dx_W))) if freedom > 0 else None
        found.append({"slope": slope, "se": se})
    return found


def table(sizes, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, dict]]:
    """{tensor: {step: {"slope", "se"}}}, steps from "1"; `tensors` holds [W, T, S] arrays."""
    return {
        name: {str(t): found for t, found in enumerate(slopes(sizes, values), 1)}
        for name, values in tensors.items()
    }


def bound(tensor: str, step: int, sweep: str) -> tuple[float, float] | None:
    """The interval in which a slope must lie; None where theory promises nothing.

    At step 1 the logits of a readout that is not zero fall as width^-1/2 and are judged by that;
    until what was learned outgrows them, for some steps, they lie between the two. So do attention
    scores where heads grow, for as long as queries and keys are little aligned; a scale of
    1 / sqrt(head_dim) in place of 1 / head_dim shows above.
    """
    kind = tensor.removeprefix(CHANGE)
    if sweep == "head_dim" and kind.endswith("scores"):
        if step == 1:
            return tuple(THRESHOLDS["logits_at_step_1"]) if tensor == kind else None
        late = step >= THRESHOLDS["first_step_of_change"]
        return tuple(THRESHOLDS["scores_over_head_dim"]) if late or tensor == kind else None
    if tensor.startswith(CHANGE):
        ok, first = THRESHOLDS["change"], THRESHOLDS["first_step_of_change"]
    else:
        large = kind == "logits" or kind.endswith("scores")
        ok = THRESHOLDS["logits" if large else "hidden"]
        first = THRESHOLDS[f"first_step_of_{'logits' if kind == 'logits' else 'hidden'}"]
    if step == 1 and kind == "logits" and tensor == kind and sweep == "width":
        return tuple(THRESHOLDS["logits_at_step_1"])
    return None if step < first else (-ok, ok)


def failures(found: dict[str, dict[str, dict]], sweep: str = "width") -> list[dict]:
    """Every slope out of its interval, worst first; a slope that does not exist is one.

    Only at step 1 may it be missing: a readout that begins at zero has no size there.
    """
    out = []
    for tensor, steps in found.items():
        for step, entry in steps.items():
            interval = bound(tensor, int(step), sweep)
            if interval is None or (entry["slope"] is None and step == "1"):
                continue
            slope = entry["slope"]
            excess = np.inf if slope is None else max(interval[0] - slope, slope - interval[1])
            if excess > 0:
                out.append({
                    "tensor": tensor, "step": int(step), "slope": slope, "bounds": list(interval),
                })  # fmt: skip
    centre = {id(f): np.inf if f["slope"] is None else abs(f["slope"]) for f in out}
    return sorted(out, key=lambda f: -centre[id(f)])


def as_predicted(found: dict[str, dict[str, dict]], control: str) -> dict[str, dict]:
    """{kind: {"slope", "beyond", "shown"}}: the steepest slope of each kind at any step from 2.

    Not of the last step alone: once the repeated batch is learnt by heart, growth saturates.
    """
    out = {}
    for kind, beyond in PREDICTED[control].items():
        values = [
            entry["slope"]
            for tensor, steps in found.items()
            for step, entry in steps.items()
            if tensor.endswith(kind) and not tensor.startswith(CHANGE) and int(step) >= 2
        ]
        blown_up = any(v is None for v in values)
        steepest = max((v for v in values if v is not None), default=None)
        shown = blown_up or (steepest is not None and steepest > beyond)
        out[kind] = {"slope": steepest, "beyond": beyond, "shown": bool(shown)}
    return out
