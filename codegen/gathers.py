"""Emitters of the ops that read or replace elements where another tensor says: embedding, index, gather, scatter."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ..compiler.graph import dtype_of, is_tensor, sizes
from .domain import NoKernel
from .pointwise import RowKernel, Value
from .pointwise_ops import emits, operand
from .views import Index, broadcast_index

aten = torch.ops.aten


@emits(aten.embedding.default)
def embedding(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    table, ids = node.args[:2]
    return kernel.value(table, (place(kernel, ids, index[:-1]), index[-1]))


@emits(aten.index_select.default)
def index_select(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    source, dim, ids = node.args
    dim %= len(index)
    at = place(kernel, ids, (index[dim],) * len(sizes(ids)))
    return kernel.value(source, (*index[:dim], at, *index[dim + 1 :]))


@emits(aten.gather.default)
def gather(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    source, dim, ids = node.args[:3]
    if not index:
        raise NoKernel("a gather from a tensor without dimensions")
    dim %= len(index)
    return kernel.value(source, (*index[:dim], place(kernel, ids, index), *index[dim + 1 :]))


@emits(aten.index.Tensor)
def index(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """source[:, i, j]: the indices, broadcast, take the place of their dimensions, or stand first if those lie apart.

    Indices may be negative.
    """
    source, ids = node.args
    shape = sizes(source)
    given = {dim: part for dim, part in enumerate(ids) if part is not None}
    if any(dtype_of(part) in (torch.bool, torch.uint8) for part in given.values()):
        raise NoKernel("an index by a mask gives a tensor whose size depends on values")
    dims = list(given)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    rank = max(len(sizes(part)) for part in given.values())
    common, others = index[first : first + rank], iter((*index[:first], *index[first + rank :]))
    at = [
        place(kernel, given[dim], broadcast_index(sizes(given[dim]), common), size) if dim in given else next(others)
        for dim, size in enumerate(shape)
    ]
    return kernel.value(source, tuple(at))


MOST_SCATTERED = 16
"""How many places in a row a scatter may have: each element is compared with all of them."""


@emits(aten.scatter.value)
def scatter(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """A number where one of the row's places is that of the element, else the element itself."""
    source, dim, ids, number = node.args[:4]
    rank, count = len(index), sizes(ids)[-1] if sizes(ids) else None
    if not rank or dim % rank != rank - 1 or sizes(ids)[:-1] != sizes(source)[:-1]:
        raise NoKernel("a scatter along another axis than the last, or to some rows only, has no kernel")
    if not count.is_Integer or count > MOST_SCATTERED:
        raise NoKernel(f"a scatter to {count} places in a row has no kernel; up to {MOST_SCATTERED} have")
    own = kernel.index_text(index[-1])
    found = [kernel.value(ids, (*index[:-1], sympy.Integer(at))).name for at in range(int(count))]
    hit = " | ".join(f"({at} == {own})" for at in found)
    kept = operand(kernel, source, index, dtype_of(node))
    return kernel.let(node, f"tl.where({hit}, {kernel.argument(number, index)}, {kept})")


def place(kernel: RowKernel, ids: fx.Node, index: Index, size: sympy.Expr | None = None) -> sympy.Symbol:
    """The element of `ids` at `index`, fit for indices; with the `size` of what is indexed, it may be negative."""
    if not is_tensor(ids):
        raise NoKernel("its indices are no tensor")
    found = kernel.index_from(kernel.value(ids, index))
    if size is None:
        return found
    name = kernel.assign(
        f"{ids.name}_at_row", f"tl.where({found.name} < 0, {found.name} + {kernel.size_text(size)}, {found.name})"
    )
    return sympy.Symbol(name, integer=True, nonnegative=True)
