"""Fix a symbolic size of a graph: decode is extend with one token.

specialize(graph, {S: 1}):  reshape(x [B, S, 576], [B, S, 9, 64])  -->  reshape(x [B, 1, 576], [B, 1, 9, 64])
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..compiler.errors import ModelError
from ..compiler.graph import Graph, size_expr
from ..compiler.rewrite import erase_unused, fake_mode, infer


def specialize(graph: Graph, values: Mapping[sympy.Symbol, int]) -> None:
    """Give symbolic sizes of the inputs a fixed value, and derive all shapes anew."""
    for node in graph.placeholders:
        node.meta["val"] = substituted(graph, node.meta["val"], values)
    rederive(graph, set(graph.nodes))


def rederive(graph: Graph, nodes: Collection[fx.Node]) -> None:
    """Derive the values of these calls from their arguments, in order; sizes that become numbers are put in place."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node not in nodes:
            continue
        value = infer(graph, node.target, node.args, node.kwargs)
        node.meta["val"] = value
        if isinstance(value, int):
            replace_by_number(node, value)
            erase_unused(graph, node)


def replace_by_number(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda argument: number if argument is node else argument
        )


def substituted(graph: Graph, value: Any, values: Mapping[sympy.Symbol, int]) -> Any:
    """A fake tensor or size with symbols replaced by numbers."""
    if isinstance(value, torch.SymInt):
        expr = size_expr(value)
        if not expr.has(*values):
            return value
        expr = expr.subs(values)
        if not expr.is_Integer:
            raise ModelError(
                f"graph {graph.name}: expected inputs whose sizes are numbers or single runtime sizes, found a size of"
                f" {size_expr(value)}: give the model inputs of shape [B, S]"
            )
        return int(expr)
    if isinstance(value, Tensor):
        shape = [substituted(graph, size, values) for size in value.shape]
        with fake_mode(graph):
            return torch.empty(shape, dtype=value.dtype, device=value.device)
    return value
