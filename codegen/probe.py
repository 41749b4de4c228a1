"""What a kernel would read, without writing it: each op's emitter is run for the values that it asks for.

The same emitters decide both, so that a group which the probe accepts is one that `RowKernel` can print.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.graph import dtype_of
from .domain import COL, Domain, Misaligned
from .fusion_cost import Work, bytes_of, nominal, op_cost
from .pointwise import RowKernel, Value, node_index, short_name
from .views import Index


class Probe(RowKernel):
    """A kernel that notes which tensors in memory it reads and how much it computes.

    made: values that the kernel has made before, to be read at no other index than the lane's own.
    """

    def __init__(self, node: fx.Node, domain: Domain, in_memory: Container[fx.Node], made: Iterable[fx.Node]) -> None:
        super().__init__(domain, in_memory, [], {})
        self.made_here = {node}
        self.made = set(made)
        self.reads: dict[fx.Node, int] = {}
        self.ops = 0
        self.lanes = nominal(domain.row_count) * nominal(domain.cols)

    def value(self, node: Any, index: Index) -> Value:
        if node not in self.made:
            return super().value(node, index)
        if index != self.domain_index(node):
            raise Misaligned(f"{node.name} is made at {self.domain_index(node)} and needed at {index}")
        return self.variable(node, index)

    def load(self, node: fx.Node, index: Index) -> Value:
        self.reads[node] = min(bytes_of(node), self.lanes * dtype_of(node).itemsize)
        return self.variable(node, index)

    def layout_of(self, node: fx.Node) -> None:
        """It is not decided yet."""

    def variable(self, node: fx.Node, index: Index) -> Value:
        """A variable that holds a value at an index."""
        name = self.fresh(short_name(node.name))
        if any(symbol == COL or symbol.name in self.across for place in index for symbol in place.free_symbols):
            self.across.add(name)
        return Value(name, dtype_of(node))

    def let(self, node: fx.Node, expression: str, dtype: torch.dtype | None = None) -> Value:
        self.ops += op_cost(node.target)
        return super().let(node, expression, dtype)

    def loop(self, count: sympy.Expr, iteration: Callable[[sympy.Symbol], None]) -> None:
        before, lanes, times = self.ops, self.lanes, nominal(count)
        self.lanes *= times
        super().loop(count, iteration)
        self.ops, self.lanes = before + (self.ops - before) * times, lanes

    def index_text(self, expr: sympy.Expr) -> str:
        return " ".join(sorted(symbol.name for symbol in expr.free_symbols)) or "0"

    size_text = index_text

    @property
    def programs(self) -> int:
        rows, columns = nominal(self.domain.row_count), nominal(self.domain.cols)
        block_r = max(1, min(16, 1024 // self.block_c))
        return -(-rows // block_r) * (1 if self.reduces else -(-columns // self.block_c))


def work_of(node: fx.Node, domain: Domain, in_memory: Container[fx.Node], made: Iterable[Any] = ()) -> Work:
    """The work of making `node` in a kernel over `domain` that makes the values `made` too.

    Raises Misaligned where it needs one of them at another index than it is made at, NoKernel where no kernel can.
    """
    probe = Probe(node, domain, in_memory, made)
    probe.value(node, node_index(node, domain))
    return Work(probe.reads, {node: bytes_of(node)}, probe.ops * probe.lanes, probe.programs)
