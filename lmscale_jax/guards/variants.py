"""Guards: another way to compute the same step gives the same loss and gradients.

Over several devices, in micro-batches, as a scan, with rematerialization. All ways of a guard are
tried as one program first. Only where that differs is each tried alone, to name it.
"""

from typing import NamedTuple

import jax

from lmscale_jax.config.keys import is_used
from lmscale_jax.errors import InputError
from lmscale_jax.guards.arm import Finding, Gradient, SmallArm, norm_ratio
from lmscale_jax.mur.settings import MODES

# Relative differences: several times the rounding of sums in another order.
LOSS, GRADIENT = 2e-5, 2e-3
# A parameter whose gradient is this small a part of the whole is rounding, as a key's bias.
NEGLIGIBLE = 1e-5
SIMULATED = 8


class Way(NamedTuple):
    """Another way to compute a step.

    Attributes:
      name: in a message.
      changes: of the config.
      n_devices: that it takes.
      remedy: what to look for where it differs.
    """

    name: str
    changes: dict
    n_devices: int
    remedy: str


_LAYOUT = (
    "flat tokens of one device are consecutive: use context.unflatten(x) and context.flatten(y), "
    "not reshape, to move between [N, D] and [B, T, D]"
)
_SUMS = "sums and products over split channels go through Dense, or context.sharding.bind"
MESHES = (
    Way("mesh.data=2", {"mesh.data": 2}, 2, "statistics over a batch must be of one row"),
    Way("mesh.fsdp=2", {"mesh.data": 1, "mesh.fsdp": 2}, 2, _SUMS),
    Way("mesh.tensor=2", {"mesh.data": 1, "mesh.tensor": 2}, 2, _SUMS),
    Way("mesh.sequence=2", {"mesh.data": 1, "mesh.sequence": 2}, 2, _LAYOUT),
)
ACCUM = Way(
    "train.accum=2",
    {"train.accum": 2},
    1,
    "a loss is a sum over tokens, divided once by those of the whole batch; a term says PER = "
    "'token' or 'batch', and divides by no train.accum",
)
_TRACED = "the number of a block may be traced: no Python `if`, list or dict by it"
SCANS = (
    Way("model.stack='scan'", {"model.stack": "scan"}, 1, _TRACED),
    Way("model.remat='block'", {"model.remat": "block"}, 1, "a block is a pure function"),
)


def check_devices(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Compares one device with data, fsdp, tensor and sequence of two on simulated ones."""
    ways = list(MESHES)
    if is_used(arm.exact, "mur.metric"):
        ways = ways[:-1]
    n_axes = 2 ** (len(ways) - 1)
    if len(jax.devices("cpu")) < n_axes:
        return Finding(
            skipped=f"this process has {len(jax.devices('cpu'))} device(s), not {n_axes}; "
            f"python -m lmscale_jax.check simulates them"
        )
    axes = {"mesh.data": 1} | {path: 2 for way in ways[1:] for path in list(way.changes)[1:]}
    return _compare(arm, Way("", axes, n_axes, ""), ways)


def check_accumulation(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Compares the batch in one piece with two micro-batches."""
    if MODES[arm.exact.mur.mode].acts:
        return Finding(skipped="mur.* are defined by the micro-batch")
    return _compare(arm, _together(arm), [ACCUM])


def check_stack(arm: SmallArm, baseline: SmallArm | None) -> Finding:
    """Compares unrolled blocks with a scan that recomputes them."""
    return _compare(arm, _together(arm), list(SCANS))


def _together(arm: SmallArm) -> Way:
    """Returns the ways of one device as one, so that two guards share a program."""
    ways = [*SCANS, *([] if MODES[arm.exact.mur.mode].acts else [ACCUM])]
    changes = {path: value for way in ways for path, value in way.changes.items()}
    return Way("", changes, 1, "")


def _compare(arm: SmallArm, together: Way, ways: list[Way]) -> Finding:
    plain = arm.gradient()
    if _difference(arm, plain, together) is None:
        return Finding(note=", ".join(way.name for way in ways))
    for way in ways:
        if text := _difference(arm, plain, way):
            return Finding(f"{text}; {way.remedy}")
    return Finding(note=", ".join(way.name for way in ways))


def _difference(arm: SmallArm, plain: Gradient, way: Way) -> str | None:
    """Returns in words how a way differs; None: it does not."""
    try:
        other = arm.gradient(way.changes, way.n_devices)
    except InputError:
        raise
    except Exception as error:
        return f"under {way.name} it does not compile ({arm.describe_error(error)})"
    if abs(other.loss / plain.loss - 1) > LOSS:
        return f"under {way.name} the loss is {other.loss:.5g}, alone {plain.loss:.5g}"
    whole = sum(float((g**2).sum()) for g in plain.grads.values()) ** 0.5
    for path, grad in plain.grads.items():
        size = float((grad**2).sum()) ** 0.5
        ratio = norm_ratio(other.grads[path], grad)
        if size > NEGLIGIBLE * whole and not ratio < GRADIENT:
            return f"under {way.name} the gradient of {path} differs by {ratio:.2g} of its size"
    return None
