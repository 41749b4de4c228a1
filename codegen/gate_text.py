"""Expressions of a gated MLP (`compiler/gate_expressions.py`) as Triton code, one line per op."""

from __future__ import annotations

import ast

import torch

from ..compiler.gate_expressions import BINARY, FUNCTIONS, parse
from .kernel import TL_TYPES
from .linear import ACTIVATION_TEXT
from .pointwise_ops import SIMPLE

CALLS: dict[str, str] = {
    "gelu": ACTIVATION_TEXT["gelu"],
    "gelu_tanh": ACTIVATION_TEXT["gelu_tanh"],
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
"""Functions whose code `pointwise_ops.SIMPLE` does not have."""


def rounded(text: str, dtype: torch.dtype) -> str:
    """`text`, a value in fp32, as `dtype` holds it."""
    if dtype == torch.float32:
        return text
    operand = text if text.isidentifier() else f"({text})"
    return f"{operand}.to({TL_TYPES[dtype]}).to(tl.float32)"


def gate_lines(activation: str, dtype: torch.dtype) -> list[str]:
    """Lines from the variables gate and up, in fp32, to y; each op rounds to `dtype`."""
    lines: list[str] = []
    names: dict[str, str] = {}

    def value(tree: ast.expr) -> str:
        match tree:
            case ast.Constant() | ast.UnaryOp():
                return repr(float(ast.literal_eval(tree)))
            case ast.Name(id=name):
                return name
            case ast.BinOp(left=left, op=op, right=right):
                target = BINARY[type(op)]
                return let(target._schema.name.split("::")[1], SIMPLE[target], left, right)
            case ast.Call(func=ast.Name(id=name), args=args):
                return let(name, CALLS.get(name) or SIMPLE[FUNCTIONS[name]], *args)
        raise AssertionError(ast.dump(tree))

    def let(name: str, form: str, *operands: ast.expr) -> str:
        text = rounded(form.format(*map(value, operands)), dtype)
        if text not in names:
            names[text] = f"{name}_{len(names)}"
            lines.append(f"{names[text]} = {text}")
        return names[text]

    result = value(parse(activation))
    return [*lines, f"y = {result}"]
