"""Expressions over the indices of attention scores (`compiler/index_expressions.py`) as Triton code.

    "t0[h] * (k - q)"   -->   t0_0 = tl.load(t0_ptr + head.to(tl.int64)).to(tl.float32)
                              (t0_0 * (at[None, :] - q_at[:, None]))

A table is read where it is known: before the loop over keys, unless its place depends on the key.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import sympy
import torch

from ..compiler.index_expressions import parse, table_number
from .domain import NoKernel
from .kernel import Layout
from .template import Arguments

OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
FUNCTIONS = {"where": "tl.where", "minimum": "tl.minimum", "maximum": "tl.maximum"}
ROUNDINGS = {"bfloat16", "float16"}


@dataclass(frozen=True)
class Code:
    """The text of a part of an expression. kind: "bool", "int" or "float". natural: it is an int that is not negative.

    per_key: it depends on the key.
    """

    text: str
    kind: str
    natural: bool = False
    per_key: bool = False

    @property
    def number(self) -> str:
        """Its text where arithmetic is done with it."""
        if self.kind != "bool":
            return self.text
        return {"True": "1", "False": "0"}.get(self.text) or f"{self.text}.to(tl.int32)"

    @property
    def wide(self) -> str:
        """Its text where an address is computed from it."""
        return self.text if self.text.strip("(-)").isdigit() else f"{self.text}.to(tl.int64)"


class IndexCode:
    """Prints the expressions of one kernel.

    names: what the kernel calls b, h, q and k, shaped to broadcast with its scores. tables: where t0, t1, ... lie.
    extents: how many there are of those indices that never leave their range.
    before: the statements that the expressions printed so far need in front of the loop over keys; inside: in it.
    """

    def __init__(
        self,
        arguments: Arguments,
        names: Mapping[str, str],
        tables: Sequence[Layout],
        extents: Mapping[str, sympy.Expr],
    ) -> None:
        self.names, self.tables = names, tables
        self.within = {(names[index], extent) for index, extent in extents.items()}
        self.before: list[str] = []
        self.inside: list[str] = []
        self.loaded: dict[str, Code] = {}
        self.sizes: list[list[str]] = []
        self.strides: list[list[str]] = []
        for number, table in enumerate(tables):
            arguments.pointer(f"t{number}_ptr", table)
            self.sizes.append([arguments.size(f"t{number}_size_{i}", x) for i, x in enumerate(table.sizes)])
            self.strides.append([arguments.size(f"t{number}_stride_{i}", x) for i, x in enumerate(table.strides)])

    def with_names(self, names: Mapping[str, str]) -> IndexCode:
        """The same printer with other names for some indices."""
        other = copy(self)
        other.names = {**self.names, **names}
        return other

    def text(self, expression: str) -> str:
        return self.code(parse(expression)).text

    def code(self, tree: ast.expr) -> Code:
        match tree:
            case ast.Constant(value=bool() as value):
                return Code(str(value), "bool")
            case ast.Constant(value=int() as value):
                return Code(repr(value), "int", natural=value >= 0)
            case ast.Constant(value=value):
                return Code(repr(value) if math.isfinite(value) else f'float("{value}")', "float")
            case ast.Name(id=name):
                return Code(self.names[name], "int", natural=True, per_key=name == "k")
            case ast.BinOp(left=left, op=op, right=right):
                return binary(op, self.code(left), self.code(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return joined(f"({{}} {OPERATORS[type(op)]} {{}})", "bool", self.code(left), self.code(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self.code(operand)
                return joined("(-{})", "float" if value.kind == "float" else "int", value)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                value = self.code(operand)
                return Code(f"(~{value.text})", value.kind, per_key=value.per_key)
            case ast.Call(func=ast.Name(id=name), args=args):
                return call(name, [self.code(part) for part in args])
            case ast.Subscript(slice=index):
                parts = index.elts if isinstance(index, ast.Tuple) else [index]
                return self.element(table_number(tree), [self.code(part) for part in parts])
        raise AssertionError(ast.dump(tree))

    def element(self, number: int, places: Sequence[Code]) -> Code:
        """A value of a table, 0 outside of it."""
        dtype = self.tables[number].buffer.dtype
        kind = "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"
        conditions, terms = [], [f"t{number}_ptr"]
        extents = self.tables[number].sizes
        for place, size, stride, extent in zip(places, self.sizes[number], self.strides[number], extents, strict=True):
            if place.kind != "int":
                raise NoKernel(f"an index of a table of attention that is no integer has no kernel: {place.text}")
            conditions += [] if place.natural else [f"({place.text} >= 0)"]
            conditions += [] if (place.text, extent) in self.within else [f"({place.text} < {size})"]
            if stride != "0":
                terms.append(place.wide if stride == "1" else f"{place.wide} * {stride}")
        mask = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        load = f"tl.load({' + '.join(terms)}{mask})"
        if kind == "float":
            load += ".to(tl.float32)"
        if kind == "bool":
            load += " != 0"
        if load not in self.loaded:
            per_key = any(place.per_key for place in places)
            name = f"t{number}_{len(self.loaded)}"
            (self.inside if per_key else self.before).append(f"{name} = {load}")
            self.loaded[load] = Code(name, kind, per_key=per_key)
        return self.loaded[load]


def joined(form: str, kind: str, *parts: Code, natural: bool = False) -> Code:
    """Arithmetic on parts, with their texts in the places of `form`."""
    return Code(form.format(*(part.number for part in parts)), kind, natural, any(part.per_key for part in parts))


def binary(op: ast.operator, left: Code, right: Code) -> Code:
    natural = left.natural and right.natural
    kind = "float" if "float" in (left.kind, right.kind) else "int"
    if isinstance(op, ast.BitAnd | ast.BitOr):
        text = f"({left.text} {OPERATORS[type(op)]} {right.text})"
        return Code(text, left.kind if left.kind == right.kind else "int", natural, left.per_key or right.per_key)
    if isinstance(op, ast.FloorDiv | ast.Mod):
        return floored(op, left, right)
    if isinstance(op, ast.Div):
        return joined("({} / {})", "float", left, right)
    natural = natural and not isinstance(op, ast.Sub)
    return joined(f"({{}} {OPERATORS[type(op)]} {{}})", kind, left, right, natural=natural)


def floored(op: ast.operator, left: Code, right: Code) -> Code:
    """Python's // and %, which round down; Triton's round to zero."""
    if "float" in (left.kind, right.kind):
        raise NoKernel("// and % of floats in an expression of attention have no kernel")
    if left.natural and right.natural:
        return joined("({} // {})" if isinstance(op, ast.FloorDiv) else "({} % {})", "int", left, right, natural=True)
    rest = joined("(({0} % {1} + {1}) % {1})", "int", left, right)
    return rest if isinstance(op, ast.Mod) else joined("(({0} - {2}) // {1})", "int", left, right, rest)


def call(name: str, parts: Sequence[Code]) -> Code:
    if name in ROUNDINGS:
        return joined(f"{{}}.to(tl.float32).to(tl.{name}).to(tl.float32)", "float", *parts)
    values = parts[1:] if name == "where" else parts
    kinds = {part.kind for part in values}
    kind = kinds.pop() if len(kinds) == 1 else "float" if "float" in kinds else "int"
    texts = [part.text for part in parts[: len(parts) - len(values)]]
    texts += [part.text if kind == "bool" else part.number for part in values]
    natural = all(part.natural for part in values)
    return Code(f"{FUNCTIONS[name]}({', '.join(texts)})", kind, natural, any(part.per_key for part in parts))
