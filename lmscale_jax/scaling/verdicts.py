"""Decides what a comparison of two arms may say, from its tests and checks."""

from dataclasses import dataclass

import numpy as np

from lmscale_jax.scaling.shift import ShiftEstimate

EXPONENT, CHANGES, OFFSET = "exponent shift", "changes with scale", "constant offset"
NOTHING, UNDETERMINED = "no detectable difference", "undetermined"
# Of the smallest effects that are called detectable.
POWER = 0.8
# Share of the effect that matters below which a check's s contradicts nothing.
SMALL = 0.25


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on.

    Attributes:
        checks: as `judge_checks` returns them.
        effect: smallest relative change of the exponent that matters.
        p_wild: of s = 0 by the wild bootstrap, or None.
        nested: of `second_views.nested_laws`, or None.
        c_range: smallest and largest FLOPs of the runs.
        obstacle: why these runs cannot show that a factor is constant, or None.
    """

    arms: tuple[str, str]
    main: ShiftEstimate
    checks: list[dict]
    level: float
    effect: float
    p_wild: float | None
    nested: dict | None
    c_range: tuple[float, float]
    obstacle: str | None

    @property
    def finding(self) -> str:
        """Words s with its interval and both p."""
        main = self.main
        low, high = main.interval(self.level)
        return (
            f"the compute factor goes as C^{main.s:+.3f} ({100 * self.level:g} % interval "
            f"{low:+.3f} to {high:+.3f}; p = {main.p:.2g}, of any difference {main.p_both:.2g})"
        )

    @property
    def factor(self) -> str:
        """Words k at the middle of the compute."""
        k, low, high = (np.exp(v) for v in self.main.log_gain(np.array(0.0), self.level))
        return f"{k:.3g} ({low:.3g} to {high:.3g})"


def smallest_shift(main: ShiftEstimate, level: float) -> float:
    """Computes the smallest |s| that the test detects with a power of 80 %."""
    return _quantiles(main, level) * main.se


def smallest_offset(main: ShiftEstimate, level: float) -> float:
    """Computes the smallest |k - 1| of a constant factor that is detected with 80 % power."""
    return float(np.expm1(_quantiles(main, level) * np.sqrt(main.covariance[-2, -2])))


def _quantiles(main: ShiftEstimate, level: float) -> float:
    from scipy.stats import t

    return main.t(level) + float(t.ppf(POWER, main.degrees))


def is_change(main: ShiftEstimate, level: float) -> bool:
    """Tells whether s differs from 0, where s and tau share one level.

    Closed testing (Marcus et al. 1976): s alone is tested only if s = tau = 0 is rejected, so that
    equal arms get any claim in at most 1 - level of the cases.
    """
    return main.p_both < 1 - level and main.p < 1 - level


def judge_checks(
    refits: dict, floors: list[dict] | None, main: ShiftEstimate, level: float, effect: float
) -> list[dict]:
    """Compares each refit with what the main estimate says about s.

    A check `holds` if it agrees with that. If s is significant, it keeps its sign, and is
    significant too where its standard error allows it. If s is not significant, neither is any
    check's at the level that all checks share, unless it is far below `effect`: curves miss even
    losses without noise by a little. A check over floors is the least favourable one.
    """
    alpha, count = 1 - level, len(refits) + bool(floors)
    rows = [
        {"check": name, "s": r.s, "se": r.se, "p": r.p,
         "weak": smallest_shift(r, level) > abs(main.s)}
        for name, r in refits.items()
    ]  # fmt: skip
    change = is_change(main, level)
    if floors:
        # The floor most opposed to a change; or the one most compatible with none.
        worst = min(floors, key=lambda f: f["s"] * np.sign(main.s) if change else -f["p"])
        name = f"floors from {floors[0]['E']:.3g} to {floors[-1]['E']:.3g}"
        rows.append({"check": name} | {k: worst[k] for k in ("s", "se", "p")} | {"weak": True})
    for row in rows:
        weak = row.pop("weak")
        if change:
            row["holds"] = row["s"] * main.s > 0 and (weak or row["p"] < 2 * alpha)
            row["claim"] = "s has the same sign"
        else:
            row["holds"] = row["p"] >= alpha / count or abs(row["s"]) < SMALL * effect
            row["claim"] = "s does not differ from 0"
        row["holds"] = bool(row["holds"])
    return rows


def decide(e: Evidence) -> tuple[str, str]:
    """Decides the verdict and the sentence that gives the reason."""
    alpha, main = 1 - e.level, e.main
    failed = [c["check"] for c in e.checks if not c["holds"]]
    if is_change(main, e.level):
        if not failed and (e.p_wild is None or e.p_wild < 2 * alpha):
            return _change(e)
        why = ", ".join(failed) or f"the bootstrap (p = {e.p_wild:.2g})"
        return UNDETERMINED, f"{e.finding}, but not every check agrees: not {why}"
    detectable = smallest_shift(main, e.level)
    if detectable > e.effect:
        return UNDETERMINED, (
            f"{e.finding}; these runs can detect a shift of {detectable:.2g} or more, but not the "
            f"requested {e.effect:.2g}; next_runs lists runs that can"
        )
    if e.obstacle or failed:
        why = e.obstacle or f"s is not 0 by {', '.join(failed)}"
        return UNDETERMINED, f"{e.finding}, but {why}, so no scale speaks for another"
    _, low, high = main.log_gain(np.array(0.0), e.level)
    if main.p_both < alpha and (low > 0 or high < 0):
        return OFFSET, (
            f"{e.arms[0]} needs {e.factor} times the compute of {e.arms[1]} at every scale from "
            f"{e.c_range[0]:.2g} to {e.c_range[1]:.2g} FLOPs; {e.finding}, and a shift of "
            f"{detectable:.2g} would have been detected"
        )
    return NOTHING, (
        f"compute factor {e.factor} and {e.finding}; a shift of {detectable:.2g} and a factor of "
        f"{1 + smallest_offset(main, e.level):.3g} would have been detected"
    )


def _change(e: Evidence) -> tuple[str, str]:
    """Words a change with scale: an exponent shift only where a difference of floors is not one."""
    gains = f"{e.arms[1]} {'gains' if e.main.s > 0 else 'loses'} with scale: {e.finding}"
    if e.nested is None:
        return CHANGES, (
            f"{gains}, and every check agrees; it is the exponent or the floor, and these cells "
            "are too few to tell which"
        )
    models, reading = e.nested["models"], e.nested["reading"]
    if "floors" not in models:
        return EXPONENT, f"{gains}, and every check agrees; the floor is pinned in both arms"
    aicc = {k: v["aicc"] for k, v in models.items()}
    gap = abs(aicc["floors"] - aicc["exponents"])
    likelier = "exponents" if aicc["exponents"] < aicc["floors"] else "floors"
    compared = f"AICc is {gap:.1f} lower with different {likelier}"
    if reading == "exponents":
        return EXPONENT, f"{gains}, and every check agrees; it is the exponent: {compared}"
    if reading == "floors":
        return CHANGES, f"{gains}, and every check agrees; it is the floor: {compared}"
    return CHANGES, (
        f"{gains}, and every check agrees; it is the exponent or the floor: {compared}, which does "
        "not decide it"
    )
