"""Small expressions over tensors, as text that an op can carry.

    "silu(gate) * up"                                  the hidden values of a gated MLP
    "(maximum(up, -7.0) + 1) * (gate * sigmoid(gate * 1.702))"
    "softmax(float32(logits))"                         how a router scores experts
    "of_best_groups(values + correction, 8, 4, 2)"     and ranks them
    "chosen / sum(chosen)"                             and weights those that it chose

Which names there are is the op's to say. Operators: + - * / and the functions of `CALLS`; `softmax`, `sum` and
`of_best_groups` run over the last axis, `float32` and the like are casts. It is Python's syntax, so that a kernel
generator prints the same tree that `evaluate` interprets, op by op: each op rounds to the dtype that PyTorch gives its
result.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    "sqrt": aten.sqrt.default,
    "abs": aten.abs.default,
    "minimum": aten.clamp_max.default,
    "maximum": aten.clamp_min.default,
    "softmax": aten.softmax.int,
    "sum": aten.sum.dim_IntList,
}
"""Function -> the op it stands for; minimum and maximum are of a value and a number."""

CASTS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; what is computed in fp64, as a reference is, stays so."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def of_best_groups(x: Tensor, groups: int, kept: int, best: int) -> Tensor:
    """x with -inf in all but `kept` of the `groups` that rows consist of: those whose `best` largest have largest sums.

    Of groups with equal sums the first is kept.
    """
    parts = x.unflatten(-1, (groups, -1))
    scores = parts.topk(best).values.sum(-1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :kept], True)
    return parts.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(-2)


CALLS: dict[str, Callable[..., Tensor]] = {
    **FUNCTIONS,
    **{name: partial(cast, dtype=dtype) for name, dtype in CASTS.items()},
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "softmax": partial(torch.softmax, dim=-1),
    "sum": partial(torch.sum, dim=-1, keepdim=True),
    "of_best_groups": of_best_groups,
}
"""Function -> what `evaluate` calls."""


@cache
def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises ValueError for what the module docstring does not list."""
    tree = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=int() | float()) | ast.Name() | ast.Call(func=ast.Name(), keywords=[]):
                pass
            case ast.BinOp(op=op) if type(op) in BINARY:
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
                pass
            case ast.operator() | ast.unaryop() | ast.expr_context():
                continue
            case _:
                raise ValueError(f"expected an expression of operators and functions, found {text!r}")
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if unknown := sorted(called - set(CALLS)):
        raise ValueError(f"expected one of the functions {', '.join(CALLS)}, found {unknown[0]} in {text!r}")
    return tree


def evaluate(text: str, values: Mapping[str, Tensor | None]) -> Tensor:
    """The value of an expression, its names standing for `values`."""

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Constant() | ast.UnaryOp():
                return ast.literal_eval(tree)
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=op, right=right):
                return BINARY[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return CALLS[name](*map(value, args))
        raise AssertionError(ast.dump(tree))

    return value(parse(text))
