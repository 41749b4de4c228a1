"""Which keys a block of queries can see, from the condition that tells which a query sees.

    k <= q                                     highest  q
    (k <= q) | (k < 16)                        highest  maximum(15, q)
    (q // 64 == k // 64) & (k <= q)            lowest   q // 64 * 64      highest  q
    ((k < 4) | (q - k < 1020)) & (k <= q)      lowest   q - 1019, but for the first 4      highest  q
    k >= t0[b]                                 lowest   t0[b]

Blocks of keys out of these bounds hold nothing that attention would use, and need not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sympy
import torch

from .index_text import SYMBOLS, Writer, from_text
from .index_values import Value

B, K, Q = (SYMBOLS[name] for name in "bkq")


@dataclass(frozen=True)
class KeyBounds:
    """A query sees no key above `highest`, and none below `lowest` but the first `kept`; None is no bound.

    The bounds are expressions over b and q that do not fall as q grows: queries first..last see no key above
    highest(last), and below lowest(first) only the first `kept`.
    """

    lowest: str | None = None
    highest: str | None = None
    kept: int = 0


@cache
def key_bounds(visible: str, tables: tuple[torch.dtype, ...] = ()) -> KeyBounds:
    """The bounds that a condition over b, h, q, k and tables of these dtypes puts on k."""
    names = [f"t{number}" for number in range(len(tables))]
    functions = [
        sympy.Function(name, real=True, integer=is_integer(dtype) or None) for name, dtype in zip(names, tables)
    ]
    reach = reach_of(from_text(visible, functions))
    writer = Writer(dict(zip(names, names)))
    writer.tables = names
    lowest, highest = (
        None if bound in (-sympy.oo, sympy.oo) else writer.write(bound) for bound in (reach.lowest, reach.highest)
    )
    return KeyBounds(lowest, highest, reach.kept)


def is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and dtype != torch.bool


@dataclass(frozen=True)
class Reach:
    """`KeyBounds` in sympy, with infinity where there is no bound."""

    lowest: sympy.Expr = -sympy.oo
    highest: sympy.Expr = sympy.oo
    kept: int = 0

    @property
    def is_prefix(self) -> bool:
        return self.lowest == -sympy.oo and self.highest.is_Integer


def reach_of(condition: Value) -> Reach:
    if isinstance(condition, sympy.And):
        return all_hold([reach_of(part) for part in condition.args])
    if isinstance(condition, sympy.Or):
        return one_holds([reach_of(part) for part in condition.args])
    if isinstance(condition, sympy.Eq):
        return chunk(condition.lhs - condition.rhs)
    if isinstance(condition, (sympy.Ge, sympy.Le)):
        difference = condition.lhs - condition.rhs
        return line(sympy.expand(-difference if isinstance(condition, sympy.Le) else difference))
    return Reach()


def all_hold(parts: list[Reach]) -> Reach:
    return Reach(
        sympy.Max(*(part.lowest for part in parts)),
        sympy.Min(*(part.highest for part in parts)),
        max(part.kept for part in parts),
    )


def one_holds(parts: list[Reach]) -> Reach:
    """The keys of a prefix are kept beside a lower bound of the rest."""
    rest = [part for part in parts if not part.is_prefix]
    lowest = sympy.Min(*(part.lowest for part in rest)) if rest else -sympy.oo
    kept = max(0, *(int(part.highest) + 1 if part.is_prefix else part.kept for part in parts))
    highest = sympy.Max(*(part.highest for part in parts))
    return Reach(lowest, highest, kept if lowest != -sympy.oo else 0)


def line(difference: sympy.Expr) -> Reach:
    """difference >= 0, where it is k minus a bound, or a bound minus k."""
    slope = difference.coeff(K)
    bound = -slope * (difference - slope * K)
    if slope not in (1, -1) or not (is_fixed(bound) or is_fixed(bound - Q)):
        return Reach()
    return Reach(lowest=bound) if slope == 1 else Reach(highest=bound)


def chunk(difference: sympy.Expr) -> Reach:
    """(q + c) // n == (k + c) // n: keys from (q + c) // n * n - c to the end of that chunk."""
    for floor in difference.atoms(sympy.floor):
        position = sympy.expand(floor.args[0])
        size = 1 / position.coeff(Q) if position.coeff(Q) != 0 else sympy.Integer(0)
        offset = sympy.expand(position * size - Q)
        alike = floor - floor.subs(Q, K)
        if size.is_Integer and size > 0 and is_fixed(offset) and 0 in (difference - alike, difference + alike):
            first = floor * size - offset
            return Reach(first, first + size - 1)
    return Reach()


def is_fixed(expr: sympy.Expr) -> bool:
    """Whether it is the same for all queries and keys of a row and its heads."""
    return expr.free_symbols <= {B}
