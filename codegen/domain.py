"""What a generated kernel runs over and where its values are stored; and why a node cannot be part of one."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx
from torch.utils._sympy.functions import Mod

from .kernel import Layout
from .views import Index

ROW, COL = sympy.Symbol("row", integer=True, nonnegative=True), sympy.Symbol("col", integer=True, nonnegative=True)
ZERO = sympy.Integer(0)


class NoKernel(Exception):
    """A node cannot be part of a generated kernel; the text says why."""

    node: fx.Node | None = None


class Misaligned(NoKernel):
    """A value made in this kernel is needed at another index than the one it is made at."""


@dataclass(frozen=True)
class Domain:
    """What a kernel runs over: the sizes of its row axes and the number of columns."""

    rows: tuple[sympy.Expr, ...]
    cols: sympy.Expr

    @property
    def row_count(self) -> sympy.Expr:
        return sympy.prod(self.rows)

    @property
    def index(self) -> Index:
        """The index of the element that a lane of the tile stands for."""
        return (*(ZERO if size == 1 else row_symbol(i) for i, size in enumerate(self.rows)), COL)


def row_symbol(axis: int) -> sympy.Symbol:
    return sympy.Symbol(f"i{axis}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Slot:
    """Where a store lands on one axis: `positions`, read at the index of axis `by`, says it.

    The position is a first slot that the own index is added to (`adds`), as new keys land behind the cached ones, or
    it is the slot itself, as for `index_copy_`. ring: slots from there on are used in turn (`kv_write`).
    """

    axis: int
    positions: Layout
    by: int
    adds: bool
    ring: int | None = None

    def place(self, position: sympy.Expr, capacity: sympy.Expr) -> sympy.Expr:
        """The slot of a position, of `capacity` slots."""
        if self.ring is None:
            return position
        if self.ring == 0:
            return Mod(position, capacity)
        return sympy.Min(position, self.ring) + Mod(sympy.Max(position - self.ring, 0), capacity - self.ring)


@dataclass(frozen=True)
class Store:
    """Write the value of `node` to `layout`, at another place on one axis if there is a `slot`.

    Without a layout the value is only computed, for later stores.
    """

    node: fx.Node
    layout: Layout | None
    slot: Slot | None = None
