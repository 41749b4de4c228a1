"""Name the activations that models write out.

    x * sigmoid(x)                                            -->  silu(x)
    0.5 * x * (1 + erf(x / sqrt(2)))                          -->  gelu(x)
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3)))  -->  gelu(x, approximate="tanh")

whether the x inside of tanh is factored out, as in x * (1 + 0.044715 * x * x), or not.

Only in fp32 and fp64: in lower precision the written form rounds after every step and the named one does not.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of
from ..compiler.pattern import Pattern, closed, const, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, rewrite

aten = torch.ops.aten

X = tensor("x")
CUBE = op(aten.mul.Tensor, op(aten.pow.Tensor_Scalar, X, 3), const("cubic"))
SQUARE = op(aten.mul.Tensor, X, op(aten.mul.Tensor, X, const("cubic")))
FACTORED = op(aten.mul.Tensor, op(aten.mul.Tensor, X, const("factor")), op(aten.add.Tensor, SQUARE, 1))
TANH = op(aten.tanh.default, op(aten.mul.Tensor, op(aten.add.Tensor, X, CUBE), const("factor")) | FACTORED)
ERF = op(aten.erf.default, op(aten.mul.Tensor, X, const("factor")) | op(aten.div.Tensor, X, const("divisor")))
SILU = closed(op(aten.mul.Tensor, X, op(aten.sigmoid.default, X)))


def half_of(gate: Pattern) -> Pattern:
    """x * (1 + gate) / 2 in the orders of multiplication that are in use."""
    one_plus = op(aten.add.Tensor, gate, 1)
    return (
        op(aten.mul.Tensor, op(aten.mul.Tensor, X, 0.5), one_plus)
        | op(aten.mul.Tensor, op(aten.mul.Tensor, X, one_plus), 0.5)
        | op(aten.mul.Tensor, X, op(aten.mul.Tensor, one_plus, 0.5))
    )


GELU_TANH = closed(half_of(TANH))
GELU = closed(half_of(ERF))


def unfit(match: Match) -> str | None:
    """Why the written form is not the named one up to the last bits; None if it is."""
    if dtype_of(match.root) not in (torch.float32, torch.float64):
        return f"it rounds to {dtype_of(match.root)} after every step"
    for name, expected in (
        ("cubic", 0.044715),
        ("factor", math.sqrt(2 / math.pi) if "cubic" in match else math.sqrt(0.5)),
        ("divisor", math.sqrt(2)),
    ):
        if name in match and not math.isclose(match[name], expected, rel_tol=1e-6):
            return f"a constant is {match[name]}, not {expected}"
    return None


def to_silu(match: Match) -> fx.Node | None:
    if reason := unfit(match):
        return match.decline(reason)
    return match.call(aten.silu.default, match["x"])


def to_gelu(match: Match) -> fx.Node | None:
    if reason := unfit(match):
        return match.decline(reason)
    return match.call(aten.gelu.default, match["x"])


def to_gelu_tanh(match: Match) -> fx.Node | None:
    if reason := unfit(match):
        return match.decline(reason)
    return match.call(aten.gelu.default, match["x"], approximate="tanh")


RULES = (
    Rule("silu", SILU, to_silu),
    Rule("gelu", GELU, to_gelu),
    Rule("gelu, tanh form", GELU_TANH, to_gelu_tanh),
)


def fuse_activation(graph: Graph) -> PassResult:
    return rewrite(graph, RULES)
