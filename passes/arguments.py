"""Spell the arguments of calls one way: sizes read from the inputs, dimensions from the front, no defaults.

sym_size(attention_mask, 1)           -->  sym_size(input_ids, 1), or an int where it is known
cat([x, y], -1); mean(x, dim=[-1])    -->  cat([x, y], 2); mean(x, [2])
linear(x, w, None)                    -->  linear(x, w)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.graph import Graph, is_tensor, size_expr
from ..compiler.pattern import arguments
from ..compiler.rewrite import insert, replace

aten = torch.ops.aten

IGNORED_ARGUMENTS = {
    "pin_memory": (None, False),
    "layout": (None, torch.strided),
    "cudnn_enable": (True, False),
    "scale_grad_by_freq": (False, True),
    "sparse": (False, True),
}
"""Arguments that say nothing about the result of inference, with the values for which that holds."""


def use_input_sizes(graph: Graph) -> int:
    """A size known while compiling becomes an int; an input's size is read from the first input that has it."""
    home: dict[Any, fx.Node] = {}
    for node in graph.placeholders:
        if isinstance(node.meta["val"], torch.SymInt):
            home.setdefault(size_expr(node), node)
    inputs = [graph.placeholder(name) for name in graph.inputs]
    where = {
        size_expr(size): (node, dim)
        for node in reversed(inputs)
        if is_tensor(node)
        for dim, size in reversed(list(enumerate(node.meta["val"].shape)))
        if not isinstance(size, int)
    }
    changes = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            continue
        size = size_expr(node)
        if size.is_Integer:
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg(
                    (user.args, user.kwargs), lambda used, node=node, size=size: int(size) if used is node else used
                )
            graph.fx.erase_node(node)
            changes += 1
            continue
        if size not in home and size in where:
            body = next(node for node in graph.nodes if node.op != "placeholder")
            home[size] = sized(graph, body, *where[size])
        if size in home and home[size] is not node:
            replace(graph, node, home[size])
            changes += 1
    return changes


def sized(graph: Graph, body: fx.Node, placeholder: fx.Node, dim: int) -> fx.Node:
    """The node in front of the graph's body that reads one size of an input."""
    if body.target == aten.sym_size.int and body.args == (placeholder, dim):
        return body
    for node in placeholder.users:
        if node.target == aten.sym_size.int and node.args == (placeholder, dim):
            body.prepend(node)
            return node
    return insert(graph, body, aten.sym_size.int, placeholder, dim)


def tidy_arguments(graph: Graph) -> int:
    """Arguments of ATen calls by position, dimensions from the front, without defaults and what says nothing."""
    changes = 0
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) != "aten" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        args, kwargs = tidy(node)
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs
            changes += 1
    return changes


def tidy(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = arguments(node)
    schema = node.target._schema.arguments
    args, kwargs, length = [], {}, 0
    for argument in schema:
        value = found[argument.name]
        if argument.name in ("dim", "dims", "dim0", "dim1"):
            value = from_front(node, value)
        redundant = argument.has_default_value() and (
            value == argument.default_value or value in IGNORED_ARGUMENTS.get(argument.name, ())
        )
        if node.target == aten.embedding.default and argument.name == "padding_idx":
            redundant = True
        if argument.kwarg_only:
            if not redundant:
                kwargs[argument.name] = value
            continue
        args.append(argument.default_value if redundant else value)
        if not redundant:
            length = len(args)
    return tuple(args[:length]), kwargs


def from_front(node: fx.Node, dims: Any) -> Any:
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    if not is_tensor(first):
        return dims
    rank = first.meta["val"].ndim + (node.target in (aten.unsqueeze.default, aten.stack.default))
    if isinstance(dims, int) and rank:
        return dims % rank
    if isinstance(dims, (list, tuple)) and rank:
        return [dim % rank for dim in dims]
    return dims
