"""Fuse the gated half of an MLP.

    effc.linear(x, G, activation="silu") * effc.linear(x, U)    -->  gated_linear(x, concat(G, U), "silu")
    y = effc.linear(x, W);  silu(y[..., :N]) * y[..., N:]       -->  gated_linear(x, W, "silu")

and likewise with gelu or relu as the activation.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import any_, closed, op, part, tensor
from ..compiler.rewrite import Match, PassResult, Rule, rewrite
from .fuse_linear import concatenated, zeros

aten = torch.ops.aten
linear = OPS["linear"].target
gated_linear = OPS["gated_linear"].target

X = tensor("x")
ACTIVATION = any_("activation", lambda graph, value: value != "none")
GATE = op(linear, X, tensor("gate_weight").only_user(), any_("gate_bias"), None, ACTIVATION)
UP = op(linear, X, tensor("up_weight").only_user(), any_("up_bias"))
TWO_LINEARS = op(aten.mul.Tensor, GATE.only_user(), UP.only_user())

BOTH = op(linear, X, tensor("weight"), any_("bias"))
GATE_PART, UP_PART = part(BOTH, "gate_part"), part(BOTH, "up_part")
ACTIVATIONS = {
    "silu": op(aten.silu.default, GATE_PART),
    "gelu": op(aten.gelu.default, GATE_PART),
    "gelu_tanh": op(aten.gelu.default, GATE_PART, approximate="tanh"),
    "relu": op(aten.relu.default, GATE_PART),
}


def to_gated_linear(match: Match) -> fx.Node | None:
    gate, up = match["gate_weight"], match["up_weight"]
    if sizes(gate) != sizes(up) or dtype_of(gate) != dtype_of(up):
        return match.decline("the two weights differ in shape or dtype")
    recipes = match.graph.weights
    for operand in (gate, up, match["gate_bias"], match["up_bias"]):
        if operand is not None and operand.name not in recipes:
            return match.decline(f"{operand.name} is no weight but computed at run time")
    operands = [concatenated(match.graph, [gate, up], [recipes[gate.name], recipes[up.name]])]
    biases = [match["gate_bias"], match["up_bias"]]
    for bias in biases:
        if bias is not None and sizes(bias) != sizes(gate)[:1]:
            return match.decline(f"the bias {bias.name} is broadcast")
    if biases == [None, None]:
        operands.append(None)
    else:
        parts = [recipes[bias.name] if bias is not None else zeros(gate) for bias in biases]
        operands.append(concatenated(match.graph, [bias for bias in biases if bias is not None], parts))
    return match.call(gated_linear, match["x"], *operands, match["activation"])


def gated_parts_rule(activation: str) -> Rule:
    def to_gated_linear_of_parts(match: Match) -> fx.Node | None:
        gate, up = match["gate_part"], match["up_part"]
        half = gate.size // 2
        if gate[:3] == (half, gate.size, 1) and up[:3] == (0, half, 1):
            return match.decline("the gate is the second half of the linear, not the first")
        if gate[:3] != (0, half, 1) or up[:3] != (half, gate.size, 1):
            return match.decline(f"gate {tuple(gate)} and up {tuple(up)} are not the two halves of the linear")
        return match.call(gated_linear, match["x"], match["weight"], match["bias"], activation)

    pattern = closed(op(aten.mul.Tensor, ACTIVATIONS[activation], UP_PART))
    return Rule(f"gated linear of halves with {activation}", pattern, to_gated_linear_of_parts)


RULES = (
    Rule("gated linear", TWO_LINEARS, to_gated_linear),
    *(gated_parts_rule(activation) for activation in ACTIVATIONS),
)


def fuse_mlp(graph: Graph) -> PassResult:
    return rewrite(graph, RULES)
