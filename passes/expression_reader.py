"""Read a part of a graph as an expression of `compiler/expressions.py`: what an op can carry as text."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compiler.expressions import BINARY, CASTS, FUNCTIONS
from ..compiler.graph import dtype_of, is_tensor
from ..compiler.pattern import CASTS as CAST_OPS
from ..compiler.pattern import arguments

aten = torch.ops.aten

OPERATORS = {BINARY[kind]: sign for kind, sign in ((ast.Add, "+"), (ast.Sub, "-"), (ast.Mult, "*"), (ast.Div, "/"))}
CALLS = {target: name for name, target in FUNCTIONS.items() if name not in ("gelu_tanh", "softmax", "sum")}
DTYPES = {dtype: name for name, dtype in CASTS.items()}


class Unreadable(Exception):
    """Why a value is no expression over the names that there are."""


class Reader:
    """Reads values as expressions.

    what: how it calls them in reasons. name_of: the name of a node, None if it has none. has_rows: whether there may be
    functions that run over rows. nodes: the calls that were read.
    """

    def __init__(self, what: str, name_of: Callable[[fx.Node], str | None], has_rows: bool = True) -> None:
        self.what, self.name_of, self.has_rows = what, name_of, has_rows
        self.texts: dict[fx.Node, str] = {}
        self.nodes: list[fx.Node] = []

    def text(self, value: Any) -> str:
        """The expression of a node or number. Raises Unreadable with what is in the way."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return repr(value)
        if not is_tensor(value):
            raise Unreadable(f"{self.what} depend on {value}")
        if value not in self.texts:
            self.texts[value] = self.name_of(value) or self.call(value)
        return self.texts[value]

    def call(self, node: fx.Node) -> str:
        if node.op != "call_function":
            raise Unreadable(f"{self.what} depend on {node.name}")
        text = self.cast(node) or self.along_row(node) or self.function(node)
        if text is None:
            raise Unreadable(f"{self.what} are made by {node.target} ({node.name}), which no expression has")
        self.nodes.append(node)
        return text

    def cast(self, node: fx.Node) -> str | None:
        if node.target not in CAST_OPS or dtype_of(node) not in DTYPES:
            return None
        source = node.args[0]
        if node.meta["val"].device != source.meta["val"].device or not dtype_of(source).is_floating_point:
            return None
        return f"{DTYPES[dtype_of(node)]}({self.text(source)})"

    def along_row(self, node: fx.Node) -> str | None:
        """softmax and sum over the last axis, which stays."""
        if not self.has_rows or node.target not in (aten.softmax.int, aten.sum.dim_IntList):
            return None
        named = arguments(node)
        x, dims = named["self"], named["dim"]
        last = x.meta["val"].ndim - 1
        dims = [dims] if isinstance(dims, int) else dims
        if [dim % (last + 1) for dim in dims or ()] != [last] or not named.get("keepdim", True):
            raise Unreadable(f"{node.name} does not run over the last axis alone")
        dtype = named["dtype"] or dtype_of(x)
        text = self.text(x) if dtype == dtype_of(x) else f"{DTYPES.get(dtype)}({self.text(x)})"
        if dtype != dtype_of(x) and dtype not in DTYPES:
            raise Unreadable(f"{node.name} is {dtype}")
        return f"{'softmax' if node.target is aten.softmax.int else 'sum'}({text})"

    def function(self, node: fx.Node) -> str | None:
        named = arguments(node)
        if node.target is aten.clamp.default:
            low, high = named["min"], named["max"]
            text = self.text(node.args[0]) if low is None else f"maximum({self.text(node.args[0])}, {low!r})"
            return text if high is None else f"minimum({text}, {high!r})"
        if (node.target not in OPERATORS and node.target not in CALLS) or named.get("alpha", 1) != 1:
            return None
        operands = [self.text(value) for value in node.args if not isinstance(value, str)]
        if node.target in OPERATORS:
            return f"({f' {OPERATORS[node.target]} '.join(operands)})"
        tanh = node.target is aten.gelu.default and named["approximate"] == "tanh"
        return f"{'gelu_tanh' if tanh else CALLS[node.target]}({', '.join(operands)})"
