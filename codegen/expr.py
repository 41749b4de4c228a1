"""Sizes and indices as text: the same sympy expression in Python, in C++ and in Triton.

Sizes are non-negative, so floor division and C's truncating division agree.
"""

from __future__ import annotations

import functools

import sympy
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import FloorDiv, Mod


class SizePrinter(StrPrinter):
    """What the languages share: explicit parentheses around divisions, and no function that is not theirs."""

    printmethod = "_effc_size"  # torch's FloorDiv brings its own spelling under sympy's name for it
    divide = "//"

    def _print_FloorDiv(self, expr: sympy.Expr) -> str:
        return f"({self.parenthesize(expr.args[0], 50)} {self.divide} {self.parenthesize(expr.args[1], 1000)})"

    _print_CleanDiv = _print_FloorDiv

    def _print_Mod(self, expr: sympy.Expr) -> str:
        return f"({self.parenthesize(expr.args[0], 50)} % {self.parenthesize(expr.args[1], 1000)})"

    _print_PythonMod = _print_Mod

    def _print_Function(self, expr: sympy.Expr) -> str:
        raise ValueError(f"a size holds {expr}: expected sums, products, divisions, remainders, minima and maxima")

    def _print_Pow(self, expr: sympy.Expr, rational: bool = False) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and exponent > 0):
            raise ValueError(f"a size holds {expr}, which is no product of sizes")
        return "*".join([self.parenthesize(base, 1000)] * int(exponent))


class PythonPrinter(SizePrinter):
    """Sizes as Python code."""

    def _print_Max(self, expr: sympy.Expr) -> str:
        return f"max({', '.join(map(self._print, expr.args))})"

    def _print_Min(self, expr: sympy.Expr) -> str:
        return f"min({', '.join(map(self._print, expr.args))})"

    def _print_Relational(self, expr: sympy.Expr) -> str:
        operator = {"Eq": "==", "Ne": "!="}.get(type(expr).__name__[:2], getattr(expr, "rel_op", ""))
        return f"({self._print(expr.lhs)} {operator} {self._print(expr.rhs)})"

    def _print_BooleanTrue(self, expr: sympy.Basic) -> str:
        return "True"


class CppPrinter(PythonPrinter):
    """Sizes as C++ code over int64_t, with the functions that `emit` defines."""

    divide = "/"

    def _print_Max(self, expr: sympy.Expr) -> str:
        return self.fold("larger", expr.args)

    def _print_Min(self, expr: sympy.Expr) -> str:
        return self.fold("smaller", expr.args)

    def _print_BooleanTrue(self, expr: sympy.Basic) -> str:
        return "true"

    def fold(self, function: str, arguments: tuple[sympy.Expr, ...]) -> str:
        text = f"int64_t({self._print(arguments[0])})"
        for argument in arguments[1:]:
            text = f"{function}({text}, int64_t({self._print(argument)}))"
        return text


class TritonPrinter(SizePrinter):
    """Indices as Triton code over scalars and tiles."""

    def _print_Max(self, expr: sympy.Expr) -> str:
        return functools.reduce(lambda a, b: f"tl.maximum({a}, {b})", map(self._print, expr.args))

    def _print_Min(self, expr: sympy.Expr) -> str:
        return functools.reduce(lambda a, b: f"tl.minimum({a}, {b})", map(self._print, expr.args))


def renamed(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> sympy.Basic:
    return expr.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()})


def python_text(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    """The expression as Python code over the runtime sizes' names."""
    return PythonPrinter().doprint(renamed(sympy.sympify(expr), names))


def cpp_text(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    """The expression as C++ code over the runtime sizes' names."""
    return CppPrinter().doprint(renamed(sympy.sympify(expr), names))


def triton_text(expr: sympy.Basic) -> str:
    """The expression as Triton code; its symbols are variables of the kernel already."""
    return TritonPrinter().doprint(expr if expr.has(FloorDiv, Mod) else sympy.expand(expr))
