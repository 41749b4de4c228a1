"""Sizes as text: the same sympy expression in Python and in C++.

Sizes are non-negative, so floor division and C's truncating division agree.
"""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter


class SizePrinter(StrPrinter):
    """What both languages share: explicit parentheses around divisions."""

    printmethod = "_effc_size"  # torch's FloorDiv brings its own spelling under sympy's name for it
    divide = "//"

    def _print_FloorDiv(self, expr: sympy.Expr) -> str:
        return f"({self.parenthesize(expr.args[0], 50)} {self.divide} {self.parenthesize(expr.args[1], 1000)})"

    _print_CleanDiv = _print_CeilToIntDiv = _print_FloorDiv

    def _print_Mod(self, expr: sympy.Expr) -> str:
        return f"({self.parenthesize(expr.args[0], 50)} % {self.parenthesize(expr.args[1], 1000)})"

    _print_PythonMod = _print_Mod

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
    """Sizes as C++ code over int64_t."""

    divide = "/"

    def _print_Max(self, expr: sympy.Expr) -> str:
        return self.fold("std::max", expr.args)

    def _print_Min(self, expr: sympy.Expr) -> str:
        return self.fold("std::min", expr.args)

    def _print_BooleanTrue(self, expr: sympy.Basic) -> str:
        return "true"

    def fold(self, function: str, arguments: tuple[sympy.Expr, ...]) -> str:
        text = f"int64_t({self._print(arguments[0])})"
        for argument in arguments[1:]:
            text = f"{function}({text}, int64_t({self._print(argument)}))"
        return text


def renamed(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> sympy.Basic:
    return expr.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()})


def python_text(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    """The expression as Python code over the runtime sizes' names."""
    return PythonPrinter().doprint(renamed(sympy.sympify(expr), names))


def cpp_text(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    """The expression as C++ code over the runtime sizes' names."""
    return CppPrinter().doprint(renamed(sympy.sympify(expr), names))
