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
from torch import Tensor, fx

from .graph import Graph, dtype_of, is_tensor, sizes
from .index_constants import constant_function
from .index_rules import HANDLERS
from .index_values import IndexFunction, NotInferred, Value, canonical, constant, constant_of, nonnegative
from .pattern import arguments
from .rewrite import add_weight
from .weights import Constant

__all__ = ["IndexFunction", "Inference", "NotInferred"]


class Inference:
    """Infers index functions; nodes in `opaque`, and all placeholders, are unknown functions of their own name.

    graph: gives the values of buffers, which `index_constants` reads. Without it, they are unknown.
    partial: what the algebra does not know is an unknown function too, with the reason in `unknowns`, where an error
    would be raised otherwise.
    """

    def __init__(self, graph: Graph | None = None, opaque: Collection[fx.Node] = (), *, partial: bool = False) -> None:
        self.graph = graph
        self.opaque = frozenset(opaque)
        self.partial = partial
        self.known: dict[fx.Node, IndexFunction] = {}
        self.ranges: dict[sympy.Symbol, sympy.Expr] = {}
        self.leaves: dict[str, fx.Node] = {}
        self.unknowns: dict[fx.Node, str] = {}

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
        if node.op == "placeholder":
            return self._placeholder(node)
        if node in self.opaque:
            return self.leaf(node)
        try:
            handler = HANDLERS.get(node.target)
            if node.op != "call_function" or handler is None:
                raise NotInferred(node, f"{node.target} is not index arithmetic")
            return handler(self, node, **arguments(node))
        except NotInferred as unknown:
            if not self.partial:
                raise
            return self.unknown(node, unknown.reason)

    def _placeholder(self, node: fx.Node) -> IndexFunction:
        weight = self.graph.weights.get(node.name) if self.graph is not None else None
        found = constant_function(self, node, weight.tensor) if isinstance(weight, Constant) else None
        return found or self.leaf(node)

    def unknown(self, node: fx.Node, reason: str) -> IndexFunction:
        """An unknown function, for a reason."""
        self.unknowns[node] = reason
        return self.leaf(node)

    def leaf(self, node: fx.Node) -> IndexFunction:
        """The function of its indices, by the node's name, that a tensor is by being a tensor."""
        self.leaves[node.name] = node
        dtype = dtype_of(node)
        assumptions = {"real": True} if dtype.is_floating_point else {"integer": True}
        function = sympy.Function(node.name, **assumptions)
        if dtype == torch.bool:
            return IndexFunction(sizes(node), lambda *i: sympy.Ne(function(*i), 0))
        return IndexFunction(sizes(node), lambda *i: function(*i))

    def table(self, node: fx.Node, name: str, values: Tensor) -> fx.Node:
        """A new weight of the graph that holds `values`, which were found in the weight `node`."""
        return add_weight(self.graph, f"{node.name}_{name}", Constant.of(values))

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
