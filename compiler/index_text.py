"""Between sympy and the text of `index_expressions`: what the algebra infers, an op carries, and a kernel evaluates.

    slopes(h) * count(b, k)   <-->   "t0[h] * t1[b, k]" with the tables slopes, count

The text is canonical: one spelling for each expression that sympy holds equal.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import ClassVar

import sympy
from sympy import Piecewise
from sympy.core.function import AppliedUndef
from torch import fx

from .index_expressions import INDICES, parse, table_number
from .index_values import ROUNDINGS, Value, choose, equal, less, less_equal, number, truth

SYMBOLS = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in INDICES}
"""The indices as the algebra names them."""


class NoText(Exception):
    """What of an expression cannot be written: a size, or a function without a table."""


# --- sympy to text ---------------------------------------------------------------------------------------------------


class Writer:
    """Writes expressions whose unknown functions are tables; `tables` are those written so far, t0 first."""

    def __init__(self, leaves: Mapping[str, fx.Node]) -> None:
        self.leaves = leaves
        self.tables: list[fx.Node] = []

    def write(self, value: Value) -> str:
        """The text of a number or a condition. Raises NoText."""
        if value in (sympy.true, sympy.false):
            return str(value)
        if isinstance(value, sympy.Symbol):
            if value.name not in INDICES:
                raise NoText(f"it depends on the size {value}")
            return value.name
        if value.is_number:
            return self.number(value)
        for kind, write in self.WRITERS.items():
            if isinstance(value, kind):
                return write(self, value)
        raise NoText(f"{value} has no text")

    def atom(self, value: Value) -> str:
        """The text of an operand: in parentheses where it is more than a name, a number or a call."""
        text = self.write(value)
        simple = isinstance(parse(text), (ast.Name, ast.Subscript, ast.Call)) or text.replace(".", "").isalnum()
        return text if simple else f"({text})"

    def number(self, value: sympy.Expr) -> str:
        if value.is_Integer and abs(value) < 2**53:
            return str(int(value))
        if not value.is_finite:
            raise NoText("it is infinite")
        return repr(float(value))

    def sum(self, value: sympy.Add) -> str:
        """Terms with a plus first, indices in the order k, q, h, b, numbers last."""
        terms = sorted(value.args, key=lambda term: (negative(term), term.is_number, order(term)))
        text = self.write(terms[0])
        for term in terms[1:]:
            text += f" - {self.factor(-term)}" if negative(term) else f" + {self.write(term)}"
        return text

    def factor(self, value: sympy.Expr) -> str:
        return f"({self.write(value)})" if isinstance(value, sympy.Add) else self.write(value)

    def product(self, value: sympy.Mul) -> str:
        number, rest = value.as_coeff_Mul()
        factors = sorted(sympy.Mul.make_args(rest), key=lambda factor: (not factor.atoms(AppliedUndef), order(factor)))
        texts = [self.factor(factors[0]), *map(self.atom, factors[1:])]
        if number == -1:
            return f"-{' * '.join([self.atom(factors[0]), *texts[1:]])}"
        return " * ".join([*texts, self.number(number)] if number != 1 else texts)

    def floor(self, value: sympy.floor) -> str:
        whole, size = value.args[0].as_numer_denom()
        return f"{self.atom(whole)} // {self.atom(size)}"

    def remainder(self, value: sympy.Mod) -> str:
        return f"{self.atom(value.args[0])} % {self.atom(value.args[1])}"

    def comparison(self, value: sympy.core.relational.Relational) -> str:
        """Terms with a minus go to the other side: q - k + 2 >= 0 is k <= q + 2."""
        value = value.reversed if isinstance(value, (sympy.Le, sympy.Lt)) else value
        terms = sympy.Add.make_args(sympy.expand(value.lhs - value.rhs))
        known = sum((term for term in terms if term.is_number), sympy.Integer(0))
        high = sum((term for term in terms if not term.is_number and not negative(term)), sympy.Integer(0))
        low = -sum((term for term in terms if not term.is_number and negative(term)), sympy.Integer(0))
        if isinstance(value, (sympy.Eq, sympy.Ne)):
            sign = "==" if isinstance(value, sympy.Eq) else "!="
            left, right = (
                (high, low - known) if low == 0 or (high != 0 and order(high) < order(low)) else (low, high + known)
            )
            return f"{self.write(left)} {sign} {self.write(right)}"
        strict = isinstance(value, sympy.Gt)
        if high == 0:  # low <= known
            whole = known.is_Integer and not strict
            return f"{self.write(low)} {'<' if strict or whole else '<='} {self.write(known + 1 if whole else known)}"
        if low == 0:
            return f"{self.write(high)} {'>' if strict else '>='} {self.write(-known)}"
        if known == -1 and not strict:
            return f"{self.write(low)} < {self.write(high)}"
        return f"{self.write(low)} {'<' if strict else '<='} {self.write(high + known)}"

    def junction(self, value: sympy.logic.boolalg.BooleanFunction) -> str:
        sign = " & " if isinstance(value, sympy.And) else " | "
        return sign.join(sorted((f"({self.write(part)})" for part in value.args), key=lambda text: (len(text), text)))

    def negation(self, value: sympy.Not) -> str:
        return f"~({self.write(value.args[0])})"

    def cases(self, value: Piecewise) -> str:
        *others, (last, _) = value.args
        text = self.write(last)
        for branch, condition in reversed(others):
            text = f"where({self.write(condition)}, {self.write(branch)}, {text})"
        return text

    def extreme(self, value: sympy.Max | sympy.Min) -> str:
        name = "maximum" if isinstance(value, sympy.Max) else "minimum"
        texts = sorted(map(self.write, value.args))
        return reduce(lambda left, right: f"{name}({left}, {right})", texts)

    def absolute(self, value: sympy.Abs) -> str:
        return self.extreme(sympy.Max(value.args[0], -value.args[0], evaluate=False))

    def call(self, value: AppliedUndef) -> str:
        if value.func in ROUNDINGS.values():
            return f"{value.name}({self.write(value.args[0])})"
        if value.name not in self.leaves or not value.args:
            raise NoText(f"{value} has no table")
        table = self.leaves[value.name]
        if table not in self.tables:
            self.tables.append(table)
        return f"t{self.tables.index(table)}[{', '.join(map(self.write, value.args))}]"

    WRITERS: ClassVar = {
        sympy.Add: sum,
        sympy.Mul: product,
        sympy.floor: floor,
        sympy.Mod: remainder,
        sympy.core.relational.Relational: comparison,
        sympy.And: junction,
        sympy.Or: junction,
        sympy.Not: negation,
        Piecewise: cases,
        sympy.Max: extreme,
        sympy.Min: extreme,
        sympy.Abs: absolute,
        AppliedUndef: call,
    }


def negative(term: sympy.Expr) -> bool:
    return bool(term.as_coeff_Mul()[0] < 0)


def order(term: sympy.Expr) -> tuple[object, ...]:
    """Terms with k come before those with q, then h, then b."""
    names = {symbol.name for symbol in term.free_symbols}
    return (*(name not in names for name in "kqhb"), str(term))


# --- text to sympy ---------------------------------------------------------------------------------------------------


def from_text(text: str, tables: Sequence[Callable[..., Value]]) -> Value:
    """The sympy expression of a text, whose tables are functions of their indices."""
    operations: dict[type, Callable[..., Value]] = {
        ast.Add: lambda a, b: number(a) + number(b),
        ast.Sub: lambda a, b: number(a) - number(b),
        ast.Mult: lambda a, b: number(a) * number(b),
        ast.Div: lambda a, b: number(a) / number(b),
        ast.FloorDiv: lambda a, b: sympy.floor(a / b),
        ast.Mod: sympy.Mod,
        ast.BitAnd: lambda a, b: sympy.And(truth(a), truth(b)),
        ast.BitOr: lambda a, b: sympy.Or(truth(a), truth(b)),
        ast.Lt: less,
        ast.LtE: less_equal,
        ast.Gt: lambda a, b: less(b, a),
        ast.GtE: lambda a, b: less_equal(b, a),
        ast.Eq: lambda a, b: equal(number(a), number(b)),
        ast.NotEq: lambda a, b: sympy.Not(equal(number(a), number(b))),
        ast.USub: lambda a: -number(a),
        ast.Invert: lambda a: sympy.Not(truth(a)),
    }
    functions: dict[str, Callable[..., Value]] = {
        "where": lambda condition, a, b: choose(truth(condition), a, b),
        "minimum": sympy.Min,
        "maximum": sympy.Max,
        **{str(rounding): rounding for rounding in ROUNDINGS.values()},
    }

    def value(tree: ast.expr) -> Value:
        match tree:
            case ast.Constant(value=known):
                return sympy.sympify(known)
            case ast.Name(id=name):
                return SYMBOLS[name]
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                return operations[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return operations[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=args):
                return functions[name](*map(value, args))
            case ast.Subscript(slice=index):
                parts = index.elts if isinstance(index, ast.Tuple) else [index]
                return tables[table_number(tree)](*map(value, parts))
        raise AssertionError(ast.dump(tree))

    return value(parse(text))
