"""Ops without a kernel as ops that have one, by PyTorch's own decompositions.

    lerp(x, y, 0.3)  -->  x + 0.3 * (y - x)          broadcast_to(x, [4, 5])  -->  expand(x, [4, 5])

An op is replaced only where all that it decomposes into can be part of a kernel: one call of ATen is better than
several. Decompositions that compute in fp32 and round once say so by their casts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.graph import Graph, is_tensor, sizes, writes
from ..compiler.rewrite import fake_mode
from .pointwise import EMITTERS, MAX_COLUMNS
from .pointwise_ops import is_fusible
from .reductions import COLUMN_REDUCTIONS, REDUCTIONS, reduced_axes, reduces_columns
from .table import TEMPLATES, WRITES
from .views import INDICES, SPLITS

aten = torch.ops.aten


def decompose(graph: Graph) -> Graph:
    """The graph with its ops without a kernel taken apart; itself if there are none that can be."""
    found = [node for node in graph.nodes if lacks_kernel(node)]
    if not found:
        return graph
    graph = graph.copy()
    names = {node.name for node in found}
    for node in list(graph.nodes):
        if node.name in names and (parts := parts_of(graph, node)) is not None:
            splice(graph, node, parts)
    return graph


def lacks_kernel(node: fx.Node) -> bool:
    """Whether an ATen call can only run through ATen."""
    return (
        node.op == "call_function"
        and getattr(node.target, "namespace", None) == "aten"
        and is_tensor(node)
        and not writes(node)
        and (not has_kernel(node.target) or reduces_all_axes(node))
    )


def reduces_all_axes(node: fx.Node) -> bool:
    """Whether a reduction leaves one element of several axes."""
    rank = len(sizes(node.args[0])) if node.target in ALL_AXES else 0
    return rank > 1 and len(reduced_axes(node)) == rank


def has_kernel(target: Any) -> bool:
    return target in EMITTERS or target in INDICES or target in SPLITS or target in TEMPLATES or target in WRITES


def can_decompose(target: Any) -> bool:
    """Whether an op has a kernel, or a decomposition into ops that may have one."""
    return has_kernel(target) or target in table()


# --- decompositions of our own -----------------------------------------------------------------------------------


def along_all_axes(target: Any) -> Callable[..., Tensor]:
    """A reduction of all axes as one of a single row; of some axes it stays what it is."""

    def rule(x: Tensor, dim: Any = (), keepdim: bool = False, **named: Any) -> Tensor:
        if x.ndim < 2 or isinstance(dim, int) or 0 < len(dim or ()) < x.ndim:
            return NotImplemented
        row = target(x.reshape(-1), [0], False, **named)
        return row.reshape([1] * x.ndim) if keepdim else row

    return rule


def of_all_elements(rows: Any) -> Callable[..., Tensor]:
    """A reduction of all elements as one of a single row."""
    return lambda x, **named: rows(x.reshape(-1), [0], False, **named)


def spread(x: Tensor, dim: Any, correction: float | None, keepdim: bool, root: bool) -> Tensor:
    """Variance, or its root: in two passes, in fp32 at least, and rounded once, as eager's."""
    dims = list(range(x.ndim)) if dim is None or dim == [] else dim
    wide = x if x.dtype == torch.float64 else x.float()
    distance = wide - wide.mean(dims, keepdim=True)
    freedom = max(math.prod(x.shape[axis] for axis in dims) - (1 if correction is None else correction), 0)
    result = (distance * distance).sum(dims, keepdim=keepdim) / freedom
    return (result.sqrt() if root else result).to(x.dtype)


def spreads(root: bool) -> tuple[Callable[..., Tensor], ...]:
    """The overloads `correction`, `dim` and `default` of var, or of std."""
    return (
        lambda x, dim=None, correction=None, keepdim=False: spread(x, dim, correction, keepdim, root),
        lambda x, dim, unbiased=True, keepdim=False: spread(x, dim, int(unbiased), keepdim, root),
        lambda x, unbiased=True: spread(x.reshape(-1), [0], int(unbiased), False, root),
    )


ALL_AXES = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)

OWN: dict[Any, Callable[..., Tensor]] = {
    aten.sum.default: of_all_elements(aten.sum.dim_IntList),
    aten.mean.default: of_all_elements(aten.mean.dim),
    aten.max.default: of_all_elements(aten.amax),
    aten.min.default: of_all_elements(aten.amin),
    aten.any.default: lambda x: aten.any.dim(x.reshape(-1), 0),
    aten.all.default: lambda x: aten.all.dim(x.reshape(-1), 0),
    **dict(zip((aten.var.correction, aten.var.dim, aten.var.default), spreads(root=False))),
    **dict(zip((aten.std.correction, aten.std.dim, aten.std.default), spreads(root=True))),
}


@functools.cache
def table() -> dict[Any, Callable]:
    """Decompositions of the ops that have no kernel, ours before PyTorch's."""
    rules = {target: rule for target, rule in (decomposition_table | OWN).items() if not has_kernel(target)}
    return rules | {target: along_all_axes(target) for target in ALL_AXES}


def parts_of(graph: Graph, node: fx.Node) -> fx.Graph | None:
    """What a call decomposes into, with a placeholder for each node that it reads; None if not all has a kernel."""
    values = [argument.meta.get("val") for argument in node.all_input_nodes]

    def call(*operands: Any) -> Any:
        given = dict(zip(node.all_input_nodes, operands))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)

    try:
        with fake_mode(graph), torch.no_grad():
            parts = make_fx(call, decomposition_table=table())(*values).graph
    except Exception:  # whatever keeps PyTorch from taking it apart, ATen still runs it
        return None
    parts.eliminate_dead_code()
    (output,) = (part for part in parts.nodes if part.op == "output")
    calls = [part for part in parts.nodes if part.op not in ("placeholder", "output")]
    if isinstance(output.args[0], fx.Node) and calls and all(map(is_kernel_part, calls)):
        return parts
    return None


def is_kernel_part(part: fx.Node) -> bool:
    if part.op != "call_function":
        return False
    if part.target in REDUCTIONS and not reduces_known_rows(part):
        return False
    return not is_tensor(part) or part.target in INDICES or is_fusible(part)


def reduces_known_rows(part: fx.Node) -> bool:
    """Whether a reduction has a kernel: the last axis has to be known, and not too long."""
    if reduces_columns(part) or part.target not in COLUMN_REDUCTIONS:
        return True
    shape = sizes(part.args[0])
    return reduced_axes(part) == [len(shape) - 1] and shape[-1].is_Integer and shape[-1] <= MAX_COLUMNS


def splice(graph: Graph, node: fx.Node, parts: fx.Graph) -> None:
    """Replace a call by its parts; its name goes to the last one."""
    values = dict(zip((part for part in parts.nodes if part.op == "placeholder"), node.all_input_nodes))
    with graph.fx.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                values[part] = graph.fx.node_copy(part, values.__getitem__)
                values[part].meta = {**node.meta, "val": part.meta["val"]}
            elif part.op == "output":
                node.replace_all_uses_with(values[part.args[0]])
    graph.fx.erase_node(node)
