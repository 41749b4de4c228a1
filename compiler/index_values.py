"""What index functions are made of: elements as sympy expressions, and arithmetic on them.

A number is a `sympy.Expr`, a truth value a sympy `Boolean`; a comparison of integers is brought to `difference >= 0`,
so that one spelling is left of `k <= q`, `q >= k` and `not q < k`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Piecewise
from sympy.logic.boolalg import Boolean
from torch import fx

from .graph import size_expr

Shape = tuple[sympy.Expr, ...]
Value = sympy.Basic  # a number (sympy.Expr) or a truth value (Boolean)


ROUNDINGS = {dtype: sympy.Function(str(dtype)[6:], real=True) for dtype in (torch.bfloat16, torch.float16)}
"""The function that rounds to a dtype, by its name: bfloat16(x). That fp32 holds 24 bits is not modelled."""


class NotInferred(Exception):
    """A node that is no known function of its indices: `node` and `reason` say which and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class IndexFunction:
    """A tensor of `shape` whose element at `indices` is `at(*indices)`."""

    shape: Shape
    at: Callable[..., Value]

    def read(self, indices: Sequence[sympy.Expr]) -> Value:
        """The element that broadcasts to `indices` of a tensor of at least this rank."""
        own = list(indices)[len(indices) - len(self.shape) :]
        return self.at(*(sympy.Integer(0) if size == 1 else index for size, index in zip(self.shape, own)))


def constant(value: Value) -> IndexFunction:
    return IndexFunction((), lambda: value)


def constant_of(value: Any) -> Value:
    """A Python number or a size as sympy has it; whole numbers are integers, so that 0.0 is 0."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if not isinstance(value, float):
        return size_expr(value)
    if math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Integer(int(value)) if value.is_integer() else sympy.Float(value)


def rounded(value: Value, dtype: torch.dtype) -> Value:
    """A number as `dtype` holds it."""
    if not dtype.is_floating_point:
        return value
    if isinstance(value, Piecewise):
        return Piecewise(*((rounded(branch, dtype), condition) for branch, condition in value.args))
    if value.is_number:
        return constant_of(torch.tensor(float(value), dtype=dtype).item())
    rounding = ROUNDINGS.get(dtype)
    return value if rounding is None or value.func == rounding else rounding(value)


def nonnegative(expr: sympy.Expr) -> Value:
    """expr >= 0, decided where the assumptions on the sizes allow it."""
    expr = sympy.expand(expr)
    if expr.is_nonnegative:
        return sympy.true
    return sympy.false if expr.is_negative else sympy.Ge(expr, 0)


def is_truth(value: Value) -> bool:
    """Whether this is a truth value (a sympy symbol could be either; here it is a number)."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)


def canonical(condition: Value) -> Value:
    """A comparison of integers as `difference >= 0`; anything else as it is."""
    if not isinstance(condition, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
        return condition
    difference = condition.lhs - condition.rhs
    if not difference.is_integer:
        return condition
    if isinstance(condition, (sympy.Le, sympy.Lt)):
        difference = -difference
    return nonnegative(difference - 1 if isinstance(condition, (sympy.Gt, sympy.Lt)) else difference)


def number(value: Value) -> sympy.Expr:
    """A truth value as 0 or 1; a number as it is."""
    if value in (sympy.true, sympy.false):
        return sympy.Integer(value == sympy.true)
    return Piecewise((1, value), (0, True)) if is_truth(value) else value


def truth(value: Value) -> Value:
    """Whether a number is not zero; a truth value as it is."""
    if is_truth(value):
        return value
    if isinstance(value, Piecewise):
        result: Value = sympy.false
        for branch, condition in reversed(value.args):
            result = choose(condition, truth(branch), result)
        return result
    return sympy.Ne(value, 0)


def as_dtype(value: Value, boolean: bool) -> Value:
    return truth(value) if boolean else number(value)


def choose(condition: Value, value: Value, otherwise: Value) -> Value:
    """`value` where `condition` holds, else `otherwise`."""
    if is_truth(value) and is_truth(otherwise):
        return sympy.Or(sympy.And(condition, value), sympy.And(sympy.Not(condition), otherwise))
    return Piecewise((number(value), condition), (number(otherwise), True))


def over_branches(function: Callable[..., Value]) -> Callable[..., Value]:
    """A function of numbers, branch by branch: where(c, 0, -9) < -1 is not c."""

    def distributed(*values: sympy.Expr) -> Value:
        for place, value in enumerate(values):
            if isinstance(value, Piecewise):
                result: Value | None = None
                for branch, condition in reversed(value.args):
                    inner = distributed(*values[:place], branch, *values[place + 1 :])
                    result = inner if result is None else choose(condition, inner, result)
                return result
        return function(*values)

    return distributed


@over_branches
def less_equal(left: sympy.Expr, right: sympy.Expr) -> Value:
    return nonnegative(right - left)


@over_branches
def less(left: sympy.Expr, right: sympy.Expr) -> Value:
    difference = right - left
    return nonnegative(difference - 1) if difference.is_integer else sympy.Gt(difference, 0)


@over_branches
def equal(left: sympy.Expr, right: sympy.Expr) -> Value:
    return sympy.Eq(sympy.expand(left - right), 0)


def reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Runs of old and new dimensions with equal numbers of elements, in order; None if they cannot be told apart.

    (B, G, n, T) and (B, G * n, T)  -->  ([0], [0]), ([1, 2], [1]), ([3], [2])
    """
    if 0 in old or 0 in new:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i], [j]) if i < len(old) and j < len(new) else ([], [])
        if not left:  # sizes of 1 are left over on one side
            rest = [*old[i:], *new[j:]]
            if any(size != 1 for size in rest):
                return None
            groups.append((list(range(i, len(old))), list(range(j, len(new)))))
            break
        i, j = i + 1, j + 1
        while True:
            ratio = sympy.cancel(product(old, left) / product(new, right))
            if ratio == 1:
                break
            if sympy.denom(ratio) == 1 and j < len(new):
                right.append(j)
                j += 1
            elif sympy.numer(ratio) == 1 and i < len(old):
                left.append(i)
                i += 1
            else:
                return None
        groups.append((left, right))
    return groups


def product(shape: Shape, dims: Sequence[int]) -> sympy.Expr:
    return sympy.prod(shape[dim] for dim in dims)
