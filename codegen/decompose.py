"""Ops without a kernel as ops that have one, by PyTorch's own decompositions.

    lerp(x, y, 0.3)  -->  x + 0.3 * (y - x)          broadcast_to(x, [4, 5])  -->  expand(x, [4, 5])

An op is replaced only where all that it decomposes into can be part of a kernel: one call of ATen is better than
several. Decompositions that compute in fp32 and round once say so by their casts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.graph import Graph, returns_tensors, sizes, writes
from ..compiler.rewrite import fake_mode
from .decompositions import OF_AXES, OF_ONE_AXIS, OWN, needs_another_form
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
    """Whether an ATen call, as it stands, can only run through ATen."""
    return (
        node.op == "call_function"
        and getattr(node.target, "namespace", None) == "aten"
        and returns_tensors(node)
        and not writes(node)
        and (not has_kernel(node.target) or needs_another_form(node))
    )


def has_kernel(target: Any) -> bool:
    return target in EMITTERS or target in INDICES or target in SPLITS or target in TEMPLATES or target in WRITES


def can_decompose(target: Any) -> bool:
    """Whether an op has a kernel, or a decomposition into ops that may have one."""
    return has_kernel(target) or target in table()


# --- taking an op apart -------------------------------------------------------------------------------------------


@functools.cache
def table() -> dict[Any, Callable]:
    """Decompositions of the ops that have no kernel, ours before PyTorch's."""
    rules = {target: rule for target, rule in (decomposition_table | OWN).items() if not has_kernel(target)}
    return rules | {target: OWN[target] for target in (*OF_AXES, *OF_ONE_AXIS)}


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
    calls = [part for part in parts.nodes if part.op not in ("placeholder", "output")]
    if not calls or not all(map(is_kernel_part, calls)):
        return None
    (output,) = (part for part in parts.nodes if part.op == "output")
    if isinstance(output.args[0], fx.Node):
        return parts
    taken_apart = all(user.target is operator.getitem for user in node.users)
    return parts if taken_apart and all(isinstance(result, fx.Node) for result in output.args[0]) else None


def is_kernel_part(part: fx.Node) -> bool:
    if part.op != "call_function":
        return False
    if part.target in REDUCTIONS and not reduces_known_rows(part):
        return False
    if part.target is operator.getitem or part.target in SPLITS:
        return True
    return not returns_tensors(part) or part.target in INDICES or is_fusible(part)


def reduces_known_rows(part: fx.Node) -> bool:
    """Whether a reduction has a kernel: the last axis has to be known, and not too long."""
    if reduces_columns(part):
        return True
    shape = sizes(part.args[0])
    if needs_another_form(part) or not (shape[-1].is_Integer and shape[-1] <= MAX_COLUMNS):
        return False
    return part.target not in COLUMN_REDUCTIONS or reduced_axes(part) == [len(shape) - 1]


def splice(graph: Graph, node: fx.Node, parts: fx.Graph) -> None:
    """Replace a call by its parts."""
    values = dict(zip((part for part in parts.nodes if part.op == "placeholder"), node.all_input_nodes))
    with graph.fx.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                values[part] = graph.fx.node_copy(part, values.__getitem__)
                values[part].meta = {**node.meta, "val": part.meta["val"]}
            elif part.op == "output" and isinstance(part.args[0], fx.Node):
                node.replace_all_uses_with(values[part.args[0]])
            elif part.op == "output":
                for user in list(node.users):
                    user.replace_all_uses_with(values[part.args[0][user.args[1]]])
                    graph.fx.erase_node(user)
    graph.fx.erase_node(node)
