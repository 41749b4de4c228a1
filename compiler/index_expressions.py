"""Expressions over the indices of attention scores, as text that an op can carry.

    "t0[h] * (k - q)"                  a bias (ALiBi); t0 is the first of the op's tables, one slope per head
    "t0[b, q] == t0[b, k]"             a condition: tokens of the same document
    "(k < 16) | (q - k < 1024)"        a condition: a prefix, and a window

Names: b batch, h query head, q and k positions of query and key in the sequence, t0, t1, ... tables. Operators: + - * /
// % comparisons & | ~, and where(condition, a, b), minimum(a, b), maximum(a, b). bfloat16(x) and float16(x) round, as a
model does that computes its bias in half precision. An element outside of a table is 0.
It is Python's syntax, so that a kernel generator prints the same tree that `evaluate` interprets.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

INDICES = ("b", "h", "q", "k")

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
UNARY = {ast.USub: operator.neg, ast.Invert: operator.invert}


def rounds_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype if x.is_floating_point() else torch.float32)


FUNCTIONS = {
    "where": torch.where,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "bfloat16": rounds_to(torch.bfloat16),
    "float16": rounds_to(torch.float16),
}


@cache
def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises ValueError for what the module docstring does not list."""
    tree = ast.parse(text, mode="eval").body
    check(tree, text)
    return tree


def check(tree: ast.expr, text: str) -> None:
    match tree:
        case ast.Constant(value=bool() | int() | float()):
            return
        case ast.Name(id=name) if name in INDICES:
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            parts = [left, right]
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
            parts = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            parts = [operand]
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
            pass
        case ast.Subscript(value=ast.Name(), slice=index):
            table_number(tree)
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
        case _:
            raise ValueError(f"expected an expression over {', '.join(INDICES)} and tables, found {text!r}")
    for part in parts:
        check(part, text)


def table_number(subscript: ast.Subscript) -> int:
    """Which table `t3[...]` reads: 3."""
    name = subscript.value.id
    if not (name[:1] == "t" and name[1:].isdigit()):
        raise ValueError(f"expected a table t0, t1, ..., found {name}")
    return int(name[1:])


def evaluate(text: str, indices: Mapping[str, Tensor], tables: Sequence[Tensor]) -> Tensor:
    """The value of an expression. indices: name -> int64 tensors that broadcast with each other."""

    def value(tree: ast.expr) -> Tensor:
        match tree:
            case ast.Constant(value=number):
                return torch.tensor(number, device=indices["q"].device)
            case ast.Name(id=name):
                return indices[name]
            case ast.BinOp(left=left, op=op, right=right):
                return BINARY[type(op)](value(left), value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return COMPARE[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return UNARY[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name](*map(value, args))
            case ast.Subscript(slice=index):
                parts = index.elts if isinstance(index, ast.Tuple) else [index]
                return element(tables[table_number(tree)], [value(part) for part in parts])
        raise AssertionError(ast.dump(tree))

    return value(parse(text))


def element(table: Tensor, places: Sequence[Tensor]) -> Tensor:
    """table[places], 0 where a place is outside."""
    inside = torch.stack(
        torch.broadcast_tensors(*((place >= 0) & (place < size) for place, size in zip(places, table.shape)))
    ).all(0)
    found = table[tuple(place.clamp(0, size - 1) for place, size in zip(places, table.shape))]
    return torch.where(inside, found, torch.zeros_like(found))
