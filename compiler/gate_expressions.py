"""Expressions of a gated MLP: what its hidden values are, as text that an op can carry.

    "silu(gate) * up"                                       the usual one
    "gelu(up)"                                              a MLP without a gate
    "(maximum(up, -7.0) + 1) * (gate * sigmoid(gate * 1.702))"

Names: gate and up, two products of the same input. Operators: + - * / and the functions of `FUNCTIONS`. It is
Python's syntax, so that a kernel generator prints the same tree that `evaluate` interprets, op by op: each op rounds
to the dtype of its operands.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

BINARY: dict[type[ast.operator], Any] = {
    ast.Add: aten.add.Tensor,
    ast.Sub: aten.sub.Tensor,
    ast.Mult: aten.mul.Tensor,
    ast.Div: aten.div.Tensor,
}

FUNCTIONS: dict[str, Any] = {
    "silu": aten.silu.default,
    "gelu": aten.gelu.default,
    "gelu_tanh": aten.gelu.default,
    "relu": aten.relu.default,
    "sigmoid": aten.sigmoid.default,
    "exp": aten.exp.default,
    "abs": aten.abs.default,
    "minimum": aten.clamp_max.default,
    "maximum": aten.clamp_min.default,
}
"""Function -> the op it stands for; minimum and maximum are of a value and a number."""

NAMES = ("gate", "up")


@cache
def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises ValueError for what the module docstring does not list."""
    tree = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=int() | float()) | ast.Name() | ast.Call(keywords=[]):
                pass
            case ast.BinOp(op=op) if type(op) in BINARY:
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
                pass
            case ast.operator() | ast.unaryop() | ast.expr_context():
                continue
            case _:
                raise ValueError(f"expected an expression over {', '.join(NAMES)}, found {text!r}")
    known = {*NAMES, *FUNCTIONS}
    if unknown := sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known):
        raise ValueError(f"expected an expression over {', '.join(NAMES)}, found {unknown[0]} in {text!r}")
    return tree


def has_gate(text: str) -> bool:
    """Whether the expression reads two products of its input, not one."""
    return any(isinstance(node, ast.Name) and node.id == "gate" for node in ast.walk(parse(text)))


def evaluate(text: str, values: Mapping[str, Tensor]) -> Tensor:
    """The value of an expression; values: "up" and, where it has a gate, "gate"."""

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Constant() | ast.UnaryOp():
                return ast.literal_eval(tree)
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=op, right=right):
                return BINARY[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="gelu_tanh"), args=[operand]):
                return aten.gelu.default(value(operand), approximate="tanh")
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name](*map(value, args))
        raise AssertionError(ast.dump(tree))

    return value(parse(text))
