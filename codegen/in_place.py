"""Writes in place as the two that have kernels: a copy into a tensor, and rows of one to where an index says.

    add_(x, y)                           -->  copy_(x, to(add(x, y), x.dtype))
    index_copy(x, dim, rows, y)          -->  index_copy_(clone(x), dim, rows, y)
    index_put(x, [None, rows], y)        -->  index_copy_(clone(x), 1, where(rows < 0, rows + size, rows), expand(y))

The functional forms of writes, which a graph with views of what it writes to is made of, write to a copy of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, is_tensor, sizes, writes
from ..compiler.rewrite import insert, replace
from .decompose import can_decompose
from .scope import Scope
from .table import WRITES
from .views import INDICES, is_view

aten = torch.ops.aten


def write_by_kernels(graph: Graph) -> Graph:
    """The graph with its writes in the forms that have kernels; itself if there are none to change."""
    if not any(node.target in FUNCTIONAL or updates(node) for node in graph.nodes):
        return graph
    graph = graph.copy()
    for node in list(graph.nodes):
        if node.target in FUNCTIONAL:
            replacement = FUNCTIONAL[node.target](graph, node)
        else:
            replacement = copied(graph, node) if updates(node) else None
        if replacement is not None:
            replace(graph, node, replacement)
            if not node._erased:  # a write is not erased for having no users
                graph.fx.erase_node(node)
    return graph


# --- updates: every element of a tensor ----------------------------------------------------------------------------


def updates(node: fx.Node) -> bool:
    """Whether a call changes its first argument only, to what another op computes of its arguments."""
    if node.op != "call_function" or not writes(node):
        return False
    return is_raw_copy(node) if node.target in WRITES else functional(node) is not None


def is_raw_copy(node: fx.Node) -> bool:
    """Whether a copy casts, broadcasts, or reads what it writes to."""
    if node.target is not aten.copy_.default:
        return False
    target, source = node.args[:2]
    return not agrees(target, source) or (is_view(source) and Scope.memory(source) is Scope.memory(target))


def agrees(target: fx.Node, source: fx.Node) -> bool:
    return dtype_of(target) == dtype_of(source) and sizes(target) == sizes(source)


def functional(node: fx.Node) -> Any:
    """The op that computes what an op in place stores; None where there is none with a kernel, or it is a view."""
    namespace, name = node.target._schema.name.split("::")
    changed = [bool(argument.alias_info and argument.alias_info.is_write) for argument in node.target._schema.arguments]
    if namespace != "aten" or not name.endswith("_") or changed[0] is False or sum(changed) > 1:
        return None
    found = getattr(getattr(aten, name[:-1], None), node.target._overloadname, None)
    return found if found is not None and found not in INDICES and can_decompose(found) else None


def copied(graph: Graph, node: fx.Node) -> fx.Node:
    target = node.args[0]
    if node.target is aten.copy_.default:
        value = node.args[1]
        value = insert(graph, node, aten.clone.default, value) if Scope.memory(value) is Scope.memory(target) else value
    else:
        value = insert(graph, node, functional(node), *node.args, origins=[node], **node.kwargs)
    return insert(graph, node, aten.copy_.default, target, fitted(graph, node, value, target), origins=[node])


def fitted(graph: Graph, before: fx.Node, value: fx.Node, target: fx.Node) -> fx.Node:
    """`value` in the dtype and sizes of a tensor."""
    if dtype_of(value) != dtype_of(target):
        value = insert(graph, before, aten._to_copy.default, value, dtype=dtype_of(target))
    if sizes(value) != sizes(target):
        value = insert(graph, before, aten.expand.default, value, shape_of(graph, before, target))
    return value


def shape_of(graph: Graph, before: fx.Node, tensor: fx.Node) -> list[int | fx.Node]:
    """The sizes of a tensor as arguments of a call: runtime sizes are calls themselves."""
    return [
        size if isinstance(size, int) else insert(graph, before, aten.sym_size.int, tensor, axis)
        for axis, size in enumerate(tensor.meta["val"].shape)
    ]


# --- functional forms of writes: to a copy -------------------------------------------------------------------------


def copy(graph: Graph, node: fx.Node) -> fx.Node:
    value = fitted(graph, node, node.args[1], node.args[0])
    return insert(graph, node, aten.clone.default, value, origins=[node])


def index_copy(graph: Graph, node: fx.Node) -> fx.Node | None:
    target, dim, rows, value = node.args
    return rows_copied(graph, node, target, dim % max(len(sizes(target)), 1), rows, value)


def index_put(graph: Graph, node: fx.Node) -> fx.Node | None:
    """Of rows of one axis that one index says: other indices gather, and what is added up depends on an order."""
    target, indices, value = node.args[:3]
    accumulates = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    given = [(dim, rows) for dim, rows in enumerate(indices) if rows is not None]
    if accumulates or len(given) != 1:
        return None
    (dim, rows) = given[0]
    if len(sizes(rows)) != 1 or dtype_of(rows) not in (torch.int64, torch.int32):
        return None
    shape = shape_of(graph, node, target)
    behind = insert(graph, node, aten.add.Tensor, rows, shape[dim])
    rows = insert(graph, node, aten.where.self, insert(graph, node, aten.lt.Scalar, rows, 0), behind, rows)
    (shape[dim],) = shape_of(graph, node, rows)
    value = insert(graph, node, aten.expand.default, value, shape)
    return rows_copied(graph, node, target, dim, rows, value)


def rows_copied(
    graph: Graph, node: fx.Node, target: fx.Node, dim: int, rows: fx.Node, value: fx.Node
) -> fx.Node | None:
    """Rows of a copy of `target` set to `value`; None along the last axis, which has no kernel."""
    if dim >= len(sizes(target)) - 1 or len(sizes(rows)) != 1 or not is_tensor(value):
        return None
    if dtype_of(value) != dtype_of(target):
        value = insert(graph, node, aten._to_copy.default, value, dtype=dtype_of(target))
    own = insert(graph, node, aten.clone.default, target)
    return insert(graph, node, aten.index_copy_.default, own, dim, rows, value, origins=[node])


FUNCTIONAL = {
    aten.copy.default: copy,
    aten.index_copy.default: index_copy,
    aten.index_put.default: index_put,
}
