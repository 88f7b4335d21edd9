"""Counts the matmul FLOPs and the equations of a traced program."""

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of the matmuls and convolutions of a jaxpr over all devices, 2 per multiply-add.

    A scan counts as often as it runs, a `while` once; of a `cond` the cheaper branch counts, so
    that what only some steps do, such as logged statistics, is left out. Inside a shard_map shapes
    are one device's, so its FLOPs count once for each; a Pallas kernel's for each of its blocks.
    """
    total = 0
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                left = eqn.invars[0].aval.shape
                depth = math.prod(left[axis] for axis in contracted)
                total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
            case "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape
                spec = eqn.params["dimension_numbers"].rhs_spec
                inputs = math.prod(kernel) // kernel[spec[0]]
                dilation = math.prod(eqn.params["lhs_dilation"])
                total += 2 * inputs * math.prod(eqn.outvars[0].aval.shape) // dilation
            case "scan":
                total += eqn.params["length"] * matmul_flops(eqn.params["jaxpr"].jaxpr)
            case "cond":
                total += min(matmul_flops(branch.jaxpr) for branch in eqn.params["branches"])
            case "pallas_call":
                grid = eqn.params["grid_mapping"].grid
                total += math.prod(grid) * matmul_flops(eqn.params["jaxpr"])
            case "shard_map":
                total += eqn.params["mesh"].size * matmul_flops(eqn.params["jaxpr"])
            case _:
                total += sum(map(matmul_flops, _inner(eqn.params)))
    return total


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of all that it holds; bodies of loops once."""
    total = 0
    for eqn in jaxpr.eqns:
        branches = eqn.params.get("branches", ())
        total += 1 + sum(map(equations, _inner(eqn.params)))
        total += sum(equations(branch.jaxpr) for branch in branches)
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation that runs them once, such as jit."""
    found = []
    for name, value in params.items():
        if "transpose" in name or "jvp" in name or name == "cond_jaxpr":
            continue  # rules of derivatives, and the test of a loop
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            found.append(value)
    return found
