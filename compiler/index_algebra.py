"""Small integer, boolean and float tensors as functions of their indices.

    arange(S)[None, :] <= arange(S)[:, None]        is        at(q, k) = (q - k >= 0)

Masks, positions and repeats of heads are built by broadcasting index arithmetic. An `Inference` follows a node back
through that arithmetic and gives an `IndexFunction`: the shape, and a function from one sympy index per dimension to
a sympy expression. Placeholders (and the nodes a caller names) are unknown functions. What the algebra does not know
raises `NotInferred` with the node and the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFunction
from torch import fx

from .graph import Graph, dtype_of, is_tensor, sizes
from .index_rules import HANDLERS
from .index_values import IndexFunction, NotInferred, Value, as_dtype, canonical, constant, constant_of, nonnegative
from .pattern import arguments
from .weights import Constant

__all__ = ["IndexFunction", "Inference", "NotInferred"]


class Inference:
    """Infers index functions; nodes in `opaque`, and all placeholders, are unknown functions of their own name.

    graph: gives the values of constant buffers, of which a lower triangle is recognized. Without it, they are unknown.
    """

    def __init__(self, graph: Graph | None = None, opaque: Collection[fx.Node] = ()) -> None:
        self.weights = graph.weights if graph is not None else {}
        self.opaque = frozenset(opaque)
        self.known: dict[fx.Node, IndexFunction] = {}
        self.ranges: dict[sympy.Symbol, sympy.Expr] = {}
        self.leaves: dict[str, fx.Node] = {}

    def index(self, name: str, size: sympy.Expr) -> sympy.Expr:
        """An index variable 0 <= name < size, or 0 where the size is 1."""
        if size == 1:
            return sympy.Integer(0)
        symbol = sympy.Symbol(name, integer=True, nonnegative=True)
        self.ranges[symbol] = size
        return symbol

    def infer(self, node: fx.Node) -> IndexFunction:
        """The index function of a tensor node. Raises NotInferred."""
        if node not in self.known:
            self.known[node] = self._infer(node)
        return self.known[node]

    def _infer(self, node: fx.Node) -> IndexFunction:
        if not is_tensor(node):
            raise NotInferred(node, "it does not compute one tensor")
        if node.op == "placeholder" or node in self.opaque:
            return self._leaf(node)
        handler = HANDLERS.get(node.target)
        if node.op != "call_function" or handler is None:
            raise NotInferred(node, f"{node.target} is not index arithmetic")
        return handler(self, node, **arguments(node))

    def _leaf(self, node: fx.Node) -> IndexFunction:
        weight = self.weights.get(node.name)
        boolean = dtype_of(node) == torch.bool
        if isinstance(weight, Constant) and is_lower_triangle(weight.tensor):
            return IndexFunction(sizes(node), lambda *i: as_dtype(nonnegative(i[-2] - i[-1]), boolean))
        self.leaves[node.name] = node
        assumptions = {"real": True} if dtype_of(node).is_floating_point else {"integer": True}
        function = sympy.Function(node.name, **assumptions)
        if boolean:
            return IndexFunction(sizes(node), lambda *i: sympy.Ne(function(*i), 0))
        return IndexFunction(sizes(node), lambda *i: function(*i))

    def operand(self, value: Any, node: fx.Node) -> IndexFunction:
        """An argument of `node`: a tensor node, a size, or a number."""
        if is_tensor(value):
            return self.infer(value)
        try:
            return constant(constant_of(value))
        except (AttributeError, TypeError):
            raise NotInferred(node, f"its argument {value} is neither a tensor nor a size") from None

    def bounds(self, expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
        """(lowest, highest) of an expression that is linear in the index variables; None if it is not."""
        low = high = expr
        for symbol, size in self.ranges.items():
            slope = expr.diff(symbol) if expr.has(symbol) else sympy.Integer(0)
            if not slope.is_number:
                return None
            first, last = (0, size - 1) if slope >= 0 else (size - 1, 0)
            low, high = low.subs(symbol, first), high.subs(symbol, last)
        return sympy.expand(low), sympy.expand(high)

    def decide(self, condition: Value) -> Value:
        """`condition` with the parts that the ranges of the indices decide replaced by true or false."""
        if isinstance(condition, BooleanFunction):
            return condition.func(*(self.decide(argument) for argument in condition.args))
        condition = canonical(condition)
        if isinstance(condition, sympy.Ge) and (bounds := self.bounds(condition.lhs)) is not None:
            if nonnegative(bounds[0]) == sympy.true:
                return sympy.true
            if nonnegative(bounds[1]) == sympy.false:
                return sympy.false
        return condition

    def divmod(self, expr: sympy.Expr, size: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """(expr // size, expr % size), with the multiples of `size` taken out where the ranges allow it."""
        quotient = rest = sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(expr)):
            ratio = sympy.cancel(term / size)
            if sympy.denom(ratio) == 1:
                quotient += ratio
            else:
                rest += term
        bounds = self.bounds(rest)
        if bounds and nonnegative(bounds[0]) == sympy.true and nonnegative(size - 1 - bounds[1]) == sympy.true:
            return quotient, rest
        return quotient + sympy.floor(rest / size), sympy.Mod(rest, size)


def is_lower_triangle(tensor: torch.Tensor) -> bool:
    """Whether a constant [1, ..., N, N] with N > 1 is one on and below the diagonal and zero above."""
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] < 2:
        return False
    if tensor.numel() != tensor.shape[-1] ** 2:
        return False
    square = tensor.reshape(tensor.shape[-2:])
    return bool((square == torch.ones_like(square).tril()).all())
