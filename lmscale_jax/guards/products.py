"""Counts the FLOPs of the products in a traced program, by its equations."""

import math

from jax.extend import core


def product_flops(jaxpr) -> float:
    """Sums the FLOPs of all products and convolutions; multiply and add count as two.

    A loop of known length counts its body so often, a `while` once, a `cond` its dearest branch.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
    name, shapes = equation.primitive.name, [getattr(v.aval, "shape", ()) for v in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(shapes[0][axis] for axis in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1]) / features
    inside = [product_flops(jaxpr) for jaxpr in _jaxprs(equation.params)]
    if name == "cond":
        return max(inside)
    return sum(inside) * (equation.params["length"] if name == "scan" else 1)


def _jaxprs(params: dict) -> list:
    """Lists the programs that an equation contains."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    closed = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, core.Jaxpr)]
